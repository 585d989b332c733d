// AVX-512 with VNNI: vpdpbusd adds four products of unsigned and signed bytes to a 32-bit sum, without saturation.
#include <immintrin.h>

#include "kernels.h"
#include "numbers.h"

namespace fewbit {
namespace {

struct Isa {
    static constexpr int lanes = 16;
    using Floats = __m512;
    using Sum = __m512i;
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
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

    static void load(const uint8_t *block, int, int pair, Codes<4> &a, Codes<4> &b) {
        const __m512i low = _mm512_set1_epi8(15);
        const __m512i line = _mm512_loadu_si512(block + pair * 64);
        a.w = _mm512_and_si512(line, low);
        b.w = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
    }
    static void load(const uint8_t *block, int, int pair, Codes<8> &a, Codes<8> &b) {
        a.w = _mm512_loadu_si512(block + pair * 128);
        b.w = _mm512_loadu_si512(block + pair * 128 + 64);
    }
    template <int Bits>
    static Sum begin(int32_t start) {
        return _mm512_set1_epi32(start);
    }
    template <int Bits>
    static Sum dot(Sum sum, const Codes<Bits> &codes, const int8_t *x) {
        int32_t quad;
        memcpy(&quad, x, sizeof quad);
        return _mm512_dpbusd_epi32(sum, codes.w, _mm512_set1_epi32(quad));
    }
    template <int Bits>
    static Floats finish(Sum sum, int32_t) {
        return _mm512_cvtepi32_ps(sum);
    }

    typedef float Vec __attribute__((vector_size(64)));
    typedef int32_t IntVec __attribute__((vector_size(64)));
    static float add_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
    static Vec load_half(const uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
};

}  // namespace
}  // namespace fewbit

#include "activations.inl"
#include "ceilings.inl"
#include "gemm.inl"
#include "ops.inl"

namespace fewbit {
const KernelTable kAvx512Kernels = {"avx512vnni", 0, quantize, product, rms_norm, gated_silu, attend,
                                    read_bits, dots};
}  // namespace fewbit
