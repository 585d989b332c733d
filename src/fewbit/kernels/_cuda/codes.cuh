// Codes in registers become halves. One thread's part of 32 rows x 32 columns is BITS registers: 16 pairs of codes, the
// first of a pair in the low 16 bits of its register, the second in the high 16. Where a pair lies is said by
// fewbit/kernels/_cuda_layout.py.
//
// A code is not converted: in the mantissa of a half whose exponent is 0, at bit `at`, it already is the number
// code * 2^(at - 24), which the matrix units take as it is. Pairs of one row share their `at`, so that their sum needs
// one factor.
#pragma once
#include "pieces.cuh"

// (a & mask) | rest
__device__ __forceinline__ u32 masked_or(u32 a, u32 mask, u32 rest) {
    return (a & mask) | rest;
}

__device__ constexpr u32 both(u32 h) { return h << 16 | h; }

template <int N, int AT>
__device__ __forceinline__ u32 field(u32 w) {
    return w & both(((1u << N) - 1) << AT);
}

// Pairs are numbered half of the 32 rows * 8 + product * 4 + pair of a product * 2 + row, row + 8. A thread's four rows
// are numbered half * 2 + (row, row + 8).
__device__ constexpr int pair_of(int four, int member) { return four / 2 * 8 + member * 2 + four % 2; }

// words[N] -> pairs[16]; the codes of row `four` are raised by 2^at(four)
template <int N>
struct Codes;

template <>
struct Codes<2> {
    static __device__ constexpr int at(int four) { return 2 * four; }
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 w = words[r], high = w >> 8;
            pairs[pair_of(0, r)] = field<2, 0>(w);
            pairs[pair_of(1, r)] = field<2, 2>(w);
            pairs[pair_of(2, r)] = field<2, 4>(w);
            pairs[pair_of(3, r)] = field<2, 6>(w);
            pairs[pair_of(0, 2 + r)] = field<2, 0>(high);
            pairs[pair_of(1, 2 + r)] = field<2, 2>(high);
            pairs[pair_of(2, 2 + r)] = field<2, 4>(high);
            pairs[pair_of(3, 2 + r)] = field<2, 6>(high);
        }
    }
};

template <>
struct Codes<3> {
    static __device__ constexpr int at(int four) { return four == 0 ? 0 : four == 3 ? 6 : 3; }
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
        u32 last = 0;
#pragma unroll
        for (int r = 0; r < 3; ++r) {
            u32 w = words[r];
            pairs[pair_of(0, r)] = field<3, 0>(w);
            pairs[pair_of(1, r)] = field<3, 3>(w);
            pairs[pair_of(3, r)] = field<3, 6>(w);
            pairs[pair_of(2, r)] = field<3, 3>(w >> 9);
            // the bits at 9: once as they fall, twice raised
            if (r == 0) pairs[pair_of(0, 3)] = field<3, 0>(w >> 9);
            if (r == 1) pairs[pair_of(1, 3)] = field<3, 3>(w >> 6);
            if (r == 2) pairs[pair_of(2, 3)] = field<3, 3>(w >> 6);
            // the sixteenth pair lies in the bits that five fields leave
            last = masked_or(w >> (9 - r), both(64u << r), last);
        }
        pairs[pair_of(3, 3)] = last;
    }
};

template <>
struct Codes<4> {
    static __device__ constexpr int at(int four) { return four % 2 * 4; }
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            u32 w = words[r], high = w >> 8;
            pairs[pair_of(0, r)] = field<4, 0>(w);
            pairs[pair_of(1, r)] = field<4, 4>(w);
            pairs[pair_of(2, r)] = field<4, 0>(high);
            pairs[pair_of(3, r)] = field<4, 4>(high);
        }
    }
};

template <>
struct Codes<5> {
    static __device__ constexpr int at(int four) { return four / 2 * 5; }
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
        u32 last = 0;
#pragma unroll
        for (int r = 0; r < 5; ++r) {
            u32 w = words[r];
            // rows 0 and 1 have what lies at 0, and three of those at 10; rows 2 and 3 the rest
            pairs[pair_of(r / 4, r % 4)] = field<5, 0>(w);
            pairs[pair_of(2 + r / 4, r % 4)] = field<5, 5>(w);
            if (r < 3) pairs[pair_of(1, 1 + r)] = field<5, 0>(w >> 10);
            if (r >= 3) pairs[pair_of(3, r - 2)] = field<5, 5>(w >> 5);
            last = masked_or(w >> (10 - r), both(32u << r), last);
        }
        pairs[pair_of(3, 3)] = last;
    }
};

template <>
struct Codes<6> {
    static __device__ constexpr int at(int) { return 0; }
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
        // four low bits of each code in the first four registers, two high ones in the last two
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            u32 two = words[4 + i / 8];
            int at = 2 * (i % 8);
            two = at >= 4 ? two >> (at - 4) : two << (4 - at);
            pairs[i] = masked_or(two, both(48), words[i / 4] >> (i % 4 * 4) & both(15));
        }
    }
};

template <>
struct Codes<8> {
    static __device__ constexpr int at(int) { return 0; }
    static __device__ __forceinline__ void unpack(const u32* words, u32* pairs) {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            pairs[2 * r + 0] = field<8, 0>(words[r]);
            pairs[2 * r + 1] = __byte_perm(words[r], 0, 0x4341);
        }
    }
};

// what a sum over codes of row `four` is to be multiplied by
template <int N>
__device__ __forceinline__ float factor(int four) {
    return __uint_as_float((u32)(127 + 24 - Codes<N>::at(four)) << 23);
}
