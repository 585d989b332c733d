// Stands in for pieces.cuh, pairs.cuh and units.cuh under steps.cu, attend.cu and append.cu.
#pragma once
#include "threads_on_cpu.h"

#define __host__
// one block runs at a time
#define __shared__ static
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))

struct float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

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
template <class T>
T __ldcg(const T* at) { return *at; }

inline u32 __float_as_uint(float f) { u32 u; memcpy(&u, &f, 4); return u; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline u32 half2_of(float low, float high) { return half_of(low) | (u32)half_of(high) << 16; }
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
