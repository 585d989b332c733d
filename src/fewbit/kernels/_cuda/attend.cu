// Attention of one new token a sequence over the paged cache, in one launch. Nothing here needs more than sm_80.
//
// The matrix units multiply sixteen rows at least, and at most eight query heads share a key: the other eight rows are what
// rounding queries and weights to halves took from them, so that only the cache's own rounding is left.
#include "operands.cuh"
#include "ranges.cuh"
#include "units.cuh"

// whether the next rows are asked for while these are multiplied; wide heads leave no registers for it
constexpr bool kAhead = WIDTH * CACHE <= 128 * 16;

// Sixteen positions of a warp.
struct Tile {
  const u8 *keys, *values;
  int first, step;
};

// Row `first` of a tile, in both caches, and how far apart rows are.
__device__ __forceinline__ Tile tile_at(const Part& p, const Places& places, const Caches& caches, int first) {
  const long long page = places.pages[static_cast<long long>(p.sequence) * places.pages_each + first / places.page_size];
  const long long at = ((page * places.page_size + first % places.page_size) * caches.kv_heads + p.kv) * kHeadBytes;
  return {caches.keys + at, caches.values + at, first, caches.kv_heads * kHeadBytes};
}

// Rows that were there before this step; nothing in place of the others.
__device__ __forceinline__ const u8* row_of(const Part& p, const Tile& tile, const u8* rows, int i) {
  return tile.first + i < min(p.end, p.length - 1) ? rows + static_cast<long long>(i) * tile.step : nullptr;
}

__device__ __forceinline__ void load_keys(Keys& keys, const Part& p, const Tile& tile) {
  const int g = threadIdx.x % kWarp / 4;
#pragma unroll
  for (int n = 0; n < 2; n++) take_key(keys, n, row_of(p, tile, tile.keys, g + 8 * n));
}

__device__ __forceinline__ int value_token(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

__device__ __forceinline__ void load_values(Values& values, const Part& p, const Tile& tile) {
#pragma unroll
  for (int i = 0; i < 4; i++) take_value(values, i, row_of(p, tile, tile.values, value_token(i)));
}

// Queries, rotated and scaled, as the scores' operand; in the block that sees the new token also its key and value.
__device__ __forceinline__ void take_new(Room& room, const Part& p, const New& made, const Caches& caches, float scale) {
  const int heads = caches.heads, kv_heads = caches.kv_heads, lane = threadIdx.x % kWarp;
  const float* row = made.qkv + static_cast<long long>(p.sequence) * (heads + 2 * kv_heads) * WIDTH;
  const float* c = made.cosines + static_cast<long long>(p.sequence) * (WIDTH / 2);
  const float* s = made.sines + static_cast<long long>(p.sequence) * (WIDTH / 2);
  // scores in base 2
  const float unit = scale * 1.4426950408889634f * kKeyHalving;
  for (int h = threadIdx.x / kWarp; h < p.heads + (p.end == p.length ? 2 : 0); h += kWarps) {
    const bool is_key = h == p.heads, is_value = h == p.heads + 1;
    const int which = is_value ? heads + kv_heads + p.kv : is_key ? heads + p.kv : p.first_head + h;
    float v[kHeld];
    take_head(v, row + which * WIDTH, is_value ? nullptr : c, s);
    if (is_value ? kTurnsValues : kTurnsKeys) turn_head(v);
    if (is_key || is_value) {
      store_head(is_value ? room.new_value : room.new_key, v);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      if (!is_held(i)) continue;
      const Place to = place_in_queries(lane + 32 * i);
      const float x = within_halves(v[i] * unit);
      const u16 high = half_of(x);
      u32* words = room.queries[to.step][4 * h + to.q] + to.word;
      reinterpret_cast<u16*>(words)[to.half] = high;
      reinterpret_cast<u16*>(words + 1)[to.half] = half_of(x - float_of_half(high));
    }
  }
}

// The new key and value to the cache, by one of the blocks that see them.
__device__ __forceinline__ void append_new(const Room& room, const Part& p, const Places& places, const Caches& caches) {
  constexpr int kParts = kHeadBytes / 4;
  if (p.end != p.length || p.first_head % (caches.heads / caches.kv_heads)) return;
  const long long at = (places.slots[p.sequence] * caches.kv_heads + p.kv) * kHeadBytes;
  for (int i = threadIdx.x; i < 2 * kParts; i += kAttendThreads) {
    const bool is_value = i >= kParts;
    const int part = is_value ? i - kParts : i;
    reinterpret_cast<u32*>((is_value ? caches.values : caches.keys) + at)[part] =
        reinterpret_cast<const u32*>(is_value ? room.new_value : room.new_key)[part];
  }
}

// The scores of head g with tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of a tile.
__device__ __forceinline__ void score_tile(const Room& room, const Keys& keys, float (&scores)[4]) {
  const int lane = threadIdx.x % kWarp;
  float c[2][4] = {};
#pragma unroll
  for (int e = 0; e < kEights; e++)
#pragma unroll
    for (int n = 0; n < 2; n++) {
      u32 words[kWords], pairs[4];
#pragma unroll
      for (int w = 0; w < kWords; w++) words[w] = keys.words[n][e * kWords + w];
      pairs_of(words, keys.numbers[n][e * kKeyGroups / kEights], pairs);
      multiply(c[n], room.queries[2 * e][lane], pairs[0], pairs[1]);
      multiply(c[n], room.queries[2 * e + 1][lane], pairs[2], pairs[3]);
    }
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      scores[2 * n + i] = c[n][i] + c[n][i + 2];
      if (CACHE == 8) {
        // the token's own lanes have its scale
        const float scale = float_of_bfloat(static_cast<u16>(keys.numbers[n][0]));
        scores[2 * n + i] *= __shfl_sync(0xffffffffu, scale, lane % 4 * 8 + 4 * i);
      }
    }
}

// What a warp has seen of its range: sums of values [dimensions][heads and what their halves lack], relative to `top`.
struct Seen {
  float sum[8 * kSlabs][4];
  float top, total;
};

// Scores become weights relative to the highest so far, as operand A.
__device__ __forceinline__ void weigh_tile(Seen& seen, const Part& p, int first, const float (&scores)[4], u32 (&weights)[4]) {
  float higher = seen.top;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (first + value_token(i) < p.end) higher = fmaxf(higher, scores[i]);
  higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 1));
  higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 2));
  if (__any_sync(0xffffffffu, higher > seen.top)) {
    const float shrink = exp2f(seen.top - higher);
#pragma unroll
    for (int i = 0; i < 8 * kSlabs; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) seen.sum[i][j] *= shrink;
    seen.total *= shrink;
    seen.top = higher;
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float a = first + value_token(i) < p.end ? exp2f(scores[i] - seen.top) : 0.f;
    const float b = first + value_token(i + 1) < p.end ? exp2f(scores[i + 1] - seen.top) : 0.f;
    seen.total += a + b;
    weights[i] = half2_of(a, b);
    weights[i + 1] = half2_of(a - float_of_half(static_cast<u16>(weights[i])),
                              b - float_of_half(static_cast<u16>(weights[i] >> 16)));
  }
}

__device__ __forceinline__ void add_tile(Seen& seen, const Values& values, const u32 (&weights)[4]) {
#pragma unroll
  for (int s = 0; s < kSlabs; s++) {
    u32 pairs[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      pairs_of(values.words[i][s], values.numbers[i][s], pairs[i]);
      if (CACHE == 8) {
        const u16 scale = half_of(float_of_bfloat(static_cast<u16>(values.numbers[i][0])) / kHalving);
#pragma unroll
        for (int j = 0; j < 4; j++) pairs[i][j] = pair_times(pairs[i][j], scale | static_cast<u32>(scale) << 16);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int which = 0; which < 2; which++) {
        const u32 halves = which ? 0x7632 : 0x5410;
        multiply(seen.sum[8 * s + place_in_eight(j, which)], weights, __byte_perm(pairs[0][j], pairs[1][j], halves),
                 __byte_perm(pairs[2][j], pairs[3][j], halves));
      }
  }
}

// Where the block adds up what its warps have seen.
__device__ __forceinline__ void leave(Room& room, const Part& p, Seen& seen) {
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
  seen.total += __shfl_xor_sync(0xffffffffu, seen.total, 1);
  seen.total += __shfl_xor_sync(0xffffffffu, seen.total, 2);
  if (g >= p.heads) return;
  if (q == 0) room.highest[warp][g] = seen.top, room.total[warp][g] = seen.total;
#pragma unroll
  for (int s = 0; s < kSlabs; s++)
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        const float(*sum)[4] = &seen.sum[8 * s + e];
        const int at = 64 * s + 8 * (2 * q + i) + e;
        if (at < WIDTH)
          *reinterpret_cast<float4*>(&room.sums[warp][g][at]) =
              make_float4(sum[0][i] + sum[0][i + 2], sum[1][i] + sum[1][i + 2], sum[2][i] + sum[2][i + 2],
                          sum[3][i] + sum[3][i + 2]);
      }
}

// One new token a sequence: rotate its query and key, append key and value to the cache, attend to all of its rows.
//
// Block (b, s, split) serves some query heads of sequence s that share a key-value head, over one range of positions, and
// reads each row once for all of them. A sequence of length L is cut into ranges of whole tiles, at most kMostSplits; the
// last block to finish adds the ranges up in their order, so the sum is the same whichever that is. A length of 0 is no
// sequence.
extern "C" __global__ void __launch_bounds__(kAttendThreads, WIDTH > 128 ? 2 : 3)
    attend_one(New made, Places places, Caches caches, Result result, float scale) {
  __shared__ Room room;
  const Part p = part_of(places, caches);
  let_next_begin();
  if (p.split >= max(p.splits, 1)) return;
  int first = p.begin + 16 * (threadIdx.x / kWarp);
  Keys keys;
  Values values;
  Tile tile{};
  // rows of earlier steps do not wait for the kernel before
  if (first < p.end) tile = tile_at(p, places, caches, first);
  if (kAhead && first < p.end) load_keys(keys, p, tile), load_values(values, p, tile);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(room.queries) / 16); i += kAttendThreads)
    reinterpret_cast<uint4*>(room.queries)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  wait_for_inputs();
  if (!p.length) return give(room, p, result, caches.heads, 0.f);
  take_new(room, p, made, caches, scale);
  __syncthreads();
  append_new(room, p, places, caches);

  Seen seen = {};
  seen.top = kNothing;
  for (; first < p.end; first += kTile) {
    const int next = first + kTile, latest = p.length - 1 - first;
    float scores[4];
    u32 weights[4];
    if (!kAhead) load_keys(keys, p, tile);
#pragma unroll
    for (int n = 0; n < 2; n++)
      if (latest == static_cast<int>(threadIdx.x % kWarp / 4) + 8 * n) take_key(keys, n, room.new_key);
    score_tile(room, keys, scores);
    weigh_tile(seen, p, first, scores, weights);
    if (!kAhead) load_values(values, p, tile);
    if (next < p.end) tile = tile_at(p, places, caches, next);
    if (kAhead && next < p.end) load_keys(keys, p, tile);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (latest == value_token(i)) take_value(values, i, room.new_value);
    add_tile(seen, values, weights);
    if (kAhead && next < p.end) load_values(values, p, tile);
  }
  leave(room, p, seen);
  __syncthreads();
  add_up_warps(room, p);
  if (p.splits > 1) {
    if (!leave_for_last(room, p, result, caches.heads)) return;
    add_up_ranges(room, p, result, caches.heads);
  }
  give(room, p, result, caches.heads, kHalving);
}
