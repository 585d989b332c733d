// Packed weights as they lie in memory: tiles of 32 rows x 128 columns, [row block][tile][BITS][thread] of 16 bytes, and
// for each of a tile's groups [8][4] scales, those of rows r, r + 8, r + 16, r + 24 side by side.
//
// Defined by whoever compiles: BITS; SPAN (columns to a scale: 32, 64, 128, or 0 for the row); SCALES (0 float, 1 half,
// 2 bfloat16); SHIFTS (0 none, 1 a byte: w = scale * (code - 2^(BITS-1) + shift), 2 a float: w = scale * (code -
// 2^(BITS-1)) + shift).
#pragma once
#include "codes.cuh"

#define GROUPS (SPAN ? 128 / SPAN : 1)
#define CENTRE ((float)(1 << (BITS - 1)))
// bytes of a tile's codes, of a group's scales and shifts
#define CODE_BYTES (BITS * 512)
#define SCALE_BYTES (SCALES ? 64 : 128)
#define SHIFT_BYTES (SHIFTS == 0 ? 0 : SHIFTS == 1 ? 32 : 128)

struct Weights {
    const char* codes;
    const char* scales;
    const char* shifts;
};

// Scales (or shifts) of a thread's four rows, from anywhere; `at` counts fours.
struct Floats {
    float v[4];
    __device__ __forceinline__ void load(const char* p, int at) {
        float4 f = ((const float4*)p)[at];
        v[0] = f.x; v[1] = f.y; v[2] = f.z; v[3] = f.w;
    }
    __device__ __forceinline__ float get(int i) const { return v[i]; }
};
struct Shorts {
    u32 v[2];
    __device__ __forceinline__ void load(const char* p, int at) {
        uint2 u = ((const uint2*)p)[at];
        v[0] = u.x; v[1] = u.y;
    }
    __device__ __forceinline__ float get(int i) const {
        if (SCALES == 1) return float_of_half((u16)(v[i / 2] >> (i % 2 * 16)));
        return __uint_as_float(i % 2 ? v[i / 2] & 0xFFFF0000u : v[i / 2] << 16);
    }
};
struct Bytes {
    u32 v;
    __device__ __forceinline__ void load(const char* p, int at) { v = ((const u32*)p)[at]; }
    __device__ __forceinline__ float get(int i) const { return (float)(signed char)(v >> (8 * i)); }
};
struct None {
    __device__ __forceinline__ void load(const char*, int) {}
    __device__ __forceinline__ float get(int) const { return 0.0f; }
};

#if SCALES == 0
typedef Floats Scale;
#else
typedef Shorts Scale;
#endif
#if SHIFTS == 0
typedef None Shift;
#elif SHIFTS == 1
typedef Bytes Shift;
#else
typedef Floats Shift;
#endif
