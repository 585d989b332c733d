// Stands in for pieces.cuh and units.cuh, so that product.cu and many.cu run on a CPU: a thread for each of a block's threads, the
// matrix unit's fragments as the PTX manual gives them.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct Words { u32 x, y, z, w; };
struct Index { int x, y, z; };
using std::min;

inline thread_local Index threadIdx, blockIdx;
inline Index gridDim;
// a block's shared memory
alignas(16) inline char poisoned[1 << 20];

struct Warp {
    std::barrier<> together{32};
    u32 a[32][4], b[32][2];
};
struct Block {
    explicit Block(int warps) : together(32 * warps), warps(warps) {}
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
inline float float_of_half(u16 h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float size = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
    return h >> 15 ? -size : size;
}
inline u16 half_of(float f) { _Float16 h = (_Float16)f; u16 u; memcpy(&u, &h, 2); return u; }
inline u32 add_halves(u32 a, u32 b) {
    u32 low = half_of(float_of_half((u16)a) + float_of_half((u16)b));
    return low | (u32)half_of(float_of_half((u16)(a >> 16)) + float_of_half((u16)(b >> 16))) << 16;
}
// blocks run one after the other
inline void __threadfence() {}
inline u32 atomicAdd(u32* p, u32 by) { u32 before = *p; *p += by; return before; }
inline float4 from_others(const float4* p) { return *p; }
inline void wait_for_inputs() {}
inline void let_next_begin() {}

// Copies land when they are waited for, not before.
struct Copy { char* to; const char* from; };
inline thread_local std::vector<std::vector<Copy>> groups;
inline thread_local std::vector<Copy> open_group;
// where copies may read, and whether one read elsewhere
struct Range { const char* from; u64 size; };
inline std::vector<Range> readable;
inline bool strayed;
inline void check(const char* from) {
    for (const Range& r : readable)
        if (from >= r.from && from + 16 <= r.from + r.size) return;
    strayed = true;
}
inline void copy(char* to, const char* from) { check(from); open_group.push_back({to, from}); }
struct CopyLater { void operator()(char* to, const char* from) const { copy(to, from); } };
struct CopyNow { void operator()(char* to, const char* from) const { check(from); memcpy(to, from, 16); } };
inline void copies_end() { groups.push_back(std::move(open_group)); open_group.clear(); }
template <int LEFT>
void wait_for_copies() {
    while (groups.size() > LEFT) {
        for (const Copy& c : groups.front()) memcpy(c.to, c.from, 16);
        groups.erase(groups.begin());
    }
}

inline Words shared_by_all(const void* p) { Words v; memcpy(&v, p, 16); return v; }

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
