// The operations around the products of one decoding step: residual and norm, gated activation, rotation and append to
// the cache, attention of one new token a sequence, and the choice of a token. Nothing here needs more than sm_80.
//
// WIDTH    dimensions of a head: 16, 32, 64, 128 or 256
// SHARING  query heads that one block serves: a divisor, at most 8, of those that share a key-value head
#include "pieces.cuh"

#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef SHARING
#define SHARING 8
#endif

namespace {

constexpr int kWarp = 32;
// tokens whose scores are held at once; a page holds a whole number of tiles
constexpr int kTile = 64;
// a sequence is cut by its length alone, so that its sums do not depend on what runs beside it
constexpr int kMostSplits = 32;
constexpr int kAttendThreads = 256;
constexpr float kLargestHalf = 65504.f;
constexpr float kNothing = -1e30f;

__host__ __device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(0xffffffffu, x, m);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int m = 16; m; m >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, m));
  return x;
}

// Every thread of the block gets both; the rooms have a place for each warp.
__device__ __forceinline__ void block_sum_and_max(float& sum, float& top, float* sums, float* tops) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  sum = warp_sum(sum), top = warp_max(top);
  if (lane == 0) sums[warp] = sum, tops[warp] = top;
  __syncthreads();
  sum = warp_sum(lane < warps ? sums[lane] : 0.f);
  top = warp_max(lane < warps ? tops[lane] : 0.f);
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

__device__ __forceinline__ void widen(const uint4& packed, float (&out)[8]) {
  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[2 * i] = float_of_half(static_cast<u16>(words[i]));
    out[2 * i + 1] = float_of_half(static_cast<u16>(words[i] >> 16));
  }
}

// As the cache holds it: an infinity would make all scores NaN.
__device__ __forceinline__ u16 cached(float x) { return half_of(fminf(fmaxf(x, -kLargestHalf), kLargestHalf)); }

}  // namespace

// Activations as the products take them (kernels/cuda.py, Halves): column c of a token lies at [c / 32][token][c % 32],
// `tokens` in all, zeros from the last column to the next multiple of 128.
__device__ __forceinline__ long long place_of(int column, int token, int tokens) {
  return (static_cast<long long>(column / 32) * tokens + token) * 32 + column % 32;
}

// The power of two that a token of largest magnitude `top` is divided by, as halve.cu has it.
__device__ __forceinline__ int power_of(float top) {
  const int exponent = static_cast<int>(__float_as_uint(top) >> 23) - 127;
  return top > 0.f && exponent < 128 && (exponent < -8 || exponent > 14) ? max(exponent - 14, -126) : 0;
}

// x [T, n] += delta [T, n] (where there is one); the norm is x over the root of its mean square, times weight [n], and
// goes to out [T, n], or to halves with `scales` [T], powers of two by which they are too small. One block a token; n is a
// multiple of 4 and at most 16 * blockDim.x.
extern "C" __global__ void __launch_bounds__(1024)
    add_norm(float* x, const float* delta, const float* __restrict__ weight, float* out, u16* halves, float* scales,
             int n, float eps) {
  __shared__ float sums[kWarp], tops[kWarp];
  const int quads = n / 4, threads = blockDim.x, token = blockIdx.x, tokens = gridDim.x;
  const long long row = static_cast<long long>(token) * quads;
  float4* mine = reinterpret_cast<float4*>(x) + row;
  float4 held[4], factor[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = threadIdx.x + i * threads;
    if (at < quads) factor[i] = reinterpret_cast<const float4*>(weight)[at];
  }
  wait_for_inputs();
  let_next_begin();
  float sum = 0.f, top = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = threadIdx.x + i * threads;
    if (at >= quads) continue;
    held[i] = mine[at];
    if (delta) {
      const float4 more = reinterpret_cast<const float4*>(delta)[row + at];
      held[i].x += more.x, held[i].y += more.y, held[i].z += more.z, held[i].w += more.w;
      mine[at] = held[i];
    }
    float4& h = held[i];
    sum += h.x * h.x + h.y * h.y + h.z * h.z + h.w * h.w;
    h.x *= factor[i].x, h.y *= factor[i].y, h.z *= factor[i].z, h.w *= factor[i].w;
    top = fmaxf(top, fmaxf(fmaxf(fabsf(h.x), fabsf(h.y)), fmaxf(fabsf(h.z), fabsf(h.w))));
  }
  block_sum_and_max(sum, top, sums, tops);
  const float r = rsqrtf(sum / n + eps);
  const int by = power_of(top * r);
  const float factor_of_halves = r * __uint_as_float(static_cast<u32>(127 - by) << 23);
  if (halves && threadIdx.x == 0) scales[token] = __uint_as_float(static_cast<u32>(127 + by) << 23);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = threadIdx.x + i * threads;
    if (at >= quads) continue;
    const float4 h = held[i];
    if (halves) {
      const float f = factor_of_halves;
      *reinterpret_cast<uint2*>(halves + place_of(4 * at, token, tokens)) =
          make_uint2(half2_of(h.x * f, h.y * f), half2_of(h.z * f, h.w * f));
    } else {
      reinterpret_cast<float4*>(out)[row + at] = make_float4(h.x * r, h.y * r, h.z * r, h.w * r);
    }
  }
  if (halves)
    for (int c = n + 4 * threadIdx.x; c < (n + 127) / 128 * 128; c += 4 * threads)
      *reinterpret_cast<uint2*>(halves + place_of(c, token, tokens)) = make_uint2(0, 0);
}

// gate_up [T, 2n], gate first -> out [T, n] = silu(gate) * up; n is a multiple of 4.
extern "C" __global__ void gated_silu(const float* gate_up, float* out, int n, long long count) {
  let_next_begin();
  wait_for_inputs();
  const int quads = n / 4;
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count / 4; i += stride) {
    const long long token = i / quads, at = i % quads;
    const float4* row = reinterpret_cast<const float4*>(gate_up) + token * 2 * quads;
    const float4 g = row[at], u = row[quads + at];
    reinterpret_cast<float4*>(out)[i] =
        make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w);
  }
}

// For prompts: qkv [T, (heads + 2 kv) * WIDTH] with angles cos, sin [T, WIDTH / 2] -> rotated queries as half
// [T, heads, WIDTH]; rotated keys and values go to rows `slots` of the caches [R, kv, WIDTH]. One block a token.
extern "C" __global__ void rotate_append(const float* qkv, const float* cosines, const float* sines,
                                         const long long* slots, u16* queries, u16* keys, u16* values, int heads,
                                         int kv_heads) {
  constexpr int kHalf = WIDTH / 2;
  let_next_begin();
  wait_for_inputs();
  const long long token = blockIdx.x, slot = slots[token];
  const float* row = qkv + token * (heads + 2 * kv_heads) * WIDTH;
  for (int i = threadIdx.x; i < (heads + kv_heads) * kHalf; i += blockDim.x) {
    const int head = i / kHalf, at = i % kHalf;
    const float c = cosines[token * kHalf + at], s = sines[token * kHalf + at];
    const float a = row[head * WIDTH + at], b = row[head * WIDTH + at + kHalf];
    u16* to = head < heads ? queries + (token * heads + head) * WIDTH
                            : keys + (slot * kv_heads + head - heads) * WIDTH;
    to[at] = cached(a * c - b * s);
    to[at + kHalf] = cached(b * c + a * s);
  }
  const float* fresh = row + (heads + kv_heads) * WIDTH;
  for (int i = threadIdx.x; i < kv_heads * WIDTH; i += blockDim.x) values[slot * kv_heads * WIDTH + i] = cached(fresh[i]);
}

// One new token a sequence: rotate its query and key, append key and value to the cache, attend to all of its rows.
//
// Block (b, s, split) serves query heads b * SHARING .. of sequence s over one range of positions and reads each row
// once for all of them. A sequence of length L is cut into ranges of whole tiles, at most kMostSplits; the last block to
// finish adds the ranges up in their order, so the sum is the same whichever that is. A length of 0 is no sequence.
//
//   qkv [S, (heads + 2 kv) * WIDTH]   cos, sin [S, WIDTH / 2]   slots, lengths [S]   pages [S, P]
//   keys, values [R, kv, WIDTH]       out [S, heads * WIDTH], or halves of `tokens` tokens, these from `first_token` on
//   partial [S, heads, kMostSplits, WIDTH]   stats [S, heads, kMostSplits] (largest score, sum)   counters [S, blocks]
extern "C" __global__ void __launch_bounds__(kAttendThreads, 1)
    attend_one(const float* qkv, const float* cosines, const float* sines, const long long* slots,
               const long long* lengths, const long long* pages, int pages_each, int page_size, u16* keys,
               u16* values, int heads, int kv_heads, float scale, float* partial, float2* stats, unsigned* counters,
               float* out, u16* halves, int tokens, int first_token) {
  constexpr int kHalf = WIDTH / 2;
  constexpr int kPadded = power_of_two(SHARING);
  // lanes that share a row, 8 dimensions each; rows in flight at once; rows each lane sees of a tile
  constexpr int kLanes = WIDTH / 8;
  constexpr int kRows = kAttendThreads / kLanes;
  constexpr int kEach = (kTile + kRows - 1) / kRows;
  constexpr int kWarps = kAttendThreads / kWarp;
  constexpr int kStride = kPadded < 4 ? 4 : kPadded;

  __shared__ __align__(16) float queries[SHARING][WIDTH];
  __shared__ __align__(16) u16 fresh_key[WIDTH], fresh_value[WIDTH];
  __shared__ __align__(16) float scores[kTile][kStride];
  __shared__ float highest[SHARING], total[SHARING], shrink[SHARING];
  __shared__ __align__(16) float sums[kWarps][SHARING * WIDTH];
  __shared__ bool is_last;

  // the ranges there are come first: blocks without one hold up none that has
  const int s = blockIdx.y, split = blockIdx.z, thread = threadIdx.x;
  const int first_head = blockIdx.x * SHARING, kv = first_head / (heads / kv_heads);
  const int lane = thread % kLanes, row = thread / kLanes, warp = thread / kWarp;
  // written before the step began
  const int length = static_cast<int>(lengths[s]);
  const int tiles = (length + kTile - 1) / kTile;
  const int range = (tiles + kMostSplits - 1) / kMostSplits * kTile;
  const int splits = range ? (length + range - 1) / range : 0;
  let_next_begin();
  if (split >= max(splits, 1)) return;
  // a weighted mean of cached numbers is one that a half holds
  auto give = [&](int i, float4 y) {
    const int column = first_head * WIDTH + i;
    if (halves)
      *reinterpret_cast<uint2*>(halves + place_of(column, first_token + s, tokens)) =
          make_uint2(half2_of(y.x, y.y), half2_of(y.z, y.w));
    else
      *reinterpret_cast<float4*>(out + static_cast<long long>(s) * heads * WIDTH + column) = y;
  };
  auto fill_up = [&] {
    const int columns = heads * WIDTH;
    if (halves && blockIdx.x == gridDim.x - 1)
      for (int c = columns + 4 * thread; c < (columns + 127) / 128 * 128; c += 4 * kAttendThreads)
        *reinterpret_cast<uint2*>(halves + place_of(c, first_token + s, tokens)) = make_uint2(0, 0);
  };
  if (length == 0) {
    wait_for_inputs();
    for (int i = 4 * thread; i < SHARING * WIDTH; i += 4 * kAttendThreads) give(i, make_float4(0.f, 0.f, 0.f, 0.f));
    fill_up();
    return;
  }
  const int begin = split * range, end = min(length, begin + range);

  // rows of earlier steps do not wait for the kernel before
  uint4 k[kEach], v[kEach];
  auto load = [&](int tile) {
    const long long page = pages[static_cast<long long>(s) * pages_each + tile / page_size];
    const long long base = page * page_size + tile % page_size;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int t = row + i * kRows;
      k[i] = v[i] = make_uint4(0, 0, 0, 0);
      if (t < kTile && tile + t < end && tile + t < length - 1) {
        const long long at = ((base + t) * kv_heads + kv) * WIDTH + lane * 8;
        k[i] = *reinterpret_cast<const uint4*>(keys + at);
        v[i] = *reinterpret_cast<const uint4*>(values + at);
      }
    }
  };
  load(begin);
  wait_for_inputs();

  const float* fresh = qkv + static_cast<long long>(s) * (heads + 2 * kv_heads) * WIDTH;
  const float* c = cosines + static_cast<long long>(s) * kHalf;
  const float* n = sines + static_cast<long long>(s) * kHalf;
  // scores in base 2
  const float unit = scale * 1.4426950408889634f;
  for (int i = thread; i < SHARING * kHalf; i += kAttendThreads) {
    const int head = i / kHalf, at = i % kHalf;
    const float a = fresh[(first_head + head) * WIDTH + at], b = fresh[(first_head + head) * WIDTH + at + kHalf];
    queries[head][at] = (a * c[at] - b * n[at]) * unit;
    queries[head][at + kHalf] = (b * c[at] + a * n[at]) * unit;
  }
  if (end == length) {
    const float* key = fresh + (heads + kv) * WIDTH;
    const float* value = fresh + (heads + kv_heads + kv) * WIDTH;
    for (int at = thread; at < kHalf; at += kAttendThreads) {
      fresh_key[at] = cached(key[at] * c[at] - key[at + kHalf] * n[at]);
      fresh_key[at + kHalf] = cached(key[at + kHalf] * c[at] + key[at] * n[at]);
      fresh_value[at] = cached(value[at]);
      fresh_value[at + kHalf] = cached(value[at + kHalf]);
    }
  }
  if (thread < SHARING) highest[thread] = kNothing, total[thread] = 0.f;
  __syncthreads();
  if (end == length && first_head % (heads / kv_heads) == 0 && thread < 2 * kLanes) {
    u16* to = (thread < kLanes ? keys : values) + (slots[s] * kv_heads + kv) * WIDTH;
    const u16* from = thread < kLanes ? fresh_key : fresh_value;
    reinterpret_cast<uint4*>(to)[thread % kLanes] = reinterpret_cast<const uint4*>(from)[thread % kLanes];
  }

  float q[SHARING][8], sum[SHARING][8];
#pragma unroll
  for (int g = 0; g < SHARING; g++)
#pragma unroll
    for (int j = 0; j < 8; j++) q[g][j] = queries[g][lane * 8 + j], sum[g][j] = 0.f;

  for (int tile = begin; tile < end; tile += kTile) {
    if (tile != begin) load(tile);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int t = row + i * kRows;
      if (tile + t == length - 1 && t < kTile) {
        k[i] = reinterpret_cast<const uint4*>(fresh_key)[lane];
        v[i] = reinterpret_cast<const uint4*>(fresh_value)[lane];
      }
      float kf[8], dot[kPadded];
      widen(k[i], kf);
#pragma unroll
      for (int g = 0; g < kPadded; g++) {
        dot[g] = 0.f;
        if (g < SHARING)
#pragma unroll
          for (int j = 0; j < 8; j++) dot[g] += q[g][j] * kf[j];
      }
      // lanes halve what they hold with each exchange, until one sum is left: then all add it up
      int held = kPadded, first = 0;
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
      const float masked = tile + t < end ? 0.f : kNothing;
      if (t < kTile)
#pragma unroll
        for (int g = 0; g < kPadded; g++)
          if (g < held) scores[t][first + g] = masked < 0.f ? kNothing : dot[g];
    }
    __syncthreads();
    for (int g = warp; g < SHARING; g += kWarps) {
      const int l = thread % kWarp;
      const float a = scores[l][g], b = scores[l + kWarp][g], before = highest[g];
      const float top = fmaxf(before, warp_max(fmaxf(a, b)));
      const float pa = a == kNothing ? 0.f : exp2f(a - top), pb = b == kNothing ? 0.f : exp2f(b - top);
      scores[l][g] = pa, scores[l + kWarp][g] = pb;
      const float more = warp_sum(pa + pb);
      __syncwarp();
      if (l == 0) {
        shrink[g] = exp2f(before - top);
        total[g] = total[g] * shrink[g] + more;
        highest[g] = top;
      }
    }
    __syncthreads();
    if (tile != begin)
#pragma unroll
      for (int g = 0; g < SHARING; g++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum[g][j] *= shrink[g];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int t = row + i * kRows;
      if (t >= kTile) continue;
      float vf[8];
      widen(v[i], vf);
#pragma unroll
      for (int g = 0; g < SHARING; g++) {
        const float p = scores[t][g];
#pragma unroll
        for (int j = 0; j < 8; j++) sum[g][j] += p * vf[j];
      }
    }
    // the next tile's scores go where these are
    __syncthreads();
  }

  // rows within a warp, then warps, always in the same order
#pragma unroll
  for (int g = 0; g < SHARING; g++)
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int m = kLanes; m < kWarp; m <<= 1) sum[g][j] += __shfl_xor_sync(0xffffffffu, sum[g][j], m);
      if (thread % kWarp < kLanes) sums[warp][g * WIDTH + lane * 8 + j] = sum[g][j];
    }
  __syncthreads();
  const long long first = static_cast<long long>(s) * heads + first_head;
  for (int i = 4 * thread; i < SHARING * WIDTH; i += 4 * kAttendThreads) {
    float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float4 part = *reinterpret_cast<const float4*>(&sums[w][i]);
      all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
    }
    if (splits == 1) {
      const float by = 1.f / total[i / WIDTH];
      give(i, make_float4(all.x * by, all.y * by, all.z * by, all.w * by));
    } else {
      *reinterpret_cast<float4*>(partial + ((first + i / WIDTH) * kMostSplits + split) * WIDTH + i % WIDTH) = all;
    }
  }
  if (splits == 1) {
    fill_up();
    return;
  }
  if (thread < SHARING) stats[(first + thread) * kMostSplits + split] = make_float2(highest[thread], total[thread]);
  __threadfence();
  __syncthreads();
  unsigned* counter = counters + s * gridDim.x + blockIdx.x;
  if (thread == 0) is_last = atomicAdd(counter, 1u) == splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  for (int i = 4 * thread; i < SHARING * WIDTH; i += 4 * kAttendThreads) {
    const long long range_of = (first + i / WIDTH) * kMostSplits;
    const float4* from = reinterpret_cast<const float4*>(partial + range_of * WIDTH + i % WIDTH);
    float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
    float top = kNothing, sum_of_all = 0.f;
#pragma unroll 8
    for (int j = 0; j < splits; j++) {
      const float2 stat = __ldcg(stats + range_of + j);
      const float4 part = __ldcg(from + j * (WIDTH / 4));
      const float higher = fmaxf(top, stat.x), old = exp2f(top - higher), w = exp2f(stat.x - higher);
      all.x = all.x * old + w * part.x, all.y = all.y * old + w * part.y;
      all.z = all.z * old + w * part.z, all.w = all.w * old + w * part.w;
      sum_of_all = sum_of_all * old + w * stat.y;
      top = higher;
    }
    const float by = 1.f / sum_of_all;
    give(i, make_float4(all.x * by, all.y * by, all.z * by, all.w * by));
  }
  fill_up();
  if (thread == 0) *counter = 0;
}
