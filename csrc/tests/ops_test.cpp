// The operations around the products, beside loops over their definitions in double.
#include <algorithm>

#include "check.h"
#include "numbers.h"
#include "ops.h"

namespace test {
namespace {

void expect_near(const char *what, int64_t n, int64_t at, float got, double expected, double allowed) {
    // a NaN fails as well
    if (std::fabs(static_cast<double>(got) - expected) <= allowed) return;
    fail(say("%s of width %lld, at %lld: %.9g, not %.9g", what, static_cast<long long>(n), static_cast<long long>(at),
             static_cast<double>(got), expected));
}

void check_norm(int64_t tokens, int64_t n, Random &random) {
    const std::vector<float> x = random.values(tokens * n), weight = random.values(n);
    std::vector<float> y(x.size(), kNan);
    const float eps = 1e-5f;
    fewbit::rms_norm_rows(x.data(), weight.data(), y.data(), tokens, n, eps);
    for (int64_t t = 0; t < tokens; ++t) {
        double squares = 0.0;
        for (int64_t i = 0; i < n; ++i) squares += std::pow(static_cast<double>(x[static_cast<size_t>(t * n + i)]), 2);
        const double root = std::sqrt(squares / static_cast<double>(n) + static_cast<double>(eps));
        for (int64_t i = 0; i < n; ++i) {
            const size_t at = static_cast<size_t>(t * n + i);
            const double e = static_cast<double>(x[at]) / root * static_cast<double>(weight[static_cast<size_t>(i)]);
            expect_near("rms_norm", n, static_cast<int64_t>(at), y[at], e, 1e-6 * std::fabs(e) + 1e-30);
        }
    }
}

void check_gated(fewbit::Activation activation, int64_t tokens, int64_t n, Random &random) {
    std::vector<float> x = random.values(tokens * 2 * n);
    // beyond what e^x can hold
    for (float far : {-200.0f, 200.0f}) x[static_cast<size_t>(random.whole(0, n - 1))] = far;
    std::vector<float> y(static_cast<size_t>(tokens * n), kNan);
    fewbit::gated_rows(activation, x.data(), y.data(), tokens, n);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < n; ++i) {
            const double gate = static_cast<double>(x[static_cast<size_t>(t * 2 * n + i)]);
            const double up = static_cast<double>(x[static_cast<size_t>(t * 2 * n + n + i)]);
            const double cubed = std::sqrt(2.0 / 3.14159265358979) * (gate + 0.044715 * gate * gate * gate);
            const bool silu = activation == fewbit::Activation::silu;
            const double e = (silu ? gate / (1.0 + std::exp(-gate)) : gate * (1.0 + std::tanh(cubed)) / 2.0) * up;
            // below zero GELU is a small e^x of a large x, whose rounding it multiplies
            const double near = silu ? 1e-6 * std::fabs(e) + 1e-30 : 2e-5 * std::fabs(e) + 1e-14 * std::fabs(gate * up);
            expect_near("gated", n, t * n + i, y[static_cast<size_t>(t * n + i)], e, near);
        }
    }
}

using fewbit::CacheType;

const char *name_of(CacheType type) {
    return type == CacheType::int8 ? "int8" : type == CacheType::f16 ? "f16" : "f32";
}

// A cache whose unwritten rows hold NaN.
struct TestCache {
    CacheType type;
    int64_t rows, heads, width;
    std::vector<uint8_t> keys, values;

    TestCache(CacheType type_, int64_t rows_, int64_t heads_, int64_t width_)
        : type(type_), rows(rows_), heads(heads_), width(width_) {
        // of every type, all ones are NaN; of int8, in the scale
        keys.assign(static_cast<size_t>(rows * heads * fewbit::head_bytes(type, width)), 0xff);
        values = keys;
    }
    fewbit::Cache view() { return {keys.data(), values.data(), type, rows, heads}; }

    // Number d of a head of a row.
    float key(int64_t row, int64_t head, int64_t d) const { return number(keys, row, head, d); }
    float value(int64_t row, int64_t head, int64_t d) const { return number(values, row, head, d); }
    // Random numbers.
    void fill(int64_t row, int64_t head, Random &random) {
        for (std::vector<uint8_t> *v : {&keys, &values}) {
            uint8_t *to = v->data() + place(row, head);
            if (type == CacheType::int8) {
                for (int64_t d = 0; d < width; ++d) to[d] = static_cast<uint8_t>(random.whole(-127, 127));
                const auto bits = static_cast<uint16_t>(random.whole(0x3c00, 0x3c7f));  // 2^-7 to 2^-6
                std::memcpy(to + width, &bits, sizeof bits);
                continue;
            }
            for (int64_t d = 0; d < width; ++d) {
                const float x = random.uniform(-2, 2);
                const uint16_t half = fewbit::float_to_f16(x);
                if (type == CacheType::f16) std::memcpy(to + 2 * d, &half, sizeof half);
                if (type == CacheType::f32) std::memcpy(to + 4 * d, &x, sizeof x);
            }
        }
    }

  private:
    int64_t place(int64_t row, int64_t head) const { return (row * heads + head) * fewbit::head_bytes(type, width); }
    float scale(const uint8_t *at) const {
        uint16_t bits;
        std::memcpy(&bits, at + width, sizeof bits);
        return bfloat_value(bits);
    }
    float number(const std::vector<uint8_t> &v, int64_t row, int64_t head, int64_t d) const {
        const uint8_t *at = v.data() + place(row, head);
        if (type == CacheType::int8) return static_cast<float>(static_cast<int8_t>(at[d])) * scale(at);
        uint16_t half;
        std::memcpy(&half, at + 2 * d, sizeof half);
        if (type == CacheType::f16) return half_value(half);
        float x;
        std::memcpy(&x, at + 4 * d, sizeof x);
        return x;
    }
};

// Component i of x rotated by half: (a, b) -> (a cos - b sin, b cos + a sin); beside it what rounding is relative to.
struct Rotated {
    double value, absolute;
};
Rotated rotated(const float *x, const float *cos, const float *sin, int64_t width, int64_t i) {
    const int64_t half = width / 2, pair = i % half;
    const double a = static_cast<double>(x[pair]), b = static_cast<double>(x[half + pair]);
    const double c = static_cast<double>(cos[pair]), s = static_cast<double>(sin[pair]);
    const double first = i < half ? a * c : b * c, second = i < half ? -b * s : a * s;
    return {first + second, std::fabs(first) + std::fabs(second)};
}

// All of a head rotated; for int8 also times a Hadamard matrix by its definition, in blocks of the largest power of two:
// the sign is the parity of the bits that two indices share.
std::vector<Rotated> turned(const float *x, const float *cos, const float *sin, int64_t width, CacheType type) {
    std::vector<Rotated> plain, spread(static_cast<size_t>(width));
    for (int64_t i = 0; i < width; ++i) plain.push_back(rotated(x, cos, sin, width, i));
    if (type != CacheType::int8) return plain;
    const int64_t block = width & -width;
    for (int64_t i = 0; i < width; ++i) {
        Rotated &sum = spread[static_cast<size_t>(i)];
        for (int64_t j = i / block * block; j < (i / block + 1) * block; ++j) {
            bool odd = false;
            for (int64_t shared = i & j & (block - 1); shared; shared &= shared - 1) odd = !odd;
            const Rotated &from = plain[static_cast<size_t>(j)];
            const double root = std::sqrt(static_cast<double>(block));
            sum.value += (odd ? -from.value : from.value) / root;
            sum.absolute += from.absolute / root;
        }
    }
    return spread;
}

// A cached head of int8 may be half a step off; its step is the largest magnitude / 127 but for bf16's rounding.
double half_step(const std::vector<Rotated> &head, CacheType type) {
    double largest = 0.0;
    for (const Rotated &x : head) largest = std::max(largest, std::fabs(x.value));
    return type == CacheType::int8 ? 0.502 * largest / 127.0 : 0.0;
}

void check_append(int64_t tokens, int64_t group, int64_t kv_heads, int64_t width, CacheType type, Random &random) {
    const int64_t heads = group * kv_heads, rows = tokens + 5;
    // q, k and v lie side by side in one row, as a fused product leaves them
    const int64_t stride = (heads + 2 * kv_heads) * width;
    const std::vector<float> qkv = random.values(tokens * stride);
    const float *q = qkv.data(), *k = q + heads * width, *v = k + kv_heads * width;
    std::vector<float> cos(static_cast<size_t>(tokens * width / 2)), sin = cos;
    for (float &c : cos) c = random.uniform(-1, 1);
    for (float &c : sin) c = random.uniform(-1, 1);
    std::vector<int64_t> slots;
    for (int64_t t = 0; t < tokens; ++t) slots.push_back(rows - 1 - t);
    TestCache cache(type, rows, kv_heads, width);
    std::vector<float> out(static_cast<size_t>(tokens * heads * width), kNan);
    const auto append = [&] {
        return fewbit::rotate_append({q, stride, heads}, {k, stride, kv_heads}, {v, stride, kv_heads}, cos.data(),
                                     sin.data(), slots.data(), cache.view(), tokens, width, out.data());
    };
    if (!append()) fail("rotate_append refused slots within the cache");
    const double steps = type == CacheType::f16 ? 0x1p-11 : 1e-6;
    for (int64_t t = 0; t < tokens; ++t) {
        const float *c = cos.data() + t * width / 2, *s = sin.data() + t * width / 2;
        for (int64_t h = 0; h < heads; ++h) {
            const std::vector<Rotated> e = turned(q + t * stride + h * width, c, s, width, type);
            for (int64_t d = 0; d < width; ++d) {
                const float got = out[static_cast<size_t>((t * heads + h) * width + d)];
                const Rotated &x = e[static_cast<size_t>(d)];
                expect_near("rotate_append, q", width, h * width + d, got, x.value, 1e-6 * x.absolute);
            }
        }
        for (int64_t h = 0; h < kv_heads; ++h) {
            const std::vector<Rotated> ek = turned(k + t * stride + h * width, c, s, width, type);
            std::vector<Rotated> ev;
            for (int64_t d = 0; d < width; ++d) ev.push_back({static_cast<double>(v[t * stride + h * width + d]), 0.0});
            const double k_off = half_step(ek, type), v_off = half_step(ev, type);
            for (int64_t d = 0; d < width; ++d) {
                const Rotated &key = ek[static_cast<size_t>(d)], &value = ev[static_cast<size_t>(d)];
                const double rounding = 1e-6 * key.absolute + 0x1p-25;
                expect_near("rotate_append, k", width, h * width + d, cache.key(rows - 1 - t, h, d), key.value,
                            steps * std::fabs(key.value) + rounding + k_off);
                expect_near("rotate_append, v", width, h * width + d, cache.value(rows - 1 - t, h, d), value.value,
                            steps * std::fabs(value.value) + 0x1p-25 + v_off);
            }
        }
    }
    for (int64_t i = 0; i < 5 * kv_heads * fewbit::head_bytes(type, width); ++i) {
        const size_t at = static_cast<size_t>(i);
        if (cache.keys[at] != 0xff || cache.values[at] != 0xff) fail("rotate_append wrote beside its slots");
    }
    for (int64_t bad : {int64_t{-1}, rows}) {
        slots.back() = bad;
        if (append()) fail(say("rotate_append took slot %lld", static_cast<long long>(bad)));
    }
}

}  // namespace

// Every width up to 100, few and many tokens.
std::string test_ops(int) {
    Random random(4);
    int64_t count = 0;
    for (int64_t n = 1; n <= 100; ++n) {
        const int64_t tokens = n % 10 == 0 ? 400 : random.whole(1, 5);
        check_norm(tokens, n, random);
        check_gated(fewbit::Activation::silu, tokens, n, random);
        check_gated(fewbit::Activation::gelu_tanh, tokens, n, random);
        count += 2;
    }
    for (int64_t width : {16, 32, 48, 64, 128}) {
        for (CacheType type : {CacheType::f32, CacheType::f16, CacheType::int8}) {
            check_append(random.whole(1, 40), random.whole(1, 4), random.whole(1, 3), width, type, random);
            ++count;
        }
    }
    return say("%lld shapes", static_cast<long long>(count));
}

namespace {

struct AttendShape {
    int64_t count, kv_heads, group, width, page_size;
    CacheType type;
    std::vector<int64_t> fresh, lengths;

    std::string words() const {
        std::string text = say("%lld heads in groups of %lld, width %lld, pages of %lld, %s;",
                               static_cast<long long>(kv_heads * group), static_cast<long long>(group),
                               static_cast<long long>(width), static_cast<long long>(page_size), name_of(type));
        for (size_t i = 0; i < fresh.size(); ++i) {
            text += say(" %lld of %lld", static_cast<long long>(fresh[i]), static_cast<long long>(lengths[i]));
        }
        return text;
    }
};

AttendShape random_shape(Random &random) {
    AttendShape s{random.whole(1, 4), random.whole(1, 3), random.whole(1, 7), 16 * random.whole(1, 8),
                  random.one_of<int64_t>({1, 7, 32, 256, 1000}), static_cast<CacheType>(random.whole(0, 2)), {}, {}};
    for (int64_t i = 0; i < s.count; ++i) {
        s.fresh.push_back(random.one_of<int64_t>({0, 1, 1, 1, 2, 5, 16, 17, 40}));
        s.lengths.push_back(s.fresh.back() + random.one_of<int64_t>({0, 1, 30, 239, 240, 255, 256, 257, 600}));
    }
    return s;
}

// One query head of one token over positions [0, seen) of its sequence.
void check_head(const AttendShape &s, const TestCache &cache, const int64_t *pages, const float *q, int64_t head,
                int64_t seen, const fewbit::Scores &scores, const float *y) {
    std::vector<double> weights;
    const int64_t first = scores.window > 0 ? std::max<int64_t>(0, seen - scores.window) : 0;
    const auto row = [&](int64_t p) {
        return pages[p / s.page_size] * s.page_size + p % s.page_size;
    };
    double largest = -INFINITY, total = 0.0;
    for (int64_t p = 0; p < seen; ++p) {
        double score = 0.0;
        for (int64_t d = 0; d < s.width; ++d) {
            score += static_cast<double>(q[d]) * static_cast<double>(cache.key(row(p), head / s.group, d));
        }
        score *= static_cast<double>(scores.scale);
        const auto cap = static_cast<double>(scores.soft_cap);
        if (cap > 0.0) score = cap * std::tanh(score / cap);
        weights.push_back(p < first ? -INFINITY : score);
        largest = std::max(largest, weights.back());
    }
    for (double &w : weights) total += w = std::exp(w - largest);
    for (int64_t d = 0; d < s.width; ++d) {
        double e = 0.0, absolute = 0.0;
        for (int64_t p = 0; p < seen; ++p) {
            if (p < first) continue;
            const auto value = static_cast<double>(cache.value(row(p), head / s.group, d));
            const double part = weights[static_cast<size_t>(p)] / total * value;
            e += part;
            absolute += std::fabs(part);
        }
        if (std::fabs(static_cast<double>(y[d]) - e) <= 2e-5 * absolute) continue;
        fail(say("attention, head %lld at %lld, %lld seen: %.9g, not %.9g: ", static_cast<long long>(head),
                 static_cast<long long>(d), static_cast<long long>(seen), static_cast<double>(y[d]), e) +
             s.words());
    }
}

void check_attention(const AttendShape &s, Random &random) {
    const int64_t heads = s.kv_heads * s.group;
    const int64_t longest = *std::max_element(s.lengths.begin(), s.lengths.end());
    const int64_t per_sequence = (longest + s.page_size - 1) / s.page_size + 1;
    // pages in a shuffled order; the tables end with pages that do not exist and must not be followed
    std::vector<int64_t> free(static_cast<size_t>(s.count * per_sequence));
    for (size_t i = 0; i < free.size(); ++i) free[i] = static_cast<int64_t>(i);
    for (int64_t i = std::ssize(free) - 1; i > 0; --i) {
        std::swap(free[static_cast<size_t>(i)], free[static_cast<size_t>(random.whole(0, i))]);
    }
    std::vector<int64_t> pages(free.size(), int64_t{1} << 60), starts{0};
    TestCache cache(s.type, static_cast<int64_t>(free.size()) * s.page_size, s.kv_heads, s.width);
    for (int64_t i = 0; i < s.count; ++i) {
        const int64_t length = s.lengths[static_cast<size_t>(i)];
        starts.push_back(starts.back() + s.fresh[static_cast<size_t>(i)]);
        for (int64_t p = 0; p < length; ++p) {
            int64_t &page = pages[static_cast<size_t>(i * per_sequence + p / s.page_size)];
            if (p % s.page_size == 0) {
                page = free.back();
                free.pop_back();
            }
            for (int64_t h = 0; h < s.kv_heads; ++h) cache.fill(page * s.page_size + p % s.page_size, h, random);
        }
    }
    const int64_t tokens = starts.back();
    const std::vector<float> q = random.values(tokens * heads * s.width);
    std::vector<float> y(q.size(), kNan);
    const fewbit::Scores scores{1.0f / std::sqrt(static_cast<float>(s.width)),
                                random.one_of<int64_t>({0, 0, 1, 5, 16, 64, 255, 256, 300}),
                                random.whole(0, 2) ? 0.0f : 1.5f};
    const fewbit::Sequences sequences{pages.data(), s.lengths.data(), starts.data(), s.count, per_sequence, s.page_size};
    const auto attend = [&] {
        return fewbit::attend_paged(q.data(), cache.view(), sequences, tokens, heads, s.width, scores, y.data());
    };
    if (!attend()) fail("attention refused: " + s.words());
    for (int64_t i = 0; i < s.count; ++i) {
        for (int64_t t = starts[static_cast<size_t>(i)]; t < starts[static_cast<size_t>(i) + 1]; ++t) {
            const int64_t seen = s.lengths[static_cast<size_t>(i)] - (starts[static_cast<size_t>(i) + 1] - t) + 1;
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t at = (t * heads + h) * s.width;
                check_head(s, cache, pages.data() + i * per_sequence, q.data() + at, h, seen, scores, y.data() + at);
            }
        }
    }
    if (s.lengths[0] == 0) return;
    for (int64_t bad : {int64_t{-1}, int64_t{1} << 60}) {
        pages[0] = bad;
        if (attend()) fail("attention took a page that does not exist: " + s.words());
    }
}

}  // namespace

std::string test_attention(int every) {
    Random random(5);
    const int shapes = 60 / every;
    for (int i = 0; i < shapes; ++i) check_attention(random_shape(random), random);
    return say("%d shapes", shapes);
}

}  // namespace test
