// AVX2 with FMA and F16C: vpmaddubsw multiplies unsigned by signed bytes and adds pairs in 16 bits.
#include <immintrin.h>

#include "kernels.h"
#include "numbers.h"

namespace fewbit {
namespace {

// Codes of 4 bits: 8 products of at most 15 * 127, twice, stay below 2^15, so a whole block is summed in 16 bits.
// Codes of 6 bits: 2 products of at most 63 * 127, twice, do.
// Codes of 8 bits are moved to -128..127 and multiplied as |code| times x with the code's sign:
// 2 * 128 * 127 < 2^15, where the unsigned code (255) would saturate.
constexpr int32_t kBias8 = 128;

struct Isa {
    static constexpr int lanes = 8;
    static constexpr int tokens = kTile;
    using Floats = __m256;
    using Sum = __m256i;
    using Line = __m256i;
    template <int Bits>
    struct Codes {
        __m256i w;
    };

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats splat(float x) { return _mm256_set1_ps(x); }
    static Floats load(const float *p) { return _mm256_loadu_ps(p); }
    static void store(float *p, Floats x) { _mm256_storeu_ps(p, x); }
    static Floats load_scales(const void *base, int64_t first, Scalar type) {
        if (type == Scalar::f32) return _mm256_loadu_ps(static_cast<const float *>(base) + first);
        const auto *halves = reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(base) + first);
        const __m128i h = _mm_loadu_si128(halves);
        if (type == Scalar::f16) return _mm256_cvtph_ps(h);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    static Floats load_bytes(const uint8_t *p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
    }
    static Floats load_signed(const int8_t *p) { return load_bytes(p); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

    static Line load_line(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static void store_line(uint8_t *p, Line x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x); }
    template <int N>
    static Line left(Line x) {
        return _mm256_slli_epi16(x, N);
    }
    template <int N>
    static Line right(Line x) {
        return _mm256_srli_epi16(x, N);
    }
    template <int M>
    static Line masked(Line x) {
        return _mm256_and_si256(x, _mm256_set1_epi8(M));
    }
    template <int M>
    static Line merged(Line low, Line x) {
        return _mm256_or_si256(low, masked<M>(x));
    }
    static Line load_table(const uint8_t *p) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static Line lookup(Line table, Line line) { return _mm256_shuffle_epi8(table, line); }
    template <int Bits>
    static Codes<Bits> codes(Line line) {
        return {line};
    }
    template <int Bits>
    static Sum begin(int32_t) {
        return _mm256_setzero_si256();
    }
    template <int Bits>
    static Sum dot(Sum sum, const Codes<Bits> &a, const Codes<Bits> &b, const int8_t *x) {
        const __m256i pairs =
            _mm256_add_epi16(_mm256_maddubs_epi16(a.w, broadcast(x)), _mm256_maddubs_epi16(b.w, broadcast(x + 4)));
        if constexpr (Bits <= 4) return _mm256_add_epi16(sum, pairs);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    template <int Bits>
    static Floats finish(Sum sum, int32_t start) {
        if constexpr (Bits <= 4) sum = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
        return _mm256_cvtepi32_ps(_mm256_add_epi32(sum, _mm256_set1_epi32(start)));
    }
    static __m256i broadcast(const int8_t *x) {
        int32_t quad;
        memcpy(&quad, x, sizeof quad);
        return _mm256_set1_epi32(quad);
    }

    typedef float Vec __attribute__((vector_size(32)));
    typedef int32_t IntVec __attribute__((vector_size(32)));
    static float add_lanes(Vec v) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static float half(uint16_t h) { return _cvtsh_ss(h); }
    static Vec load_half(const uint16_t *p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static Vec load_bytes(const int8_t *p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
    }
};

template <>
struct Isa::Codes<8> {
    __m256i w, magnitude;
};

template <>
inline Isa::Codes<8> Isa::codes<8>(Line line) {
    const __m256i w = _mm256_xor_si256(line, _mm256_set1_epi8(-128));
    return {w, _mm256_abs_epi8(w)};
}

template <>
inline Isa::Sum Isa::dot<8>(Sum sum, const Codes<8> &a, const Codes<8> &b, const int8_t *x) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i p = _mm256_maddubs_epi16(a.magnitude, _mm256_sign_epi8(broadcast(x), a.w));
    const __m256i q = _mm256_maddubs_epi16(b.magnitude, _mm256_sign_epi8(broadcast(x + 4), b.w));
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(p, ones), _mm256_madd_epi16(q, ones)));
}

}  // namespace
}  // namespace fewbit

#include "activations.inl"
#include "ceilings.inl"
#include "planes.inl"
#include "gemm.inl"
#include "ops.inl"

namespace fewbit {
const KernelTable kAvx2Kernels = {"avx2", kBias8, quantize, product, unpack, rms_norm, gated,
                                     attend, read_bits, dots};
}  // namespace fewbit
