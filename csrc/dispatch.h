// Which instruction set runs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fewbit {

// The kernels in use: the best this CPU has, unless select() said otherwise.
const KernelTable &kernels();

// Every instruction set fewbit knows, best last, with the reason it can't run here (empty where it can).
std::vector<std::pair<std::string, std::string>> instruction_sets();

// Throws std::invalid_argument where `name` is unknown or can't run here.
void select(const std::string &name);

}  // namespace fewbit
