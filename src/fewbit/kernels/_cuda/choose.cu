// The choice of a token from its logits.
#include "pieces.cuh"

namespace {

constexpr int kThreads = 1024;
// what is chosen where a logit is not finite
constexpr u64 kBroken = ~0ull;
// probabilities relative to the largest are counted in steps of 2^-40: sums of whole numbers do not depend on their order
constexpr float kSteps = 1099511627776.f;

// Numbers in the order of their values; never all ones.
__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ u64 mass(float x, float top, float inverse) {
  return static_cast<u64>(__expf((x - top) * inverse) * kSteps);
}

}  // namespace

// best[row] becomes at least (order of the largest logit, inverted id) of this block's part of a row; begins with 0.
// grid (parts, rows); the lowest id of equal logits wins.
extern "C" __global__ void __launch_bounds__(256) largest(const float* logits, int vocab, u64* best) {
  wait_for_inputs();
  const float* row = logits + static_cast<long long>(blockIdx.y) * vocab;
  u64 mine = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab; i += gridDim.x * blockDim.x) {
    const float x = row[i];
    const u64 key = finite(x) ? static_cast<u64>(ordered(x)) << 32 | (~static_cast<u32>(i)) : kBroken;
    mine = key > mine ? key : mine;
  }
  for (int m = 16; m; m >>= 1) {
    const u64 other = __shfl_xor_sync(0xffffffffu, mine, m);
    mine = other > mine ? other : mine;
  }
  if (threadIdx.x % 32 == 0) atomicMax(best + blockIdx.y, mine);
}

// A row to draw from; its largest logit, and what is still drawn from: tokens of at least the order `floor`.
struct Row {
  const float* logits;
  int vocab;
  float top, inverse;
  u32 floor;
};

struct Room {
  u64 bins[kThreads], sums[kThreads];
  u64 passed;
  int found;
};

// room.sums[t] becomes the sum of what the threads up to t gave.
__device__ __forceinline__ void add_up(Room& room, u64 mine) {
  const int thread = threadIdx.x;
  room.sums[thread] = mine;
  __syncthreads();
  for (int m = 1; m < kThreads; m <<= 1) {
    const u64 before = thread >= m ? room.sums[thread - m] : 0;
    __syncthreads();
    room.sums[thread] += before;
    __syncthreads();
  }
}

// The lowest order of those that reach a goal together, from the top down, each counting 1 or its probability: ten bits at
// a time, then the last two.
__device__ u32 reach(Room& room, const Row& row, bool by_mass, u64 goal) {
  const int thread = threadIdx.x;
  u32 prefix = 0;
  for (int shift = 22; shift >= 0; shift -= shift > 2 ? 10 : 2) {
    const int width = shift ? 10 : 2, size = 1 << width;
    room.bins[thread] = 0;
    __syncthreads();
    for (int i = thread; i < row.vocab; i += kThreads) {
      const float x = row.logits[i];
      const u32 key = ordered(x);
      const bool same = shift == 22 || key >> (shift + width) == prefix >> (shift + width);
      if (key >= row.floor && same) {
        const u64 more = by_mass ? mass(x, row.top, row.inverse) : 1;
        if (more) atomicAdd(&room.bins[key >> shift & (size - 1)], more);
      }
    }
    __syncthreads();
    const u64 mine = thread < size ? room.bins[size - 1 - thread] : 0;
    add_up(room, mine);
    const u64 before = room.sums[thread] - mine;
    if (thread < size && before < goal && goal <= room.sums[thread]) room.found = thread, room.passed = before;
    __syncthreads();
    prefix |= static_cast<u32>(size - 1 - room.found) << shift;
    goal -= room.passed;
  }
  __syncthreads();
  return prefix;
}

// The probability of a token that is still drawn from, at least `least`; 0 of the others.
__device__ __forceinline__ u64 share(const Row& row, int i, u64 least) {
  const float x = row.logits[i];
  const u64 m = mass(x, row.top, row.inverse);
  return ordered(x) >= row.floor && m >= least ? m : 0;
}

// The sums of shares up to each thread, each over neighbouring tokens [first, last), to room.sums; -> all together.
__device__ __forceinline__ u64 add_shares(Room& room, const Row& row, int first, int last, u64 least) {
  u64 mine = 0;
  for (int i = first; i < last; i++) mine += share(row, i, least);
  add_up(room, mine);
  return room.sums[kThreads - 1];
}

// Draw from a row: of the top_k likeliest (0: all), those that add up to top_p (1: all), those of at least min_p times
// the largest probability. `best` is what `largest` left of the same row; chosen[row] in the same spelling. `point` [rows]
// are uniform numbers from 0 to 1. One block a row. Equal logits at a border are all kept.
extern "C" __global__ void __launch_bounds__(kThreads) draw(const float* logits, int vocab, float inverse, int top_k,
                                                            float top_p, float min_p, const double* point,
                                                            const u64* best, u64* chosen) {
  __shared__ Room room;
  wait_for_inputs();
  const u64 likeliest = best[blockIdx.x];
  if (likeliest == kBroken) {
    if (threadIdx.x == 0) chosen[blockIdx.x] = kBroken;
    return;
  }
  Row row = {logits + static_cast<long long>(blockIdx.x) * vocab, vocab, 0.f, inverse, 0};
  row.top = row.logits[~static_cast<u32>(likeliest)];
  const int each = (vocab + kThreads - 1) / kThreads, first = threadIdx.x * each;
  const int last = first + each < vocab ? first + each : vocab;
  if (top_k > 0 && top_k < vocab) row.floor = reach(room, row, false, top_k);
  if (top_p < 1.f) {
    // top-p counts among the top-k, before min-p
    const u64 goal = static_cast<u64>(static_cast<double>(add_shares(room, row, first, last, 0)) * top_p);
    __syncthreads();
    const u32 lowest = reach(room, row, true, goal ? goal : 1);
    row.floor = lowest > row.floor ? lowest : row.floor;
  }
  const u64 least = static_cast<u64>(min_p * kSteps), all = add_shares(room, row, first, last, least);
  u64 target = static_cast<u64>(point[blockIdx.x] * static_cast<double>(all));
  if (target >= all) target = all - 1;
  u64 sum = threadIdx.x ? room.sums[threadIdx.x - 1] : 0;
  if (target < sum || room.sums[threadIdx.x] <= target) return;
  for (int i = first; i < last; i++) {
    sum += share(row, i, least);
    if (sum > target) {
      chosen[blockIdx.x] = static_cast<u64>(ordered(row.logits[i])) << 32 | (~static_cast<u32>(i));
      return;
    }
  }
}

// found [rows] in the spelling of `largest` -> tokens [rows], -1 where there is none; ids [rows] are those that are there.
extern "C" __global__ void settle(const u64* found, long long* tokens, long long* ids, int rows) {
  wait_for_inputs();
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const u64 key = found[row];
  const long long id = static_cast<long long>(~static_cast<u32>(key));
  tokens[row] = key == kBroken ? -1 : id;
  ids[row] = key == kBroken ? 0 : id;
}
