#include "ceilings.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "pool.h"

namespace fewbit {
namespace {

// Parts begin on pages, so that no two threads read one line.
constexpr int64_t kPage = 4096;

}  // namespace

uint32_t read_all(const uint8_t *data, int64_t bytes) {
    const KernelTable &k = kernels();
    const int64_t parts = threads();
    const int64_t part = ((bytes + parts - 1) / parts + kPage - 1) / kPage * kPage;
    std::atomic<uint32_t> found{0};
    parallel_for(parts, [&](int64_t i) {
        const int64_t begin = std::min(bytes, i * part);
        found.fetch_or(k.read_bits(data + begin, std::min(part, bytes - begin)), std::memory_order_relaxed);
    });
    return found.load();
}

int64_t dot_all(int64_t rounds, const uint8_t *w, const int8_t *x, uint32_t *total) {
    const KernelTable &k = kernels();
    std::atomic<int64_t> done{0};
    std::atomic<uint32_t> sum{0};
    parallel_for(threads(), [&](int64_t) {
        uint32_t own = 0;
        done.fetch_add(k.dots(rounds, w, x, &own), std::memory_order_relaxed);
        sum.store(own, std::memory_order_relaxed);
    });
    *total = sum.load();
    return done.load();
}

}  // namespace fewbit
