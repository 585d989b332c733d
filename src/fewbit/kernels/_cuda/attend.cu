// Attention over the paged cache: of one new token a sequence in one launch; for prompts, what torch's attention wants
// before it. Nothing here needs more than sm_80.
//
// SHARING  query heads that one block serves: a divisor, at most 8, of those that share a key-value head
#include "heads.cuh"

#ifndef SHARING
#define SHARING 8
#endif

// tokens whose scores are held at once; a page holds a whole number of tiles
constexpr int kTile = 64;
// a sequence is cut by its length alone, so that its sums do not depend on what runs beside it
constexpr int kMostSplits = 32;
constexpr int kAttendThreads = 256;
constexpr int kWarps = kAttendThreads / kWarp;
constexpr float kNothing = -1e30f;

__host__ __device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

constexpr int kPadded = power_of_two(SHARING);
// lanes that share a row, 8 dimensions each; rows in flight at once; rows each lane sees of a tile
constexpr int kLanes = WIDTH / 8;
constexpr int kRows = kAttendThreads / kLanes;
constexpr int kEach = (kTile + kRows - 1) / kRows;
constexpr int kStride = kPadded < 4 ? 4 : kPadded;

// A step's new tokens: qkv [T, (heads + 2 kv) * WIDTH], the angles of their positions [T, WIDTH / 2].
struct New {
  const float *qkv, *cosines, *sines;
};

// slots [T], lengths [S], pages [S, pages_each]
struct Places {
  const long long *slots, *lengths, *pages;
  int pages_each, page_size;
};

// keys and values [R, kv, kHeadBytes]; query heads, and those of keys and values
struct Caches {
  u8 *keys, *values;
  int heads, kv_heads;
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

// For prompts: queries, rotated, as halves [T, heads, WIDTH]; keys, rotated, and values to the cache. One block a token.
extern "C" __global__ void rotate_append(New made, const long long* slots, u16* queries, Caches caches) {
  let_next_begin();
  wait_for_inputs();
  const long long token = blockIdx.x, slot = slots[token];
  const int heads = caches.heads, kv = caches.kv_heads;
  const float* row = made.qkv + token * (heads + 2 * kv) * WIDTH;
  const float *c = made.cosines + token * (WIDTH / 2), *s = made.sines + token * (WIDTH / 2);
  for (int h = threadIdx.x / kWarp; h < heads + 2 * kv; h += blockDim.x / kWarp) {
    const bool is_value = h >= heads + kv;
    float v[kHeld];
    take_head(v, row + h * WIDTH, is_value ? nullptr : c, s);
    if (h < heads) {
      store_halves(reinterpret_cast<u8*>(queries + (token * heads + h) * WIDTH), v);
      continue;
    }
    if (is_value ? kTurnsValues : kTurnsKeys) turn_head(v);
    const long long at = slot * kv + (h - heads) % kv;
    store_head((is_value ? caches.values : caches.keys) + at * kHeadBytes, v);
  }
}

// The first `length` cached rows of a sequence with these pages, turned back, to out [length, kv, WIDTH]: halves, keys
// where `values` is 0. A warp for each head.
extern "C" __global__ void expand_rows(const u8* cache, const long long* pages, int page_size, int length, int kv_heads,
                                       int values, u16* out) {
  let_next_begin();
  wait_for_inputs();
  const long long i = static_cast<long long>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int row = static_cast<int>(i / kv_heads);
  if (row >= length) return;
  const long long at = (pages[row / page_size] * page_size + row % page_size) * kv_heads + i % kv_heads;
  float v[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; j++)
    v[j] = is_held(j) ? number_of(cache + at * kHeadBytes, threadIdx.x % kWarp + 32 * j) : 0.f;
  if (values ? kTurnsValues : kTurnsKeys) turn_head(v);
  store_halves(reinterpret_cast<u8*>(out + i * WIDTH), v);
}

// What a block of attend_one serves: SHARING query heads of one sequence, over one range of its positions.
struct Part {
  int sequence, first_head, kv;
  int length, splits, split, begin, end;
};

__device__ __forceinline__ Part part_of(const Places& places, const Caches& caches) {
  Part p;
  p.first_head = blockIdx.x * SHARING, p.sequence = blockIdx.y, p.split = blockIdx.z;
  p.kv = p.first_head / (caches.heads / caches.kv_heads);
  // written before the step began
  p.length = static_cast<int>(places.lengths[p.sequence]);
  const int tiles = (p.length + kTile - 1) / kTile;
  const int range = (tiles + kMostSplits - 1) / kMostSplits * kTile;
  p.splits = range ? (p.length + range - 1) / range : 0;
  p.begin = p.split * range, p.end = min(p.length, p.begin + range);
  return p;
}

struct Room {
  __align__(16) float queries[SHARING][WIDTH];
  __align__(16) u8 new_key[kHeadBytes];
  __align__(16) u8 new_value[kHeadBytes];
  __align__(16) float scores[kTile][kStride];
  __align__(16) float sums[kWarps][SHARING * WIDTH];
  float highest[SHARING], total[SHARING], shrink[SHARING];
  bool is_last;
};

// Rows of a tile as this lane holds them: eight numbers of each, zeros behind the range and for the new token.
__device__ __forceinline__ void load_rows(Eight (&rows)[kEach], const u8* cache, const Part& p, const Places& places,
                                          int kv_heads, int tile) {
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
  const long long page = places.pages[static_cast<long long>(p.sequence) * places.pages_each + tile / places.page_size];
  const long long base = page * places.page_size + tile % places.page_size;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int t = row + i * kRows;
    rows[i] = t < kTile && tile + t < p.end && tile + t < p.length - 1
                  ? eight_of(cache + ((base + t) * kv_heads + p.kv) * kHeadBytes, lane)
                  : no_numbers();
  }
}

// Queries, rotated and scaled; in the block that sees the new token also its key and value, which the block of the first
// query heads appends to the cache.
__device__ __forceinline__ void take_new(Room& room, const Part& p, const New& made, const Places& places,
                                         const Caches& caches, float scale) {
  const int heads = caches.heads, kv_heads = caches.kv_heads, lane = threadIdx.x % kWarp;
  const float* row = made.qkv + static_cast<long long>(p.sequence) * (heads + 2 * kv_heads) * WIDTH;
  const float* c = made.cosines + static_cast<long long>(p.sequence) * (WIDTH / 2);
  const float* s = made.sines + static_cast<long long>(p.sequence) * (WIDTH / 2);
  // scores in base 2
  const float unit = scale * 1.4426950408889634f;
  const bool sees_new = p.end == p.length, appends = p.first_head % (heads / kv_heads) == 0;
  for (int h = threadIdx.x / kWarp; h < SHARING + (sees_new ? 2 : 0); h += kWarps) {
    const bool is_key = h == SHARING, is_value = h == SHARING + 1;
    const int which = is_value ? heads + kv_heads + p.kv : is_key ? heads + p.kv : p.first_head + h;
    float v[kHeld];
    take_head(v, row + which * WIDTH, is_value ? nullptr : c, s);
    if (is_value ? kTurnsValues : kTurnsKeys) turn_head(v);
    if (h < SHARING) {
#pragma unroll
      for (int i = 0; i < kHeld; i++)
        if (is_held(i)) room.queries[h][lane + 32 * i] = v[i] * unit;
      continue;
    }
    store_head(is_value ? room.new_value : room.new_key, v);
    const long long at = places.slots[p.sequence] * kv_heads + p.kv;
    if (appends) store_head((is_value ? caches.values : caches.keys) + at * kHeadBytes, v);
  }
  if (threadIdx.x < SHARING) room.highest[threadIdx.x] = kNothing, room.total[threadIdx.x] = 0.f;
}

// Lanes of a row halve what they hold of its scores with each exchange, until one is left: then all add it up. Afterwards
// dot[0 .. held) are those of heads `first` and up.
__device__ __forceinline__ void add_up_lanes(float (&dot)[kPadded], int& held, int& first) {
  const int lane = threadIdx.x % kLanes;
  held = kPadded, first = 0;
#pragma unroll
  for (int m = kLanes / 2; m; m >>= 1) {
    if (held > 1) {
      held /= 2;
      const bool upper = lane & m;
#pragma unroll
      for (int g = 0; g < kPadded / 2; g++) {
        if (g >= held) break;
        const float give = upper ? dot[g] : dot[g + held], keep = upper ? dot[g + held] : dot[g];
        dot[g] = keep + __shfl_xor_sync(0xffffffffu, give, m);
      }
      first += upper ? held : 0;
    } else {
      dot[0] += __shfl_xor_sync(0xffffffffu, dot[0], m);
    }
  }
}

// The scores of a tile's keys, for all heads, to the room.
__device__ __forceinline__ void score_tile(Room& room, const Part& p, const Eight (&keys)[kEach],
                                           const float (&q)[SHARING][8], int tile) {
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int t = row + i * kRows;
    float k[8], dot[kPadded];
    widen(tile + t == p.length - 1 && t < kTile ? eight_of(room.new_key, lane) : keys[i], k);
#pragma unroll
    for (int g = 0; g < kPadded; g++) {
      dot[g] = 0.f;
      if (g < SHARING)
#pragma unroll
        for (int j = 0; j < 8; j++) dot[g] += q[g][j] * k[j];
    }
    int held, first;
    add_up_lanes(dot, held, first);
    if (t < kTile)
#pragma unroll
      for (int g = 0; g < kPadded; g++)
        if (g < held) room.scores[t][first + g] = tile + t < p.end ? dot[g] : kNothing;
  }
}

// Scores become weights relative to the highest score so far; `shrink` is what the sums before are worth by that.
__device__ __forceinline__ void weigh_tile(Room& room) {
  for (int g = threadIdx.x / kWarp; g < SHARING; g += kWarps) {
    const int l = threadIdx.x % kWarp;
    const float a = room.scores[l][g], b = room.scores[l + kWarp][g], before = room.highest[g];
    const float top = fmaxf(before, warp_max(fmaxf(a, b)));
    const float pa = a == kNothing ? 0.f : exp2f(a - top), pb = b == kNothing ? 0.f : exp2f(b - top);
    room.scores[l][g] = pa, room.scores[l + kWarp][g] = pb;
    const float more = warp_sum(pa + pb);
    __syncwarp();
    if (l == 0) {
      room.shrink[g] = exp2f(before - top);
      room.total[g] = room.total[g] * room.shrink[g] + more;
      room.highest[g] = top;
    }
  }
}

// sum = sum * shrink + the tile's values by their weights
__device__ __forceinline__ void add_tile(const Room& room, const Part& p, const Eight (&values)[kEach],
                                         float (&sum)[SHARING][8], int tile) {
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
  if (tile != p.begin)
#pragma unroll
    for (int g = 0; g < SHARING; g++)
#pragma unroll
      for (int j = 0; j < 8; j++) sum[g][j] *= room.shrink[g];
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int t = row + i * kRows;
    if (t >= kTile) continue;
    float v[8];
    widen(tile + t == p.length - 1 ? eight_of(room.new_value, lane) : values[i], v);
#pragma unroll
    for (int g = 0; g < SHARING; g++) {
      const float weight = room.scores[t][g];
#pragma unroll
      for (int j = 0; j < 8; j++) sum[g][j] += weight * v[j];
    }
  }
}

// The block's sums to room.sums[0]: rows within a warp, then warps, always in the same order.
__device__ __forceinline__ void add_up_block(Room& room, float (&sum)[SHARING][8]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int g = 0; g < SHARING; g++)
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int m = kLanes; m < kWarp; m <<= 1) sum[g][j] += __shfl_xor_sync(0xffffffffu, sum[g][j], m);
      if (threadIdx.x % kWarp < kLanes) room.sums[warp][g * WIDTH + lane * 8 + j] = sum[g][j];
    }
  __syncthreads();
  for (int i = 4 * threadIdx.x; i < SHARING * WIDTH; i += 4 * kAttendThreads) {
    float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float4 part = *reinterpret_cast<const float4*>(&room.sums[w][i]);
      all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
    }
    *reinterpret_cast<float4*>(&room.sums[0][i]) = all;
  }
  __syncthreads();
}

// Whether this block is the last of its heads' ranges, after its sums are where that one finds them.
__device__ __forceinline__ bool leave_for_last(Room& room, const Part& p, const Result& result, int heads) {
  const long long first = static_cast<long long>(p.sequence) * heads + p.first_head;
  for (int i = 4 * threadIdx.x; i < SHARING * WIDTH; i += 4 * kAttendThreads)
    *reinterpret_cast<float4*>(result.partial + ((first + i / WIDTH) * kMostSplits + p.split) * WIDTH + i % WIDTH) =
        *reinterpret_cast<const float4*>(&room.sums[0][i]);
  if (threadIdx.x < SHARING)
    result.stats[(first + threadIdx.x) * kMostSplits + p.split] =
        make_float2(room.highest[threadIdx.x], room.total[threadIdx.x]);
  __threadfence();
  __syncthreads();
  unsigned* counter = result.counters + p.sequence * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) room.is_last = atomicAdd(counter, 1u) == p.splits - 1;
  __syncthreads();
  if (room.is_last && threadIdx.x == 0) *counter = 0;
  __threadfence();
  return room.is_last;
}

// All ranges' sums to room.sums[0], and what they weigh to room.total: in their order, whichever block does it.
__device__ __forceinline__ void add_up_ranges(Room& room, const Part& p, const Result& result, int heads) {
  const long long first = static_cast<long long>(p.sequence) * heads + p.first_head;
  for (int i = 4 * threadIdx.x; i < SHARING * WIDTH; i += 4 * kAttendThreads) {
    const long long range_of = (first + i / WIDTH) * kMostSplits;
    const float4* from = reinterpret_cast<const float4*>(result.partial + range_of * WIDTH + i % WIDTH);
    float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
    float top = kNothing, weight = 0.f;
#pragma unroll 8
    for (int j = 0; j < p.splits; j++) {
      const float2 stat = __ldcg(result.stats + range_of + j);
      const float4 part = __ldcg(from + j * (WIDTH / 4));
      const float higher = fmaxf(top, stat.x), old = exp2f(top - higher), w = exp2f(stat.x - higher);
      all.x = all.x * old + w * part.x, all.y = all.y * old + w * part.y;
      all.z = all.z * old + w * part.z, all.w = all.w * old + w * part.w;
      weight = weight * old + w * stat.y;
      top = higher;
    }
    *reinterpret_cast<float4*>(&room.sums[0][i]) = all;
    if (i % WIDTH == 0) room.total[i / WIDTH] = weight;
  }
  __syncthreads();
}

// Weighted means of values, turned back, to where the next product takes them: a half holds what is between cached numbers.
__device__ __forceinline__ void give(Room& room, const Part& p, const Result& result, int heads) {
  const int lane = threadIdx.x % kWarp, columns = heads * WIDTH, token = result.first_token + p.sequence;
  for (int g = threadIdx.x / kWarp; g < SHARING; g += kWarps) {
    const float by = p.length ? 1.f / room.total[g] : 0.f;
    float v[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i++) v[i] = is_held(i) && p.length ? room.sums[0][g * WIDTH + lane + 32 * i] * by : 0.f;
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

// One new token a sequence: rotate its query and key, append key and value to the cache, attend to all of its rows.
//
// Block (b, s, split) serves query heads b * SHARING .. of sequence s over one range of positions and reads each row
// once for all of them. A sequence of length L is cut into ranges of whole tiles, at most kMostSplits; the last block to
// finish adds the ranges up in their order, so the sum is the same whichever that is. A length of 0 is no sequence.
extern "C" __global__ void __launch_bounds__(kAttendThreads, 1)
    attend_one(New made, Places places, Caches caches, Result result, float scale) {
  __shared__ Room room;
  // the ranges there are come first: blocks without one hold up none that has
  const Part p = part_of(places, caches);
  let_next_begin();
  if (p.split >= max(p.splits, 1)) return;
  Eight keys[kEach], values[kEach];
  if (p.length) {
    // rows of earlier steps do not wait for the kernel before
    load_rows(keys, caches.keys, p, places, caches.kv_heads, p.begin);
    load_rows(values, caches.values, p, places, caches.kv_heads, p.begin);
  }
  wait_for_inputs();
  if (!p.length) return give(room, p, result, caches.heads);
  take_new(room, p, made, places, caches, scale);
  __syncthreads();

  float q[SHARING][8], sum[SHARING][8];
#pragma unroll
  for (int g = 0; g < SHARING; g++)
#pragma unroll
    for (int j = 0; j < 8; j++) q[g][j] = room.queries[g][threadIdx.x % kLanes * 8 + j], sum[g][j] = 0.f;
  for (int tile = p.begin; tile < p.end; tile += kTile) {
    const bool more = tile + kTile < p.end;
    score_tile(room, p, keys, q, tile);
    if (more) load_rows(keys, caches.keys, p, places, caches.kv_heads, tile + kTile);
    __syncthreads();
    weigh_tile(room);
    __syncthreads();
    add_tile(room, p, values, sum, tile);
    if (more) load_rows(values, caches.values, p, places, caches.kv_heads, tile + kTile);
    // the next tile's scores go where these are
    __syncthreads();
  }
  add_up_block(room, sum);
  if (p.splits > 1) {
    if (!leave_for_last(room, p, result, caches.heads)) return;
    add_up_ranges(room, p, result, caches.heads);
  }
  give(room, p, result, caches.heads);
}
