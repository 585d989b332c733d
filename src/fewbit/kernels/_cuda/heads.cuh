// A head of WIDTH numbers: rotated, turned by a Hadamard matrix, and as the cache holds it. `cached` in kernels/ops.py is
// the definition.
//
// WIDTH  dimensions of a head: 16, 32, 64, 128 or 256
// CACHE  bits that the cache has for a number:
//   16  halves
//   8   a byte each, then the head's scale in bfloat16; heads begin at multiples of 8 bytes
//   4   half a byte each, the even one in the low half; then for each group of 32 its scale and its least number, as halves
#pragma once
#include "warps.cuh"

#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef CACHE
#define CACHE 16
#endif

constexpr float kLargestHalf = 65504.f;
constexpr int kGroup = WIDTH < 32 ? WIDTH : 32;
constexpr int kHeadBytes = CACHE == 16 ? 2 * WIDTH : CACHE == 8 ? WIDTH + 8 : WIDTH / 2 + 4 * (WIDTH / kGroup);
// what is turned before it is rounded
constexpr bool kTurnsKeys = CACHE < 16, kTurnsValues = CACHE < 8;
// a warp holds a head: number lane + 32 i in v[i] of a lane, so that v[i] of all lanes is a group
constexpr int kHeld = (WIDTH + 31) / 32;

// A step's new tokens: qkv [T, (heads + 2 kv) * WIDTH], the angles of their positions [T, WIDTH / 2].
struct New {
  const float *qkv, *cosines, *sines;
};

// keys and values [R, kv, kHeadBytes]; query heads, and those of keys and values
struct Caches {
  u8 *keys, *values;
  int heads, kv_heads;
};

// An infinity would make all scores NaN; NaN stays what it is.
__device__ __forceinline__ float within_halves(float x) {
  return x > kLargestHalf ? kLargestHalf : x < -kLargestHalf ? -kLargestHalf : x;
}

__device__ __forceinline__ bool is_held(int i) { return WIDTH >= 32 || static_cast<int>(threadIdx.x % kWarp) < WIDTH; }

// A head from memory; with angles rotated by them, its two halves being the pairs.
__device__ __forceinline__ void take_head(float (&v)[kHeld], const float* head, const float* cosines, const float* sines) {
  constexpr int kHalf = WIDTH / 2;
#pragma unroll
  for (int i = 0; i < kHeld; i++) {
    const int at = threadIdx.x % kWarp + 32 * i;
    if (!is_held(i)) {
      v[i] = 0.f;
    } else if (cosines) {
      const float c = cosines[at % kHalf], s = sines[at % kHalf];
      v[i] = at < kHalf ? head[at] * c - head[at + kHalf] * s : head[at] * c + head[at - kHalf] * s;
    } else {
      v[i] = head[at];
    }
  }
}

// Times a Hadamard matrix over its root: its own inverse.
__device__ __forceinline__ void turn_head(float (&v)[kHeld]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 1; m < WIDTH && m < 32; m <<= 1)
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const float other = __shfl_xor_sync(0xffffffffu, v[i], m);
      v[i] = lane & m ? other - v[i] : v[i] + other;
    }
#pragma unroll
  for (int m = 1; m < kHeld; m <<= 1)
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      if (i & m) continue;
      const float a = v[i], b = v[i | m];
      v[i] = a + b, v[i | m] = a - b;
    }
  constexpr float kRoot = WIDTH == 16    ? 0.25f
                          : WIDTH == 32  ? 0.17677669529663687f
                          : WIDTH == 64  ? 0.125f
                          : WIDTH == 128 ? 0.08838834764831845f
                                         : 0.0625f;
#pragma unroll
  for (int i = 0; i < kHeld; i++) v[i] *= kRoot;
}

__device__ __forceinline__ bool warp_any(bool one) { return __any_sync(0xffffffffu, one); }

__device__ __forceinline__ float float_of_bfloat(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }

// To nearest, ties to even.
__device__ __forceinline__ u16 bfloat_of(float x) {
  const u32 bits = __float_as_uint(x);
  return x != x ? 0x7fc0 : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ void store_halves(u8* to, const float (&v)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; i++)
    if (is_held(i)) reinterpret_cast<u16*>(to)[threadIdx.x % kWarp + 32 * i] = half_of(within_halves(v[i]));
}

__device__ __forceinline__ void store_bytes(u8* to, const float (&v)[kHeld]) {
  const int lane = threadIdx.x % kWarp;
  float top = 0.f;
  bool broken = false;
#pragma unroll
  for (int i = 0; i < kHeld; i++) top = fmaxf(top, fabsf(v[i])), broken |= v[i] != v[i];
  top = fminf(warp_max(top), kLargestHalf);
  const u16 bits = warp_any(broken) ? 0x7fc0 : bfloat_of(top / 127.f);
  const float scale = float_of_bfloat(bits);
#pragma unroll
  for (int i = 0; i < kHeld; i++) {
    const float code = scale > 0.f ? fminf(fmaxf(rintf(v[i] / scale), -127.f), 127.f) : 0.f;
    if (is_held(i)) to[lane + 32 * i] = static_cast<u8>(static_cast<int>(code));
  }
  // what lies between the scale and the next head is never looked at
  if (lane == 0) *reinterpret_cast<u16*>(to + WIDTH) = bits;
}

__device__ __forceinline__ void store_nibbles(u8* to, const float (&v)[kHeld]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kHeld; i++) {
    const float x = within_halves(v[i]);
    const bool broken = warp_any(is_held(i) && x != x);
    const float top = warp_max(is_held(i) ? x : -kLargestHalf), low = -warp_max(is_held(i) ? -x : -kLargestHalf);
    // of two zeros the positive one
    const u16 least = broken ? 0x7e00 : half_of(low + 0.f), step = broken ? 0x7e00 : half_of((top - low) / 15.f);
    const float from = float_of_half(least), by = float_of_half(step);
    const float code = by > 0.f ? fminf(fmaxf(rintf((x - from) / by), 0.f), 15.f) : 0.f;
    const float other = __shfl_xor_sync(0xffffffffu, code, 1);
    if (is_held(i) && lane % 2 == 0)
      to[(lane + 32 * i) / 2] = static_cast<u8>(static_cast<int>(code) | static_cast<int>(other) << 4);
    if (lane == 0) reinterpret_cast<u32*>(to + WIDTH / 2)[i] = step | static_cast<u32>(least) << 16;
  }
}

// A warp's head as the cache holds it; `to` is a multiple of 4 bytes.
__device__ __forceinline__ void store_head(u8* to, const float (&v)[kHeld]) {
  if (CACHE == 16) store_halves(to, v);
  if (CACHE == 8) store_bytes(to, v);
  if (CACHE == 4) store_nibbles(to, v);
}

// Number `at` of a head in the cache.
__device__ __forceinline__ float number_of(const u8* head, int at) {
  if (CACHE == 16) return float_of_half(reinterpret_cast<const u16*>(head)[at]);
  if (CACHE == 8)
    return static_cast<float>(static_cast<signed char>(head[at])) *
           float_of_bfloat(*reinterpret_cast<const u16*>(head + WIDTH));
  const u32 numbers = reinterpret_cast<const u32*>(head + WIDTH / 2)[at / kGroup];
  const float code = static_cast<float>(head[at / 2] >> at % 2 * 4 & 15);
  return code * float_of_half(static_cast<u16>(numbers)) + float_of_half(static_cast<u16>(numbers >> 16));
}
