// For prompts, what torch's attention wants before it.
#include "heads.cuh"

// Queries, rotated, as halves [T, heads, WIDTH]; keys, rotated, and values to the cache. One block a token.
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
