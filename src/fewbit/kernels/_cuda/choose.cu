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

// Draw from a row: of the top_k likeliest (0: all), those that add up to top_p (1: all), those of at least min_p times
// the largest probability. `best` is what `largest` left of the same row; chosen[row] in the same spelling. `point` [rows]
// are uniform numbers from 0 to 1. One block a row. Equal logits at a border are all kept.
extern "C" __global__ void __launch_bounds__(kThreads) draw(const float* logits, int vocab, float inverse, int top_k,
                                                            float top_p, float min_p, const double* point,
                                                            const u64* best, u64* chosen) {
  __shared__ u64 bins[kThreads];
  __shared__ u64 sums[kThreads];
  __shared__ u64 passed;
  __shared__ int found;
  wait_for_inputs();
  const float* row = logits + static_cast<long long>(blockIdx.x) * vocab;
  const int thread = threadIdx.x;
  if (best[blockIdx.x] == kBroken) {
    if (thread == 0) chosen[blockIdx.x] = kBroken;
    return;
  }
  const float top = row[~static_cast<u32>(best[blockIdx.x])];
  const u64 least = static_cast<u64>(min_p * kSteps);
  // tokens of at least this order are kept
  u32 floor = 0;

  // sums[t] becomes the sum of what the threads up to t gave
  auto add_up = [&](u64 mine) {
    sums[thread] = mine;
    __syncthreads();
    for (int m = 1; m < kThreads; m <<= 1) {
      const u64 before = thread >= m ? sums[thread - m] : 0;
      __syncthreads();
      sums[thread] += before;
      __syncthreads();
    }
  };
  // The lowest order of those that reach a goal together, from the top down: ten bits at a time, then the last two.
  auto reach = [&](bool weigh, u64 goal) {
    u32 prefix = 0;
    for (int shift = 22; shift >= 0; shift -= shift > 2 ? 10 : 2) {
      const int width = shift ? 10 : 2, size = 1 << width;
      bins[thread] = 0;
      __syncthreads();
      for (int i = thread; i < vocab; i += kThreads) {
        const float x = row[i];
        const u32 key = ordered(x);
        const bool same = shift == 22 || key >> (shift + width) == prefix >> (shift + width);
        if (key >= floor && same) {
          const u64 more = weigh ? mass(x, top, inverse) : 1;
          if (more) atomicAdd(&bins[key >> shift & (size - 1)], more);
        }
      }
      __syncthreads();
      const u64 mine = thread < size ? bins[size - 1 - thread] : 0;
      add_up(mine);
      const u64 before = sums[thread] - mine;
      if (thread < size && before < goal && goal <= sums[thread]) found = thread, passed = before;
      __syncthreads();
      prefix |= static_cast<u32>(size - 1 - found) << shift;
      goal -= passed;
    }
    __syncthreads();
    return prefix;
  };

  if (top_k > 0 && top_k < vocab) floor = reach(false, top_k);
  const int each = (vocab + kThreads - 1) / kThreads, first = thread * each;
  const int last = first + each < vocab ? first + each : vocab;
  auto weigh = [&]() {
    u64 mine = 0;
    for (int i = first; i < last; i++) {
      const float x = row[i];
      const u64 m = mass(x, top, inverse);
      if (ordered(x) >= floor && m >= least) mine += m;
    }
    return mine;
  };
  if (top_p < 1.f) {
    // top-p counts among the top-k, before min-p
    u64 mine = 0;
    for (int i = first; i < last; i++) {
      const float x = row[i];
      if (ordered(x) >= floor) mine += mass(x, top, inverse);
    }
    add_up(mine);
    const u64 all = sums[kThreads - 1];
    __syncthreads();
    const u64 goal = static_cast<u64>(static_cast<double>(all) * top_p);
    const u32 lowest = reach(true, goal ? goal : 1);
    floor = lowest > floor ? lowest : floor;
  }
  add_up(weigh());
  const u64 all = sums[kThreads - 1];
  u64 target = static_cast<u64>(point[blockIdx.x] * static_cast<double>(all));
  if (target >= all) target = all - 1;
  const u64 before = thread ? sums[thread - 1] : 0;
  if (before <= target && target < sums[thread]) {
    u64 sum = before;
    for (int i = first; i < last; i++) {
      const float x = row[i];
      const u64 m = mass(x, top, inverse);
      if (ordered(x) < floor || m < least) continue;
      sum += m;
      if (sum > target) {
        chosen[blockIdx.x] = static_cast<u64>(ordered(x)) << 32 | (~static_cast<u32>(i));
        break;
      }
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
