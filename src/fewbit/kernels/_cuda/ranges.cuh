// What blocks of attend_one leave for each other: sums over ranges of positions, added up in their order.
#pragma once
#include "heads.cuh"

// positions that a block takes at once; a page holds a whole number of them
constexpr int kTile = 64;
// a sequence is cut by its length alone, so that its sums do not depend on what runs beside it
constexpr int kMostSplits = 32;
constexpr int kAttendThreads = 128;
constexpr int kWarps = kAttendThreads / kWarp;
// query heads of a block: what the matrix units take at once
constexpr int kMostHeads = 8;
constexpr float kNothing = -1e30f;

// slots [T], lengths [S], pages [S, pages_each]
struct Places {
  const long long *slots, *lengths, *pages;
  int pages_each, page_size;
};

// partial [S, heads, kMostSplits, WIDTH]   stats [S, heads, kMostSplits] (largest score, sum)   counters [S, blocks]
// out [S, heads * WIDTH], or halves of `tokens` tokens, these from `first_token` on
struct Result {
  float* partial;
  float2* stats;
  unsigned* counters;
  float* out;
  u16* halves;
  int tokens, first_token;
};

// What a block of attend_one serves: some query heads of one key-value head, of one sequence, over one range.
struct Part {
  int sequence, first_head, heads, kv;
  int length, splits, split, begin, end;
};

__device__ __forceinline__ Part part_of(const Places& places, const Caches& caches) {
  Part p;
  const int group = caches.heads / caches.kv_heads;
  const int blocks = (group + kMostHeads - 1) / kMostHeads, each = (group + blocks - 1) / blocks;
  const int first = blockIdx.x % blocks * each;
  p.kv = blockIdx.x / blocks, p.sequence = blockIdx.y, p.split = blockIdx.z;
  p.first_head = p.kv * group + first, p.heads = max(0, min(each, group - first));
  // written before the step began
  p.length = static_cast<int>(places.lengths[p.sequence]);
  const int tiles = (p.length + kTile - 1) / kTile;
  const int range = (tiles + kMostSplits - 1) / kMostSplits * kTile;
  p.splits = range ? (p.length + range - 1) / range : 0;
  p.begin = p.split * range, p.end = min(p.length, p.begin + range);
  return p;
}

struct Room {
  // the queries as operand A of each product: of a head its halves, and eight rows on what they lack
  __align__(16) u32 queries[WIDTH < 32 ? 2 : WIDTH / 16][kWarp][4];
  __align__(16) u8 new_key[kHeadBytes];
  __align__(16) u8 new_value[kHeadBytes];
  __align__(16) float sums[kWarps][kMostHeads][WIDTH];
  // of each warp: the highest score, and what all scores weigh relative to it; then of the block
  float highest[kWarps][kMostHeads], total[kWarps][kMostHeads];
  bool is_last;
};

// Four numbers of the sums so far, and then more that weigh `by` as much.
struct Weighed {
  float4 sum;
  float top, total;
};

__device__ __forceinline__ void add_weighed(Weighed& all, const float4& more, float top, float total) {
  const float higher = fmaxf(all.top, top), old = exp2f(all.top - higher), by = exp2f(top - higher);
  all.sum.x = all.sum.x * old + by * more.x, all.sum.y = all.sum.y * old + by * more.y;
  all.sum.z = all.sum.z * old + by * more.z, all.sum.w = all.sum.w * old + by * more.w;
  all.total = all.total * old + by * total;
  all.top = higher;
}

__device__ __forceinline__ Weighed nothing_weighed() { return {make_float4(0.f, 0.f, 0.f, 0.f), kNothing, 0.f}; }

// The sums of the block's warps, in their order, to those of the first.
__device__ __forceinline__ void add_up_warps(Room& room, const Part& p) {
  constexpr int kMost = (kMostHeads * WIDTH + 4 * kAttendThreads - 1) / (4 * kAttendThreads);
  Weighed all[kMost];
#pragma unroll
  for (int n = 0; n < kMost; n++) {
    const int i = 4 * (threadIdx.x + n * kAttendThreads), head = i / WIDTH;
    all[n] = nothing_weighed();
    if (head < p.heads)
      for (int w = 0; w < kWarps; w++)
        add_weighed(all[n], *reinterpret_cast<const float4*>(&room.sums[w][head][i % WIDTH]), room.highest[w][head],
                    room.total[w][head]);
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kMost; n++) {
    const int i = 4 * (threadIdx.x + n * kAttendThreads), head = i / WIDTH;
    if (head >= p.heads) continue;
    *reinterpret_cast<float4*>(&room.sums[0][head][i % WIDTH]) = all[n].sum;
    if (i % WIDTH == 0) room.highest[0][head] = all[n].top, room.total[0][head] = all[n].total;
  }
  __syncthreads();
}

// Whether this block is the last of its heads' ranges, after its sums are where that one finds them.
__device__ __forceinline__ bool leave_for_last(Room& room, const Part& p, const Result& result, int heads) {
  const long long first = static_cast<long long>(p.sequence) * heads + p.first_head;
  for (int i = 4 * threadIdx.x; i < p.heads * WIDTH; i += 4 * kAttendThreads)
    *reinterpret_cast<float4*>(result.partial + ((first + i / WIDTH) * kMostSplits + p.split) * WIDTH + i % WIDTH) =
        *reinterpret_cast<const float4*>(&room.sums[0][i / WIDTH][i % WIDTH]);
  if (threadIdx.x < p.heads)
    result.stats[(first + threadIdx.x) * kMostSplits + p.split] =
        make_float2(room.highest[0][threadIdx.x], room.total[0][threadIdx.x]);
  __threadfence();
  __syncthreads();
  unsigned* counter = result.counters + p.sequence * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) {
    room.is_last = atomicAdd(counter, 1u) == p.splits - 1;
    if (room.is_last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return room.is_last;
}

// The sums of all ranges, in their order whichever block does it, to those of the first warp.
__device__ __forceinline__ void add_up_ranges(Room& room, const Part& p, const Result& result, int heads) {
  const long long first = static_cast<long long>(p.sequence) * heads + p.first_head;
  for (int i = 4 * threadIdx.x; i < p.heads * WIDTH; i += 4 * kAttendThreads) {
    const long long range_of = (first + i / WIDTH) * kMostSplits;
    const float4* from = reinterpret_cast<const float4*>(result.partial + range_of * WIDTH + i % WIDTH);
    Weighed all = nothing_weighed();
#pragma unroll 8
    for (int j = 0; j < p.splits; j++) {
      const float2 stat = __ldcg(result.stats + range_of + j);
      add_weighed(all, __ldcg(from + j * (WIDTH / 4)), stat.x, stat.y);
    }
    *reinterpret_cast<float4*>(&room.sums[0][i / WIDTH][i % WIDTH]) = all.sum;
    if (i % WIDTH == 0) room.total[0][i / WIDTH] = all.total;
  }
  __syncthreads();
}

// Weighted means of values, turned back, to where the next product takes them: a half holds what is between cached numbers.
__device__ __forceinline__ void give(const Room& room, const Part& p, const Result& result, int heads, float unit) {
  const int lane = threadIdx.x % kWarp, columns = heads * WIDTH, token = result.first_token + p.sequence;
  for (int g = threadIdx.x / kWarp; g < p.heads; g += kWarps) {
    const float by = p.length ? unit / room.total[0][g] : 0.f;
    float v[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i++) v[i] = is_held(i) && p.length ? room.sums[0][g][lane + 32 * i] * by : 0.f;
    if (kTurnsValues) turn_head(v);
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const int column = (p.first_head + g) * WIDTH + lane + 32 * i;
      if (!is_held(i)) continue;
      if (result.halves)
        result.halves[place_of(column, token, result.tokens)] = half_of(v[i]);
      else
        result.out[static_cast<long long>(p.sequence) * columns + column] = v[i];
    }
  }
  if (result.halves && blockIdx.x == gridDim.x - 1)
    for (int c = columns + threadIdx.x; c < (columns + 127) / 128 * 128; c += kAttendThreads)
      result.halves[place_of(c, token, result.tokens)] = 0;
}
