// Stands in for pieces.cuh, pairs.cuh and units.cuh, so that kernels run on a CPU: a thread for each of a block's threads, blocks one by one.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
// one block runs at a time
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
using std::max;
using std::min;

struct Index { int x, y, z; };
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
inline float __shfl_xor_sync(u32, float x, int mask) {
    Warp& warp = warp_now();
    warp.given[threadIdx.x % 32] = x;
    warp.together.arrive_and_wait();
    float found = warp.given[threadIdx.x % 32 ^ mask];
    warp.together.arrive_and_wait();
    return found;
}
inline float __shfl_sync(u32, float x, int lane) {
    Warp& warp = warp_now();
    warp.given[threadIdx.x % 32] = x;
    warp.together.arrive_and_wait();
    float found = warp.given[lane];
    warp.together.arrive_and_wait();
    return found;
}
inline bool __any_sync(u32, bool one) {
    float sum = one;
    for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(~0u, sum, m);
    return sum > 0;
}
inline void __threadfence() {}
inline u32 atomicAdd(u32* at, u32 more) { return __atomic_fetch_add(at, more, __ATOMIC_SEQ_CST); }
template <class T>
T __ldcg(const T* at) { return *at; }

inline u32 __float_as_uint(float f) { u32 u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(u32 u) { float f; memcpy(&f, &u, 4); return f; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float float_of_half(u16 h) {
    _Float16 f;
    memcpy(&f, &h, 2);
    return f;
}
// to nearest, ties to even
inline u16 half_of(float f) {
    _Float16 h = (_Float16)f;
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}
inline u32 half2_of(float low, float high) { return half_of(low) | (u32)half_of(high) << 16; }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        u32 n = selector >> 4 * i & 7;
        result |= ((n < 4 ? a >> 8 * n : b >> 8 * (n - 4)) & 255) << 8 * i;
    }
    return result;
}
template <class Make>
u32 each_half(Make make, u32 a, u32 b, u32 c = 0) {
    u32 found = 0;
    for (int i = 0; i < 32; i += 16)
        found |= (u32)half_of((float)make(float_of_half(a >> i), float_of_half(b >> i), float_of_half(c >> i))) << i;
    return found;
}
inline u32 pair_minus(u32 a, u32 b) { return each_half([](double x, double y, double) { return x - y; }, a, b); }
inline u32 pair_times(u32 a, u32 b) { return each_half([](double x, double y, double) { return x * y; }, a, b); }
inline u32 pair_times_plus(u32 a, u32 b, u32 c) {
    return each_half([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
// c += a b; a 16 x 16, b 16 x 8, their fragments as the PTX manual gives them
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
inline void wait_for_inputs() {}
inline void let_next_begin() {}

// a kernel's whole grid
template <class Call>
void launch(Index grid, int threads, Call call) {
    gridDim = grid;
    blockDim = {threads, 1, 1};
    for (int z = 0; z < grid.z; ++z)
        for (int y = 0; y < grid.y; ++y)
            for (int x = 0; x < grid.x; ++x) {
                Block block(threads);
                block_now = &block;
                std::vector<std::thread> all;
                for (int t = 0; t < threads; ++t)
                    all.emplace_back([=] {
                        threadIdx = {t, 0, 0};
                        blockIdx = {x, y, z};
                        call();
                    });
                for (std::thread& one : all) one.join();
            }
}
