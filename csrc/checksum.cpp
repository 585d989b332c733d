#include "checksum.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "pool.h"

namespace fewbit {
namespace {

// One thread's share; a few hundred microseconds.
constexpr size_t kPiece = size_t{1} << 20;
constexpr int kLanes = 8;
constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;

// Each step is a bijection of both arguments: no difference is lost again.
uint64_t mixed(uint64_t state, uint64_t word) { return std::rotl((state ^ word) * kFactor, 29); }

uint64_t piece_sum(const uint8_t *bytes, size_t count) {
    // several chains, so that one need not wait for its multiplication
    uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
    uint64_t words[kLanes];
    for (; count >= sizeof words; bytes += sizeof words, count -= sizeof words) {
        std::memcpy(words, bytes, sizeof words);
        for (int i = 0; i < kLanes; ++i) lanes[i] = mixed(lanes[i], words[i]);
    }
    uint64_t rest[kLanes] = {};
    std::memcpy(rest, bytes, count);
    uint64_t sum = count;
    for (int i = 0; i < kLanes; ++i) sum = mixed(mixed(sum, lanes[i]), rest[i]);
    return sum;
}

}  // namespace

uint64_t checksum(const uint8_t *bytes, size_t count) {
    const size_t pieces = (count + kPiece - 1) / kPiece;
    std::vector<uint64_t> sums(pieces);
    parallel_for(static_cast<int64_t>(pieces), [&](int64_t i) {
        const size_t first = static_cast<size_t>(i) * kPiece;
        sums[static_cast<size_t>(i)] = piece_sum(bytes + first, std::min(kPiece, count - first));
    });
    uint64_t sum = count;
    for (const uint64_t s : sums) sum = mixed(sum, s);
    return sum;
}

}  // namespace fewbit
