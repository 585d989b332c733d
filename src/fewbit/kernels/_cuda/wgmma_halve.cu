// Activations as halves in the order that wgmma.cu wants (said there). A token keeps its magnitude where halves hold it
// well, and is scaled by a power of two where they do not, so that nothing overflows.
#include "pieces.cuh"

#define THREADS 1024
// words of 8 halves of a token that a thread keeps; what lies beyond is read again, from a cache
#define KEPT 1
// a token whose largest magnitude lies from 2^-8 to 2^15 is not scaled
#define LEAST -8
#define MOST 14

// Word `member` of 32 columns: the pairs 4 * thread + member of the four threads.
struct Word {
    float2 v[4];

    __device__ __forceinline__ void load(const float* x, int word, int columns, bool aligned) {
        int at = word / 4 * 32 + word % 4 * 2;
#pragma unroll
        for (int t = 0; t < 4; ++t, at += 8) {
            if (aligned && at + 2 <= columns) v[t] = *(const float2*)(x + at);
            else v[t] = make_float2(at < columns ? x[at] : 0.0f, at + 1 < columns ? x[at + 1] : 0.0f);
        }
    }
    __device__ __forceinline__ float magnitude() const {
        float most = 0.0f;
#pragma unroll
        for (int t = 0; t < 4; ++t) most = fmaxf(most, fmaxf(fabsf(v[t].x), fabsf(v[t].y)));
        return most;
    }
    __device__ __forceinline__ void store(uint4* halves, int word, int token, int padded, float by) const {
        u32 h[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) h[t] = half2_of(v[t].x * by, v[t].y * by);
        halves[((u64)(word / 8) * padded + token) * 8 + (word % 8 ^ token % 8)] = make_uint4(h[0], h[1], h[2], h[3]);
    }
};

// x [tokens][stride] -> halves of `words` words a token, zeros behind the last column; scales [tokens] are what the
// halves are to be multiplied by. padded: tokens filled up to eights.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
halve_many(const float* x, u64 stride, int columns, int words, uint4* halves, int padded, float* scales) {
    __shared__ float largest[THREADS / 32];
    int token = blockIdx.x;
    wait_for_inputs();
    let_next_begin();
    const float* from = x + token * stride;
    bool aligned = (u64)from % 8 == 0;
    Word kept[KEPT];
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
        if (i * THREADS + threadIdx.x < words) kept[i].load(from, i * THREADS + threadIdx.x, columns, aligned);
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
        if (i * THREADS + threadIdx.x < words) most = fmaxf(most, kept[i].magnitude());
    for (int word = KEPT * THREADS + threadIdx.x; word < words; word += THREADS) {
        Word w;
        w.load(from, word, columns, aligned);
        most = fmaxf(most, w.magnitude());
    }
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, step));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    __syncthreads();
    most = largest[threadIdx.x % 32];
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, step));
    int exponent = (int)(__float_as_uint(most) >> 23) - 127, by = 0;
    if (most > 0.0f && exponent < 128 && (exponent < LEAST || exponent > MOST)) by = max(exponent - MOST, -126);
    float inverse = __uint_as_float((u32)(127 - by) << 23);
    if (threadIdx.x == 0) scales[token] = __uint_as_float((u32)(127 + by) << 23);
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
        if (i * THREADS + threadIdx.x < words) kept[i].store(halves, i * THREADS + threadIdx.x, token, padded, inverse);
    for (int word = KEPT * THREADS + threadIdx.x; word < words; word += THREADS) {
        Word w;
        w.load(from, word, columns, aligned);
        w.store(halves, word, token, padded, inverse);
    }
}

// Halves [columns / 32][tokens][32] to the same order; `count` words in all.
extern "C" __global__ void __launch_bounds__(256)
reorder(const u32* from, uint4* to, int tokens, int padded, u64 count) {
    wait_for_inputs();
    let_next_begin();
    u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= count) return;
    int member = at % 4, token = (int)(at / 4 % tokens), word = (int)(at / 4 / tokens) * 4 + member;
    const u32* pairs = from + (at / 4) * 16 + member;
    to[((u64)(word / 8) * padded + token) * 8 + (word % 8 ^ token % 8)] = make_uint4(pairs[0], pairs[4], pairs[8], pairs[12]);
}
