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

void check_silu(int64_t tokens, int64_t n, Random &random) {
    std::vector<float> x = random.values(tokens * 2 * n);
    // beyond what e^x can hold
    for (float far : {-200.0f, 200.0f}) x[static_cast<size_t>(random.whole(0, n - 1))] = far;
    std::vector<float> y(static_cast<size_t>(tokens * n), kNan);
    fewbit::gated_silu_rows(x.data(), y.data(), tokens, n);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < n; ++i) {
            const double gate = static_cast<double>(x[static_cast<size_t>(t * 2 * n + i)]);
            const double up = static_cast<double>(x[static_cast<size_t>(t * 2 * n + n + i)]);
            const double e = gate / (1.0 + std::exp(-gate)) * up;
            expect_near("gated_silu", n, t * n + i, y[static_cast<size_t>(t * n + i)], e, 1e-6 * std::fabs(e) + 1e-30);
        }
    }
}

// A cache whose unwritten rows hold NaN, as f16 or f32.
struct TestCache {
    bool half;
    int64_t rows, heads, width;
    std::vector<uint16_t> half_keys, half_values;
    std::vector<float> keys, values;

    TestCache(bool half_, int64_t rows_, int64_t heads_, int64_t width_)
        : half(half_), rows(rows_), heads(heads_), width(width_) {
        const size_t count = static_cast<size_t>(rows * heads * width);
        if (half) {
            half_keys.assign(count, 0x7e00);
            half_values = half_keys;
        } else {
            keys.assign(count, kNan);
            values = keys;
        }
    }
    fewbit::Cache view() {
        if (half) return {half_keys.data(), half_values.data(), true, rows, heads};
        return {keys.data(), values.data(), false, rows, heads};
    }
    float key(int64_t at) const {
        return half ? half_value(half_keys[static_cast<size_t>(at)]) : keys[static_cast<size_t>(at)];
    }
    float value(int64_t at) const {
        return half ? half_value(half_values[static_cast<size_t>(at)]) : values[static_cast<size_t>(at)];
    }
    void put(int64_t at, float k, float v) {
        const size_t i = static_cast<size_t>(at);
        if (half) {
            half_keys[i] = fewbit::float_to_f16(k);
            half_values[i] = fewbit::float_to_f16(v);
        } else {
            keys[i] = k;
            values[i] = v;
        }
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

void check_append(int64_t tokens, int64_t group, int64_t kv_heads, int64_t width, bool half, Random &random) {
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
    TestCache cache(half, rows, kv_heads, width);
    std::vector<float> out(static_cast<size_t>(tokens * heads * width), kNan);
    const auto append = [&] {
        return fewbit::rotate_append({q, stride, heads}, {k, stride, kv_heads}, {v, stride, kv_heads}, cos.data(),
                                     sin.data(), slots.data(), cache.view(), tokens, width, out.data());
    };
    if (!append()) fail("rotate_append refused slots within the cache");
    const double steps = half ? 0x1p-11 : 1e-6;
    for (int64_t t = 0; t < tokens; ++t) {
        const float *c = cos.data() + t * width / 2, *s = sin.data() + t * width / 2;
        for (int64_t i = 0; i < heads * width; ++i) {
            const Rotated e = rotated(q + t * stride + i / width * width, c, s, width, i % width);
            const float got = out[static_cast<size_t>(t * heads * width + i)];
            expect_near("rotate_append, q", width, i, got, e.value, 1e-6 * e.absolute);
        }
        for (int64_t i = 0; i < kv_heads * width; ++i) {
            const int64_t at = (rows - 1 - t) * kv_heads * width + i;
            const Rotated ek = rotated(k + t * stride + i / width * width, c, s, width, i % width);
            const double ev = static_cast<double>(v[t * stride + i]);
            expect_near("rotate_append, k", width, i, cache.key(at), ek.value,
                        steps * std::fabs(ek.value) + 1e-6 * ek.absolute + 0x1p-25);
            expect_near("rotate_append, v", width, i, cache.value(at), ev, steps * std::fabs(ev) + 0x1p-25);
        }
    }
    for (int64_t i = 0; i < 5 * kv_heads * width; ++i) {
        if (!std::isnan(cache.key(i)) || !std::isnan(cache.value(i))) fail("rotate_append wrote beside its slots");
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
        check_silu(tokens, n, random);
        count += 2;
    }
    for (int64_t width : {16, 32, 48, 64, 128}) {
        for (bool half : {false, true}) {
            check_append(random.whole(1, 40), random.whole(1, 4), random.whole(1, 3), width, half, random);
            ++count;
        }
    }
    return say("%lld shapes", static_cast<long long>(count));
}

namespace {

struct AttendShape {
    int64_t count, kv_heads, group, width, page_size;
    bool half;
    std::vector<int64_t> fresh, lengths;

    std::string words() const {
        std::string text = say("%lld heads in groups of %lld, width %lld, pages of %lld, %s;",
                               static_cast<long long>(kv_heads * group), static_cast<long long>(group),
                               static_cast<long long>(width), static_cast<long long>(page_size), half ? "f16" : "f32");
        for (size_t i = 0; i < fresh.size(); ++i) {
            text += say(" %lld of %lld", static_cast<long long>(fresh[i]), static_cast<long long>(lengths[i]));
        }
        return text;
    }
};

AttendShape random_shape(Random &random) {
    AttendShape s{random.whole(1, 4), random.whole(1, 3), random.whole(1, 7), 16 * random.whole(1, 8),
                  random.one_of<int64_t>({1, 7, 32, 256, 1000}), random.whole(0, 1) == 1, {}, {}};
    for (int64_t i = 0; i < s.count; ++i) {
        s.fresh.push_back(random.one_of<int64_t>({0, 1, 1, 1, 2, 5, 16, 17, 40}));
        s.lengths.push_back(s.fresh.back() + random.one_of<int64_t>({0, 1, 30, 239, 240, 255, 256, 257, 600}));
    }
    return s;
}

// One query head of one token over positions [0, seen) of its sequence.
void check_head(const AttendShape &s, const TestCache &cache, const int64_t *pages, const float *q, int64_t head,
                int64_t seen, float scale, const float *y) {
    std::vector<double> weights;
    const auto row = [&](int64_t p) {
        return ((pages[p / s.page_size] * s.page_size + p % s.page_size) * s.kv_heads + head / s.group) * s.width;
    };
    double largest = -INFINITY, total = 0.0;
    for (int64_t p = 0; p < seen; ++p) {
        double score = 0.0;
        for (int64_t d = 0; d < s.width; ++d) {
            score += static_cast<double>(q[d]) * static_cast<double>(cache.key(row(p) + d));
        }
        weights.push_back(score * static_cast<double>(scale));
        largest = std::max(largest, weights.back());
    }
    for (double &w : weights) total += w = std::exp(w - largest);
    for (int64_t d = 0; d < s.width; ++d) {
        double e = 0.0, absolute = 0.0;
        for (int64_t p = 0; p < seen; ++p) {
            const double part = weights[static_cast<size_t>(p)] / total * static_cast<double>(cache.value(row(p) + d));
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
    TestCache cache(s.half, static_cast<int64_t>(free.size()) * s.page_size, s.kv_heads, s.width);
    for (int64_t i = 0; i < s.count; ++i) {
        const int64_t length = s.lengths[static_cast<size_t>(i)];
        starts.push_back(starts.back() + s.fresh[static_cast<size_t>(i)]);
        for (int64_t p = 0; p < length; ++p) {
            int64_t &page = pages[static_cast<size_t>(i * per_sequence + p / s.page_size)];
            if (p % s.page_size == 0) {
                page = free.back();
                free.pop_back();
            }
            const int64_t row = (page * s.page_size + p % s.page_size) * s.kv_heads * s.width;
            for (int64_t d = 0; d < s.kv_heads * s.width; ++d) {
                const float k = random.uniform(-2, 2), v = random.uniform(-2, 2);
                cache.put(row + d, k, v);
            }
        }
    }
    const int64_t tokens = starts.back();
    const std::vector<float> q = random.values(tokens * heads * s.width);
    std::vector<float> y(q.size(), kNan);
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
    const fewbit::Sequences sequences{pages.data(), s.lengths.data(), starts.data(), s.count, per_sequence, s.page_size};
    const auto attend = [&] {
        return fewbit::attend_paged(q.data(), cache.view(), sequences, tokens, heads, s.width, scale, y.data());
    };
    if (!attend()) fail("attention refused: " + s.words());
    for (int64_t i = 0; i < s.count; ++i) {
        for (int64_t t = starts[static_cast<size_t>(i)]; t < starts[static_cast<size_t>(i) + 1]; ++t) {
            const int64_t seen = s.lengths[static_cast<size_t>(i)] - (starts[static_cast<size_t>(i) + 1] - t) + 1;
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t at = (t * heads + h) * s.width;
                check_head(s, cache, pages.data() + i * per_sequence, q.data() + at, h, seen, scale, y.data() + at);
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
