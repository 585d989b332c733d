// Sums and maxima over warps and blocks, and where activations lie as the products take them.
#pragma once
#include "pieces.cuh"

constexpr int kWarp = 32;

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
