// Norm, gated activation and paged attention (attend.inl), included by each ISA file after its `Isa`: written once on
// the compiler's vector type of the ISA's width.

namespace fewbit {
namespace {

using Vec = Isa::Vec;
using IntVec = Isa::IntVec;
constexpr int kLanes = sizeof(Vec) / sizeof(float);
static_assert(16 % kLanes == 0);

inline Vec load_vec(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store_vec(float *p, Vec v) { memcpy(p, &v, sizeof v); }
// The last, short vector of a row; the lanes beyond are zero.
inline Vec load_part(const float *p, int64_t count) {
    Vec v = {};
    memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
    return v;
}
inline void store_part(float *p, Vec v, int64_t count) { memcpy(p, &v, static_cast<size_t>(count) * sizeof(float)); }
inline Vec splat_vec(float x) { return Vec{} + x; }
inline float add_lanes(Vec v) { return Isa::add_lanes(v); }

// e^x = 2^n * e^r with |r| <= ln(2) / 2; the Taylor polynomial of degree 7 leaves a relative error below 1e-8.
// Arguments are held between -87 and 88, where the result is a normal float; NaN passes through.
inline Vec exp_vec(Vec x) {
    x = x < -87.0f ? splat_vec(-87.0f) : x;
    x = x > 88.0f ? splat_vec(88.0f) : x;
    const Vec shifted = x * 1.44269504f + kRound;
    const Vec n = shifted - kRound;
    // ln(2) in two parts: the first has few bits, so that n times it is exact
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = splat_vec(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const IntVec power = (__builtin_bit_cast(IntVec, shifted) - kRoundBits + 127) << 23;
    return p * __builtin_bit_cast(Vec, power);
}

inline float square_root(float x) { return __builtin_sqrtf(x); }

void rms_norm(const float *x, const float *weight, float *y, int64_t n, float eps) {
    Vec squares = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vec v = load_vec(x + i);
        squares += v * v;
    }
    if (i < n) {
        const Vec v = load_part(x + i, n - i);
        squares += v * v;
    }
    const float factor = 1.0f / square_root(add_lanes(squares) / static_cast<float>(n) + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) store_vec(y + i, load_vec(x + i) * factor * load_vec(weight + i));
    for (; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

inline Vec silu_times(Vec gate, Vec up) { return gate / (1.0f + exp_vec(-gate)) * up; }

// (1 + tanh(u)) / 2 is 1 / (1 + e^(-2u)), here with u = sqrt(2 / pi) * (gate + 0.044715 * gate^3).
inline Vec gelu_times(Vec gate, Vec up) {
    const Vec twice = (gate + 0.044715f * gate * gate * gate) * 1.59576912f;
    return gate / (1.0f + exp_vec(-twice)) * up;
}

template <Vec Times(Vec, Vec)>
void gated_by(const float *gate, const float *up, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_vec(y + i, Times(load_vec(gate + i), load_vec(up + i)));
    if (i < n) store_part(y + i, Times(load_part(gate + i, n - i), load_part(up + i, n - i)), n - i);
}

void gated(Activation activation, const float *gate, const float *up, float *y, int64_t n) {
    if (activation == Activation::silu) return gated_by<silu_times>(gate, up, y, n);
    gated_by<gelu_times>(gate, up, y, n);
}

}  // namespace
}  // namespace fewbit

#include "cache_rows.inl"

#include "attend.inl"
