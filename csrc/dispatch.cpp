#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(FEWBIT_X86)
#include <cpuid.h>
#elif defined(FEWBIT_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(FEWBIT_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
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
#elif defined(FEWBIT_ARM64)
#if defined(__linux__)
// bits of the kernel's interface, which headers older than the CPUs do not name
constexpr unsigned long kDotprodBit = 1ul << 20;  // HWCAP_ASIMDDP
constexpr unsigned long kI8mmBit = 1ul << 13;     // HWCAP2_I8MM

bool has_dotprod() { return (getauxval(AT_HWCAP) & kDotprodBit) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) & kI8mmBit) != 0; }
#elif defined(__APPLE__)
bool has_feature(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
// no way to ask: the scalar kernels run
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

std::string neon_missing() { return has_dotprod() ? "" : "this CPU has no dotprod"; }
std::string neon_i8mm_missing() { return has_i8mm() ? neon_missing() : "this CPU has no i8mm"; }
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
#if defined(FEWBIT_ARM64)
        {&kNeonKernels, "neon-dotprod", neon_missing()},
        {&kNeonI8mmKernels, "neon-i8mm", neon_i8mm_missing()},
#else
        {nullptr, "neon-dotprod", "this build is not for AArch64"},
        {nullptr, "neon-i8mm", "this build is not for AArch64"},
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
    std::string names;
    for (const Known &k : known()) names += std::string(names.empty() ? "" : ", ") + k.name;
    throw std::invalid_argument("unknown instruction set '" + name + "': " + names);
}

}  // namespace fewbit
