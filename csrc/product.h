// The product's driver: activations to int8 once, then tiles of rows and tokens over the threads.
#pragma once

#include <cstdint>

#include "pack.h"

namespace fewbit {

// y [tokens][rows] = x [tokens][columns] times the transposed matrix; both float32, contiguous.
void multiply(const Matrix &matrix, const float *x, int64_t tokens, float *y);

}  // namespace fewbit
