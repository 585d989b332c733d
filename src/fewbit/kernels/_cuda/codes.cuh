// Codes in registers become halves. One thread's part of 32 rows x 32 columns is BITS registers: 16 pairs of codes, the
// first of a pair in the low 16 bits of its register, the second in the high 16. Where a pair lies is said by
// fewbit/kernels/_cuda_layout.py, and nowhere else.
#pragma once
#include "pieces.cuh"

// (a & mask) | rest
__device__ __forceinline__ u32 masked_or(u32 a, u32 mask, u32 rest) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(rest));
    return r;
}

__device__ __forceinline__ u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// An integer below 2048 as a half, at compile time.
__device__ constexpr u32 half_bits(int value) {
    if (value == 0) return 0;
    int top = 0;
    while ((value >> (top + 1)) != 0) ++top;
    return (u32)((top + 15) << 10) | ((u32)(value << (10 - top)) & 0x3FF);
}
__device__ constexpr u32 both(u32 h) { return h << 16 | h; }

// 1024.0 has its last bit at 1: a code or'ed in at bit `at` makes 1024 + code * 2^at
constexpr u32 MAGIC = 0x64006400;

// (1024 + code * 2^at) -> code - ZERO, exactly
template <int AT, int ZERO>
__device__ __forceinline__ u32 centred(u32 raised) {
    constexpr u32 factor = both((u32)(15 - AT) << 10);
    constexpr u32 less = both(half_bits((1024 >> AT) + ZERO) | 0x8000);
    return fma_half2(raised, factor, less);
}

template <int N, int AT>
__device__ __forceinline__ u32 field(u32 w) {
    return centred<AT, (1 << (N - 1))>(masked_or(w, both(((1u << N) - 1) << AT), MAGIC));
}

// words[N] -> pairs[16], each code less 2^(N-1)
template <int N>
struct Codes;

template <>
struct Codes<2> {
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 w = words[r], high = w >> 8;
            pairs[8 * r + 0] = field<2, 0>(w);
            pairs[8 * r + 1] = field<2, 2>(w);
            pairs[8 * r + 2] = field<2, 4>(w);
            pairs[8 * r + 3] = field<2, 6>(w);
            pairs[8 * r + 4] = field<2, 0>(high);
            pairs[8 * r + 5] = field<2, 2>(high);
            pairs[8 * r + 6] = field<2, 4>(high);
            pairs[8 * r + 7] = field<2, 6>(high);
        }
    }
};

template <>
struct Codes<3> {
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
        u32 last = MAGIC;
#pragma unroll
        for (int r = 0; r < 3; ++r) {
            u32 w = words[r], high = w >> 9;
            pairs[5 * r + 0] = field<3, 0>(w);
            pairs[5 * r + 1] = field<3, 3>(w);
            pairs[5 * r + 2] = field<3, 6>(w);
            pairs[5 * r + 3] = field<3, 0>(high);
            pairs[5 * r + 4] = field<3, 3>(high);
            // the sixteenth pair lies in the bits that five fields leave
            last = masked_or(w >> (15 - r), both(1u << r), last);
        }
        pairs[15] = centred<0, 4>(last);
    }
};

template <>
struct Codes<4> {
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            u32 w = words[r], high = w >> 8;
            pairs[4 * r + 0] = field<4, 0>(w);
            pairs[4 * r + 1] = field<4, 4>(w);
            pairs[4 * r + 2] = field<4, 0>(high);
            pairs[4 * r + 3] = field<4, 4>(high);
        }
    }
};

template <>
struct Codes<5> {
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
        u32 last = MAGIC;
#pragma unroll
        for (int r = 0; r < 5; ++r) {
            u32 w = words[r];
            pairs[3 * r + 0] = field<5, 0>(w);
            pairs[3 * r + 1] = field<5, 5>(w);
            pairs[3 * r + 2] = field<5, 0>(w >> 10);
            last = masked_or(w >> (15 - r), both(1u << r), last);
        }
        pairs[15] = centred<0, 16>(last);
    }
};

template <>
struct Codes<6> {
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
        // four low bits of each code in the first four registers, two high ones in the last two
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int pair = 4 * r + i;
                u32 low = masked_or(words[r] >> (4 * i), both(15), MAGIC), two = words[4 + pair / 8];
                int at = 2 * (pair % 8);
                two = at >= 4 ? two >> (at - 4) : two << (4 - at);
                pairs[pair] = centred<0, 32>(masked_or(two, both(48), low));
            }
        }
    }
};

template <>
struct Codes<8> {
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            // bytes 0 and 2, then 1 and 3, each below 0x64
            pairs[2 * r + 0] = centred<0, 128>(__byte_perm(words[r], MAGIC, 0x5250));
            pairs[2 * r + 1] = centred<0, 128>(__byte_perm(words[r], MAGIC, 0x5351));
        }
    }
};
