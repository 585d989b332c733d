// NEON on AArch64, for a file that names its dot product before it includes this one:
//   Dot::bias8, Dot::quads(sum, a, b, x)   two quads of codes times 8 activations, added to the sums of four rows
// A register holds 4 rows by 4 columns. Half floats are converted by instructions every AArch64 CPU has.
#include <arm_neon.h>

#include "kernels.h"
#include "numbers.h"

namespace fewbit {
namespace {

struct Isa {
    static constexpr int lanes = 4;
    static constexpr int tokens = kTile;
    using Floats = float32x4_t;
    using Sum = int32x4_t;
    using Line = uint8x16_t;

    static Floats zero() { return vdupq_n_f32(0.0f); }
    static Floats splat(float x) { return vdupq_n_f32(x); }
    static Floats load(const float *p) { return vld1q_f32(p); }
    static void store(float *p, Floats x) { vst1q_f32(p, x); }
    static Floats load_scales(const void *base, int64_t first, Scalar type) {
        if (type == Scalar::f32) return vld1q_f32(static_cast<const float *>(base) + first);
        const uint16x4_t h = vld1_u16(static_cast<const uint16_t *>(base) + first);
        if (type == Scalar::f16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
        return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
    }
    static Floats load_bytes(const uint8_t *p) {
        uint32_t four;
        memcpy(&four, p, sizeof four);
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
    }
    static Floats load_signed(const int8_t *p) { return load_bytes(p); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

    static Line load_line(const uint8_t *p) { return vld1q_u8(p); }
    static void store_line(uint8_t *p, Line x) { vst1q_u8(p, x); }
    template <int N>
    static Line left(Line x) {
        return vshlq_n_u8(x, N);
    }
    template <int N>
    static Line right(Line x) {
        return vshrq_n_u8(x, N);
    }
    template <int M>
    static Line masked(Line x) {
        return vandq_u8(x, vdupq_n_u8(M));
    }
    template <int M>
    static Line merged(Line low, Line x) {
        return vorrq_u8(low, masked<M>(x));
    }
    static Line load_table(const uint8_t *p) { return vld1q_u8(p); }
    static Line lookup(Line table, Line line) { return vqtbl1q_u8(table, line); }
    template <int Bits>
    static Dot::Codes codes(Line line) {
        return Dot::template codes<Bits>(line);
    }
    template <int Bits>
    static Sum begin(int32_t start) {
        return vdupq_n_s32(start);
    }
    template <int Bits>
    static Sum dot(Sum sum, Dot::Codes a, Dot::Codes b, const int8_t *x) {
        return Dot::quads(sum, a, b, vld1_s8(x));
    }
    template <int Bits>
    static Floats finish(Sum sum, int32_t) {
        return vcvtq_f32_s32(sum);
    }

    typedef float Vec __attribute__((vector_size(16)));
    typedef int32_t IntVec __attribute__((vector_size(16)));
    static float add_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
    static float half(uint16_t h) {
        return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
    }
    static Vec load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static Vec load_bytes(const int8_t *p) {
        int32_t four;
        memcpy(&four, p, sizeof four);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
    }
};

}  // namespace
}  // namespace fewbit

#include "activations.inl"
#include "ceilings.inl"
#include "planes.inl"
#include "gemm.inl"
#include "ops.inl"
