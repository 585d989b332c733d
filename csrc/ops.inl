// Norm, gated activation and paged attention, included by each ISA file after its `Isa`: written once on the
// compiler's vector type of the ISA's width.

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

void gated_silu(const float *gate, const float *up, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_vec(y + i, silu_times(load_vec(gate + i), load_vec(up + i)));
    if (i < n) store_part(y + i, silu_times(load_part(gate + i, n - i), load_part(up + i, n - i)), n - i);
}

inline Vec load_cached(const float *p) { return load_vec(p); }
inline Vec load_cached(const uint16_t *p) { return Isa::load_half(p); }

inline int64_t cached_row(const AttendTask &a, int64_t position) {
    return a.pages[position / a.page_size] * a.page_size + position % a.page_size;
}

// Cached rows that new token i sees, counted from `begin`, at most the chunk.
inline int64_t visible(const AttendTask &a, int i) {
    const int64_t seen = a.length - a.fresh + i + 1;
    const int64_t last = seen < a.end ? seen : a.end;
    return last > a.begin ? last - a.begin : 0;
}

template <class Cached>
void score_rows(const AttendTask &a) {
    const auto *k_cache = static_cast<const Cached *>(a.k_cache);
    for (int64_t p = a.begin; p < a.end; ++p) {
        const Cached *k = k_cache + cached_row(a, p) * a.row_stride;
        for (int i = 0; i < a.fresh; ++i) {
            const float *q = a.q + i * a.q_stride;
            for (int h = 0; h < a.group; ++h, q += a.width) {
                Vec sum = {};
                for (int d = 0; d < a.width; d += kLanes) sum += load_vec(q + d) * load_cached(k + d);
                a.scores[(i * a.group + h) * kChunk + (p - a.begin)] = add_lanes(sum) * a.scale;
            }
        }
    }
}

// Scores to weights e^(score - largest), unseen rows to zero; leaves the sum and the largest beside the values.
void weigh_scores(const AttendTask &a) {
    for (int row = 0; row < a.fresh * a.group; ++row) {
        float *score = a.scores + row * kChunk;
        const int64_t count = visible(a, row / a.group);
        float *out = a.sums + static_cast<int64_t>(row) * (a.width + 2);
        float largest = -__builtin_inff();
        for (int64_t i = 0; i < count; ++i) largest = score[i] > largest ? score[i] : largest;
        Vec total = {};
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            const Vec weight = exp_vec(load_vec(score + i) - largest);
            store_vec(score + i, weight);
            total += weight;
        }
        float sum = add_lanes(total);
        if (i < count) {
            const Vec weight = exp_vec(load_part(score + i, count - i) - largest);
            store_part(score + i, weight, count - i);
            for (int64_t j = 0; j < count - i; ++j) sum += weight[j];
        }
        for (int64_t j = count; j < a.end - a.begin; ++j) score[j] = 0.0f;
        for (int d = 0; d < a.width; ++d) out[d] = 0.0f;
        out[a.width] = sum;
        out[a.width + 1] = largest;
    }
}

template <class Cached>
void add_values(const AttendTask &a) {
    const auto *v_cache = static_cast<const Cached *>(a.v_cache);
    for (int64_t p = a.begin; p < a.end; ++p) {
        const Cached *v = v_cache + cached_row(a, p) * a.row_stride;
        // a row that no new token sees may hold anything, NaN included, and has weight zero
        const int64_t hidden = p - (a.length - a.fresh);
        const int first = hidden > 0 ? static_cast<int>(hidden) : 0;
        for (int row = first * a.group; row < a.fresh * a.group; ++row) {
            const float weight = a.scores[row * kChunk + (p - a.begin)];
            float *out = a.sums + static_cast<int64_t>(row) * (a.width + 2);
            for (int d = 0; d < a.width; d += kLanes) {
                store_vec(out + d, load_vec(out + d) + weight * load_cached(v + d));
            }
        }
    }
}

void attend(const AttendTask &a) {
    a.half ? score_rows<uint16_t>(a) : score_rows<float>(a);
    weigh_scores(a);
    a.half ? add_values<uint16_t>(a) : add_values<float>(a);
}

}  // namespace
}  // namespace fewbit
