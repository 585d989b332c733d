// Plain C++: the definition of the integer product, and what runs where nothing faster does.
#include "kernels.h"
#include "numbers.h"

namespace fewbit {
namespace {

struct Isa {
    static constexpr int lanes = 16;
    // one after the other: loops over several take minutes to compile and are no faster
    static constexpr int tokens = 1;
    struct Floats {
        float v[lanes];
    };
    struct Sum {
        int32_t v[lanes];
    };
    struct Line {
        uint8_t v[lanes * 4];
    };
    template <int Bits>
    using Codes = Line;

    static Floats zero() { return splat(0.0f); }
    static Floats splat(float x) {
        Floats r;
        for (int i = 0; i < lanes; ++i) r.v[i] = x;
        return r;
    }
    static Floats load(const float *p) {
        Floats r;
        memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static void store(float *p, const Floats &x) { memcpy(p, x.v, sizeof x.v); }
    static Floats load_scales(const void *base, int64_t first, Scalar type) {
        Floats r;
        for (int i = 0; i < lanes; ++i) r.v[i] = load_scalar(base, first + i, type);
        return r;
    }
    static Floats load_bytes(const uint8_t *p) {
        Floats r;
        for (int i = 0; i < lanes; ++i) r.v[i] = p[i];
        return r;
    }
    static Floats load_signed(const int8_t *p) {
        Floats r;
        for (int i = 0; i < lanes; ++i) r.v[i] = p[i];
        return r;
    }
    static Floats multiply_add(const Floats &a, const Floats &b, const Floats &c) {
        Floats r;
        for (int i = 0; i < lanes; ++i) r.v[i] = a.v[i] * b.v[i] + c.v[i];
        return r;
    }

    static Line load_line(const uint8_t *p) {
        Line r;
        memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static void store_line(uint8_t *p, const Line &x) { memcpy(p, x.v, sizeof x.v); }
    template <int N>
    static Line left(Line x) {
        for (uint8_t &v : x.v) v = static_cast<uint8_t>(v << N);
        return x;
    }
    template <int N>
    static Line right(Line x) {
        for (uint8_t &v : x.v) v = static_cast<uint8_t>(v >> N);
        return x;
    }
    template <int M>
    static Line masked(Line x) {
        for (uint8_t &v : x.v) v &= M;
        return x;
    }
    template <int M>
    static Line merged(Line low, const Line &x) {
        for (int i = 0; i < lanes * 4; ++i) low.v[i] = static_cast<uint8_t>(low.v[i] | (x.v[i] & M));
        return low;
    }
    static Line load_table(const uint8_t *p) {
        Line r{};
        memcpy(r.v, p, 16);
        return r;
    }
    static Line lookup(const Line &table, Line line) {
        for (uint8_t &v : line.v) v = table.v[v];
        return line;
    }
    template <int Bits>
    static const Line &codes(const Line &line) {
        return line;
    }
    template <int Bits>
    static Sum begin(int32_t start) {
        Sum r;
        for (int i = 0; i < lanes; ++i) r.v[i] = start;
        return r;
    }
    template <int Bits>
    static Sum dot(Sum sum, const Line &a, const Line &b, const int8_t *x) {
        for (int i = 0; i < lanes; ++i) {
            for (int k = 0; k < 4; ++k) sum.v[i] += a.v[4 * i + k] * x[k] + b.v[4 * i + k] * x[4 + k];
        }
        return sum;
    }
    template <int Bits>
    static Floats finish(const Sum &sum, int32_t) {
        Floats r;
        for (int i = 0; i < lanes; ++i) r.v[i] = static_cast<float>(sum.v[i]);
        return r;
    }

    // four floats are one register of every 64-bit CPU
    typedef float Vec __attribute__((vector_size(16)));
    typedef int32_t IntVec __attribute__((vector_size(16)));
    static float add_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
    static float half(uint16_t h) { return f16_to_float(h); }
    static Vec load_half(const uint16_t *p) {
        return Vec{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
    }
    static Vec load_bytes(const int8_t *p) {
        return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                   static_cast<float>(p[3])};
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
const KernelTable kScalarKernels = {"scalar", 0, quantize, product, unpack, rms_norm, gated,
                                     attend, read_bits, dots};
}  // namespace fewbit
