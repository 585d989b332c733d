#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(FEWBIT_X86)
#include <cpuid.h>
#endif

namespace fewbit {
namespace {

#if defined(FEWBIT_X86)
// the compilers' own feature test has no name for F16C that both know
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers
std::string avx2_missing() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) return "this CPU has no AVX2";
    if (!__builtin_cpu_supports("fma")) return "this CPU has no FMA";
    return has_f16c() ? "" : "this CPU has no F16C";
}

std::string avx512_missing() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f")) return "this CPU has no AVX-512";
    if (!__builtin_cpu_supports("avx512bw")) return "this CPU has no AVX-512 BW";
    if (!__builtin_cpu_supports("avx512vl")) return "this CPU has no AVX-512 VL";
    return __builtin_cpu_supports("avx512vnni") ? avx2_missing() : "this CPU has no AVX-512 VNNI";
}
#endif

struct Known {
    const KernelTable *table;
    const char *name;
    std::string missing;
};

const std::vector<Known> &known() {
    static const std::vector<Known> all = {
        {&kScalarKernels, "scalar", ""},
#if defined(FEWBIT_X86)
        {&kAvx2Kernels, "avx2", avx2_missing()},
        {&kAvx512Kernels, "avx512vnni", avx512_missing()},
#else
        {nullptr, "avx2", "this build is not for x86-64"},
        {nullptr, "avx512vnni", "this build is not for x86-64"},
#endif
    };
    return all;
}

const KernelTable *best() {
    const KernelTable *found = nullptr;
    for (const Known &k : known()) {
        if (k.missing.empty()) found = k.table;
    }
    return found;
}

std::atomic<const KernelTable *> &current() {
    static std::atomic<const KernelTable *> table{best()};
    return table;
}

}  // namespace

const KernelTable &kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::pair<std::string, std::string>> instruction_sets() {
    std::vector<std::pair<std::string, std::string>> out;
    for (const Known &k : known()) out.emplace_back(k.name, k.missing);
    return out;
}

void select(const std::string &name) {
    for (const Known &k : known()) {
        if (name != k.name) continue;
        if (!k.missing.empty()) throw std::invalid_argument(name + " can't run here: " + k.missing);
        current().store(k.table);
        return;
    }
    throw std::invalid_argument("unknown instruction set '" + name + "': scalar, avx2, avx512vnni");
}

}  // namespace fewbit
