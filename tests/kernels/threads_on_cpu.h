// What every stand-in for a card shares, so that kernels run on a CPU: a thread for each of a block's threads, blocks one
// by one, the matrix unit's fragments as the PTX manual gives them.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct Index { int x, y, z; };
using std::max;
using std::min;

inline thread_local Index threadIdx, blockIdx;
inline Index gridDim, blockDim;

struct Warp {
    std::barrier<> together{32};
    float given[32];
    u32 a[32][4], b[32][2];
};
struct Block {
    explicit Block(int threads) : together(threads), warps(threads / 32) {}
    std::barrier<> together;
    std::vector<Warp> warps;
};
inline Block* block_now;
inline Warp& warp_now() { return block_now->warps[threadIdx.x / 32]; }
inline void __syncthreads() { block_now->together.arrive_and_wait(); }
inline void __syncwarp() { warp_now().together.arrive_and_wait(); }

inline float __uint_as_float(u32 u) { float f; memcpy(&f, &u, 4); return f; }
inline float __expf(float x) { return std::exp(x); }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        u32 n = selector >> 4 * i & 7;
        result |= ((n < 4 ? a >> 8 * n : b >> 8 * (n - 4)) & 255) << 8 * i;
    }
    return result;
}
inline float float_of_half(u16 h) { _Float16 f; memcpy(&f, &h, 2); return f; }
// to nearest, ties to even
inline u16 half_of(float f) { _Float16 h = (_Float16)f; u16 u; memcpy(&u, &h, 2); return u; }

// blocks run one after the other
inline void __threadfence() {}
inline u32 atomicAdd(u32* at, u32 more) { return __atomic_fetch_add(at, more, __ATOMIC_SEQ_CST); }
inline void wait_for_inputs() {}
inline void let_next_begin() {}

// c += a b; a 16 x 16, b 16 x 8
inline void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    Warp& warp = warp_now();
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) warp.a[lane][i] = a[i];
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    warp.together.arrive_and_wait();
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            u32 left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], right = warp.b[column * 4 + k % 8 / 2][k / 8];
            c[i] += float_of_half((u16)(left >> (k % 2 * 16))) * float_of_half((u16)(right >> (k % 2 * 16)));
        }
    }
    warp.together.arrive_and_wait();
}
