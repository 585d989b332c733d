// Packed weights as they lie in memory: tiles of 32 rows x 128 columns, [row block][tile][BITS][thread] of 16 bytes, and
// for each of a tile's groups [8][4] scales, those of rows r, r + 8, r + 16, r + 24 side by side.
//
// Defined by whoever compiles: BITS; SPAN (columns to a scale: 32, 64, 128, or 0 for the row); SCALES (0 float, 1 half,
// 2 bfloat16); SHIFTS (0 none, 1 a byte: w = scale * (code - 2^(BITS-1) + shift), 2 a float: w = scale * (code -
// 2^(BITS-1)) + shift).
#pragma once
#include "codes.cuh"

#define GROUPS (SPAN ? 128 / SPAN : 1)

struct Words { u32 x, y, z, w; };

// weights are read once: they need no place in L1
__device__ __forceinline__ Words streamed(const void* p) {
    Words v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ Words shared_by_all(const void* p) {
    Words v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Scales (or shifts) of a thread's four rows: row, row + 8, row + 16, row + 24.
template <int KIND>
struct Four;
template <>
struct Four<0> {
    u32 v[4];
    __device__ __forceinline__ void load(const void* p, int at) {
        Words w = streamed((const char*)p + 16 * (u64)at);
        v[0] = w.x; v[1] = w.y; v[2] = w.z; v[3] = w.w;
    }
    __device__ __forceinline__ float get(int i) const { return __uint_as_float(v[i]); }
};
template <>
struct Four<1> {
    u32 v[2];
    __device__ __forceinline__ void load(const void* p, int at) {
        asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"((const char*)p + 8 * (u64)at));
    }
    __device__ __forceinline__ float get(int i) const { return float_of_half((u16)(v[i / 2] >> (i % 2 * 16))); }
};
template <>
struct Four<2> : Four<1> {
    __device__ __forceinline__ float get(int i) const {
        return __uint_as_float(i % 2 ? v[i / 2] & 0xFFFF0000u : v[i / 2] << 16);
    }
};
// four signed bytes
template <>
struct Four<3> {
    u32 v;
    __device__ __forceinline__ void load(const void* p, int at) {
        asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"((const char*)p + 4 * (u64)at));
    }
    __device__ __forceinline__ float get(int i) const { return (float)(signed char)(v >> (8 * i)); }
};
struct None {
    __device__ __forceinline__ void load(const void*, int) {}
    __device__ __forceinline__ float get(int) const { return 0.0f; }
};

#if SHIFTS == 0
typedef None Shift;
#elif SHIFTS == 1
typedef Four<3> Shift;
#else
typedef Four<0> Shift;
#endif

// What one warp needs of a tile, on its way from memory.
struct Tile {
    Words words[BITS];
    Four<SCALES> scales[GROUPS];
    Shift shifts[GROUPS];
};

struct Weights {
    const char* codes;
    const void* scales;
    const void* shifts;
};

// tile `at` of all: row block * tiles in a row + tile
__device__ __forceinline__ void load(Tile& tile, const Weights& w, u64 at, int lane) {
    const char* p = w.codes + (at * BITS * 32 + lane) * 16;
#pragma unroll
    for (int c = 0; c < BITS; ++c) tile.words[c] = streamed(p + c * 512);
    if (SPAN) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            int four = ((int)at * GROUPS + g) * 8 + lane / 4;
            tile.scales[g].load(w.scales, four);
            tile.shifts[g].load(w.shifts, four);
        }
    }
}
