// Activations as halves. A token keeps its magnitude where halves hold it well, and is scaled by a power of two where
// they do not, so that nothing overflows.
#include "pieces.cuh"

#define THREADS 1024
// fours of a token that a thread keeps; longer tokens are read twice
#define KEPT 8
// a token whose largest magnitude lies from 2^-8 to 2^15 is not scaled
#define LEAST -8
#define MOST 14

__device__ __forceinline__ float magnitude(float4 v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

__device__ __forceinline__ float4 four(const float* x, int at, int columns, bool aligned) {
    if (aligned && at + 4 <= columns) return *(const float4*)(x + at);
    float v[4];
    for (int i = 0; i < 4; ++i) v[i] = at + i < columns ? x[at + i] : 0.0f;
    return make_float4(v[0], v[1], v[2], v[3]);
}

struct Place {
    u16* token;
    int block_step;
    float inverse;
    __device__ __forceinline__ void write(int at, float4 v) const {
        u16* to = token + (u64)(at / 32) * block_step + at % 32;
        *(uint2*)to = make_uint2(half2_of(v.x * inverse, v.y * inverse), half2_of(v.z * inverse, v.w * inverse));
    }
};

// x [tokens][stride] -> halves: column c of a token lies at c / 32 * block_step + token * token_step + c % 32, up to
// `padded` columns, zeros behind the last; scales [tokens] are what the halves are to be multiplied by.
extern "C" __global__ void __launch_bounds__(THREADS)
halve(const float* x, u64 stride, int columns, int padded, u16* halves, int block_step, int token_step, float* scales) {
    __shared__ float largest[THREADS / 32];
    int token = blockIdx.x;
    wait_for_inputs();
    let_next_begin();
    const float* from = x + token * stride;
    bool aligned = (u64)from % 16 == 0;
    float4 kept[KEPT];
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        int at = (i * THREADS + threadIdx.x) * 4;
        kept[i] = at < columns ? four(from, at, columns, aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i) most = fmaxf(most, magnitude(kept[i]));
    for (int at = (KEPT * THREADS + threadIdx.x) * 4; at < columns; at += THREADS * 4)
        most = fmaxf(most, magnitude(four(from, at, columns, aligned)));
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, step));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; ++i) most = fmaxf(most, largest[i]);
    int exponent = (int)(__float_as_uint(most) >> 23) - 127, by = 0;
    if (most > 0.0f && exponent < 128 && (exponent < LEAST || exponent > MOST)) by = max(exponent - MOST, -126);
    float inverse = __uint_as_float((u32)(127 - by) << 23);
    if (threadIdx.x == 0) scales[token] = __uint_as_float((u32)(127 + by) << 23);
    Place place{halves + (u64)token * token_step, block_step, inverse};
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        int at = (i * THREADS + threadIdx.x) * 4;
        if (at < padded) place.write(at, kept[i]);
    }
    for (int at = (KEPT * THREADS + threadIdx.x) * 4; at < padded; at += THREADS * 4)
        place.write(at, four(from, at, columns, aligned));
}

// out [tokens][columns] *= scales [tokens]; most are 1
extern "C" __global__ void __launch_bounds__(THREADS)
rescale(float* out, u64 stride, int columns, const float* scales) {
    float by = scales[blockIdx.x];
    if (by == 1.0f) return;
    for (int at = threadIdx.x; at < columns; at += THREADS) out[blockIdx.x * stride + at] *= by;
}
