// AVX-512 with VNNI: vpdpbusd adds four products of unsigned and signed bytes to a 32-bit sum, without saturation.
#include <immintrin.h>

#include "kernels.h"
#include "numbers.h"

namespace fewbit {
namespace {

struct Isa {
    static constexpr int lanes = 16;
    static constexpr int tokens = kTile;
    using Floats = __m512;
    using Sum = __m512i;
    using Line = __m512i;
    typedef int32_t Quad __attribute__((may_alias, aligned(1)));
    template <int Bits>
    struct Codes {
        __m512i w;
    };

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats splat(float x) { return _mm512_set1_ps(x); }
    static Floats load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, Floats x) { _mm512_storeu_ps(p, x); }
    static Floats load_scales(const void *base, int64_t first, Scalar type) {
        if (type == Scalar::f32) return _mm512_loadu_ps(static_cast<const float *>(base) + first);
        const auto *halves = reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(base) + first);
        const __m256i h = _mm256_loadu_si256(halves);
        if (type == Scalar::f16) return _mm512_cvtph_ps(h);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
    static Floats load_bytes(const uint8_t *p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
    }
    static Floats load_signed(const int8_t *p) { return load_bytes(p); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

    static Line load_line(const uint8_t *p) { return _mm512_loadu_si512(p); }
    static void store_line(uint8_t *p, Line x) { _mm512_storeu_si512(p, x); }
    template <int N>
    static Line left(Line x) {
        return _mm512_slli_epi16(x, N);
    }
    template <int N>
    static Line right(Line x) {
        return _mm512_srli_epi16(x, N);
    }
    template <int M>
    static Line masked(Line x) {
        return _mm512_and_si512(x, _mm512_set1_epi8(M));
    }
    // one instruction: a | (b & c)
    template <int M>
    static Line merged(Line low, Line x) {
        return _mm512_ternarylogic_epi32(low, x, _mm512_set1_epi8(M), 0xf8);
    }
    static Line load_table(const uint8_t *p) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static Line lookup(Line table, Line line) { return _mm512_shuffle_epi8(table, line); }
    template <int Bits>
    static Codes<Bits> codes(Line line) {
        return {line};
    }
    template <int Bits>
    static Sum begin(int32_t start) {
        return _mm512_set1_epi32(start);
    }
    template <int Bits>
    static Sum dot(Sum sum, const Codes<Bits> &a, const Codes<Bits> &b, const int8_t *x) {
        // loads of this type fold into the instruction; through memcpy GCC takes each quad by a general register
        const Quad *quads = reinterpret_cast<const Quad *>(x);
        sum = _mm512_dpbusd_epi32(sum, a.w, _mm512_set1_epi32(quads[0]));
        return _mm512_dpbusd_epi32(sum, b.w, _mm512_set1_epi32(quads[1]));
    }
    template <int Bits>
    static Floats finish(Sum sum, int32_t) {
        return _mm512_cvtepi32_ps(sum);
    }

    typedef float Vec __attribute__((vector_size(64)));
    typedef int32_t IntVec __attribute__((vector_size(64)));
    static float add_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
    static float half(uint16_t h) { return _cvtsh_ss(h); }
    static Vec load_half(const uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static Vec load_bytes(const int8_t *p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
    }
};

}  // namespace
}  // namespace fewbit

#include "activations.inl"
#include "ceilings.inl"
#include "planes.inl"
#include "gemm.inl"
#include "ops.inl"

namespace fewbit {
const KernelTable kAvx512Kernels = {"avx512vnni", 0, quantize, product, unpack, rms_norm, gated,
                                     attend, read_bits, dots};
}  // namespace fewbit
