// Plain C++: the definition of the integer product, and what runs where nothing faster does.
#include "kernels.h"
#include "numbers.h"

namespace fewbit {
namespace {

struct Isa {
    static constexpr int lanes = 16;
    struct Floats {
        float v[lanes];
    };
    struct Sum {
        int32_t v[lanes];
    };
    template <int Bits>
    struct Codes {
        uint8_t v[lanes * 4];
    };

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
    static Floats multiply_add(const Floats &a, const Floats &b, const Floats &c) {
        Floats r;
        for (int i = 0; i < lanes; ++i) r.v[i] = a.v[i] * b.v[i] + c.v[i];
        return r;
    }

    static void load(const uint8_t *block, int, int pair, Codes<4> &a, Codes<4> &b) {
        const uint8_t *line = block + pair * 64;
        for (int i = 0; i < lanes * 4; ++i) {
            a.v[i] = line[i] & 15;
            b.v[i] = line[i] >> 4;
        }
    }
    static void load(const uint8_t *block, int, int pair, Codes<8> &a, Codes<8> &b) {
        memcpy(a.v, block + pair * 128, sizeof a.v);
        memcpy(b.v, block + pair * 128 + 64, sizeof b.v);
    }
    template <int Bits>
    static Sum begin(int32_t start) {
        Sum r;
        for (int i = 0; i < lanes; ++i) r.v[i] = start;
        return r;
    }
    template <class C>
    static Sum dot(Sum sum, const C &codes, const int8_t *x) {
        for (int i = 0; i < lanes; ++i) {
            const uint8_t *w = codes.v + 4 * i;
            sum.v[i] += w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
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
    static Vec load_half(const uint16_t *p) {
        return Vec{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
    }
};

}  // namespace
}  // namespace fewbit

#include "activations.inl"
#include "ceilings.inl"
#include "gemm.inl"
#include "ops.inl"

namespace fewbit {
const KernelTable kScalarKernels = {"scalar", 0, quantize, product, rms_norm, gated_silu, attend,
                                    read_bits, dots};
}  // namespace fewbit
