// Cached rows as operand B of mma.m16n8k16, without a look at shared memory: which dimension is which of the matrix unit's
// inner (keys) or outer (values) index is free, as long as queries and results agree, so each lane takes neighbours.
//
// Sixteen tokens are two operands of eight keys: lane (g, q) = (lane / 4, lane % 4) holds dimensions of tokens g and g + 8.
// Their values are one: it holds dimensions 8 g .. of each 64 of tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9.
#pragma once
#include "heads.cuh"
#include "pairs.cuh"

// words of eight numbers
constexpr int kWords = CACHE / 4;
// eights of a key that a lane holds, and slabs of 64 of a value
constexpr int kEights = WIDTH < 32 ? 1 : WIDTH / 32;
constexpr int kSlabs = WIDTH < 64 ? 1 : WIDTH / 64;
// a lane's dimensions of a key are one stretch where they then share a group's numbers, else an eight of each 32
constexpr bool kStretch = CACHE == 4 && WIDTH >= 32;
constexpr int kKeyGroups = kStretch && WIDTH > 128 ? WIDTH / 128 : 1;
// rounded numbers come halved as halves: the largest would be beyond them
constexpr float kHalving = CACHE == 16 ? 1.f : 2.f;
constexpr float kKeyHalving = CACHE == 4 ? 2.f : 1.f;

struct Keys {
  u32 words[2][kEights * kWords];
  // the scale; at 4 bits also the least number
  u32 numbers[2][kKeyGroups];
};

struct Values {
  u32 words[4][kSlabs][kWords];
  u32 numbers[4][kSlabs];
};

template <int N>
__device__ __forceinline__ void take_words(u32* to, const u8* from) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      const uint4 w = reinterpret_cast<const uint4*>(from)[i];
      to[4 * i] = w.x, to[4 * i + 1] = w.y, to[4 * i + 2] = w.z, to[4 * i + 3] = w.w;
    }
  } else if constexpr (N == 2) {
    const uint2 w = *reinterpret_cast<const uint2*>(from);
    to[0] = w.x, to[1] = w.y;
  } else {
    to[0] = *reinterpret_cast<const u32*>(from);
  }
}

// Token g + 8 n of the lane's two; nothing where `head` is null.
__device__ __forceinline__ void take_key(Keys& k, int n, const u8* head) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kEights * kWords; i++) k.words[n][i] = 0;
#pragma unroll
  for (int i = 0; i < kKeyGroups; i++) k.numbers[n][i] = 0;
  if (!head) return;
  if constexpr (kStretch) {
    take_words<kEights>(k.words[n], head + WIDTH / 8 * q);
#pragma unroll
    for (int i = 0; i < kKeyGroups; i++)
      k.numbers[n][i] = reinterpret_cast<const u32*>(head + WIDTH / 2)[WIDTH / 4 * q / kGroup + i];
  } else {
#pragma unroll
    for (int c = 0; c < kEights; c++)
      if (32 * c + 8 * q < WIDTH) take_words<kWords>(k.words[n] + c * kWords, head + (32 * c + 8 * q) * CACHE / 8);
    if (CACHE == 8) k.numbers[n][0] = *reinterpret_cast<const u16*>(head + WIDTH);
    if (CACHE == 4) k.numbers[n][0] = *reinterpret_cast<const u32*>(head + WIDTH / 2);
  }
}

// Token i of the lane's four.
__device__ __forceinline__ void take_value(Values& v, int i, const u8* head) {
  const int g = threadIdx.x % kWarp / 4;
#pragma unroll
  for (int s = 0; s < kSlabs; s++) {
    const int at = 64 * s + 8 * g;
#pragma unroll
    for (int w = 0; w < kWords; w++) v.words[i][s][w] = 0;
    v.numbers[i][s] = 0;
    if (!head || at >= WIDTH) continue;
    take_words<kWords>(v.words[i][s], head + at * CACHE / 8);
    if (CACHE == 8 && s == 0) v.numbers[i][0] = *reinterpret_cast<const u16*>(head + WIDTH);
    if (CACHE == 4) v.numbers[i][s] = reinterpret_cast<const u32*>(head + WIDTH / 2)[at / kGroup];
  }
}

// Which of the eight is half `which` of pair j.
__host__ __device__ constexpr int place_in_eight(int j, int which) { return CACHE == 4 ? j + 4 * which : 2 * j + which; }

// Eight numbers as four pairs of halves. 8 bits: the codes themselves; 4 bits: halved numbers.
__device__ __forceinline__ void pairs_of(const u32 (&words)[kWords], u32 numbers, u32 (&pairs)[4]) {
#if CACHE == 16
#pragma unroll
  for (int j = 0; j < 4; j++) pairs[j] = words[j];
#elif CACHE == 8
  // 1152 and the code: the byte is 128 more than it, as the low bits of 1024
#pragma unroll
  for (int j = 0; j < 4; j++)
    pairs[j] = pair_minus(__byte_perm(words[j / 2] ^ 0x80808080u, 0x64646464u, j % 2 ? 0x4342 : 0x4140), 0x64806480u);
#else
  const u32 scale = pair_times(__byte_perm(numbers, 0, 0x1010), 0x38003800u);
  const u32 least = pair_times(__byte_perm(numbers, 0, 0x3232), 0x38003800u);
#pragma unroll
  for (int j = 0; j < 4; j++)
    pairs[j] = pair_times_plus(pair_minus((words[0] >> 4 * j & 0x000f000fu) | 0x64006400u, 0x64006400u), scale, least);
#endif
}

// Where dimension `at` of a head lies in operand A of the scores: word of the lane's, and half of the word; `q` its lane.
struct Place {
  int step, q, word, half;
};

__device__ __forceinline__ Place place_in_queries(int at) {
  const int eight = kStretch ? at % (WIDTH / 4) / 8 : at / 32, e = at % 8;
  const int j = CACHE == 4 ? e % 4 : e / 2;
  return {2 * eight + j / 2, kStretch ? at / (WIDTH / 4) : at % 32 / 8, j % 2 * 2, CACHE == 4 ? e / 4 : e % 2};
}
