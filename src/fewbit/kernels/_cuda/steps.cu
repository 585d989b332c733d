// Norms and gated activations, between the products of a decoding step. Nothing here needs more than sm_80.
#include "warps.cuh"

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

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
