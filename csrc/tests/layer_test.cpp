// The whole stack of layers in one call, beside a loop over a layer's definition in double; the same bits however tokens
// come and whoever computes them; and what is out of range, refused before anything is written.
#include "layer.h"

#include <algorithm>

#include "matrices.h"
#include "numbers.h"
#include "pool.h"

namespace test {
namespace {

using fewbit::CacheType;
using fewbit::float_to_f16;

constexpr int64_t kHidden = 52, kWidth = 16, kPage = 4, kPages = 24, kRows = kPages * kPage;
constexpr float kEps = 0.05f;  // large enough to be missed

struct TestLayer {
    int64_t heads, kv_heads;
    std::vector<float> attention_norm, mlp_norm;
    Made qkv, o, gate_up, down;
    // what is empty or 0 is not there
    std::vector<float> attention_after{}, mlp_after{}, q_norm{}, k_norm{}, qkv_bias{}, o_bias{}, gate_up_bias{}, down_bias{};
    float scale = 0.0f, soft_cap = 0.0f;
    int64_t window = 0, rotation = 0;
    bool gelu = false;

    static const float *some(const std::vector<float> &v) { return v.empty() ? nullptr : v.data(); }
    bool whole() const { return std::ssize(q_norm) > kWidth; }

    fewbit::Layer parts() const {
        return {some(attention_norm), some(mlp_norm), kEps, qkv.matrix.get(), o.matrix.get(), gate_up.matrix.get(),
                down.matrix.get(), heads, kv_heads, kWidth, {}};
    }
    fewbit::Extras extras() const {
        return {some(attention_after), some(mlp_after), some(q_norm), some(k_norm), whole(), some(qkv_bias), some(o_bias),
                some(gate_up_bias), some(down_bias), scale, soft_cap, window, rotation,
                gelu ? fewbit::Activation::gelu_tanh : fewbit::Activation::silu};
    }
};

// Levels on both sides of zero, and products of about 1: attention then looks at many rows.
Made linear(int64_t columns, const std::vector<int64_t> &rows, Random &random) {
    MatrixSpec spec{columns, {}, false};
    for (const int64_t count : rows) {
        const int bits = static_cast<int>(random.whole(3, 5));
        spec.blocks.push_back({count, random.whole(0, 1) ? 32 : columns, bits, static_cast<int>(random.whole(0, 2)),
                               1 << (bits - 1), false});
    }
    return make_matrix(spec, random);
}

std::vector<float> between(int64_t count, float from, float to, Random &random) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float &x : v) x = random.uniform(from, to);
    return v;
}

TestLayer make_layer(int64_t heads, int64_t kv_heads, int64_t inner, Random &random) {
    const int64_t q = heads * kWidth, kv = kv_heads * kWidth;
    return {heads, kv_heads, between(kHidden, 0.2f, 0.6f, random), between(kHidden, 0.2f, 0.6f, random),
            linear(kHidden, {q, kv, kv}, random), linear(q, {kHidden}, random),
            linear(kHidden, {inner, inner}, random), linear(inner, {kHidden}, random)};
}

// Gemma's parts, and OLMo's: norms behind branches, of q and k, windows, caps, biases, no norms before.
TestLayer make_other(bool sandwich, Random &random) {
    TestLayer l = make_layer(4, 2, 48, random);
    l.attention_after = between(kHidden, 0.2f, 0.6f, random);
    l.mlp_after = between(kHidden, 0.2f, 0.6f, random);
    l.rotation = 1;
    l.q_norm = between(sandwich ? kWidth : 4 * kWidth, 0.5f, 1.5f, random);
    l.k_norm = between(sandwich ? kWidth : 2 * kWidth, 0.5f, 1.5f, random);
    if (sandwich) {
        l.scale = 0.6f;
        l.soft_cap = 1.5f;
        l.window = 5;
        l.gelu = true;
        return l;
    }
    l.attention_norm.clear();
    l.mlp_norm.clear();
    l.qkv_bias = between(8 * kWidth, -0.5f, 0.5f, random);
    l.o_bias = between(kHidden, -0.5f, 0.5f, random);
    l.gate_up_bias = between(96, -0.5f, 0.5f, random);
    l.down_bias = between(kHidden, -0.5f, 0.5f, random);
    return l;
}

// Other numbers of heads and inner columns in each: scratch that layers share has to fit all of them.
std::vector<TestLayer> make_layers() {
    Random random(21);
    std::vector<TestLayer> layers;
    layers.push_back(make_layer(3, 1, 75, random));
    layers.push_back(make_layer(4, 2, 130, random));
    layers.push_back(make_layer(2, 2, 33, random));
    layers.push_back(make_other(true, random));
    layers.push_back(make_other(false, random));
    return layers;
}

// A stack with caches of its own, whose unwritten rows hold NaN.
struct Native {
    bool half;
    std::vector<std::vector<uint8_t>> keys, values;
    fewbit::Stack stack;

    Native(const std::vector<TestLayer> &layers, bool half_, int64_t rows = kRows) : half(half_) {
        for (const TestLayer &l : layers) {
            // all ones are NaN in both types
            keys.emplace_back(static_cast<size_t>(rows * l.kv_heads * kWidth * (half ? 2 : 4)), uint8_t{0xff});
            values.push_back(keys.back());
            stack.add(l.parts());
            stack.set_extras(keys.size() - 1, l.extras());
            resize(keys.size() - 1, rows);
        }
    }
    // The layer is told of so many rows, whatever there are.
    void resize(size_t layer, int64_t rows) {
        stack.set_cache(layer, keys[layer].data(), values[layer].data(), half ? CacheType::f16 : CacheType::f32, rows);
    }
    bool same_cache(const Native &other) const { return keys == other.keys && values == other.values; }

    static float number(const std::vector<uint8_t> &v, bool half, int64_t at) {
        float x;
        if (!half) {
            std::memcpy(&x, v.data() + at * 4, sizeof x);
            return x;
        }
        uint16_t h;
        std::memcpy(&h, v.data() + at * 2, sizeof h);
        return half_value(h);
    }
};

// What a step is made of: sequence i has fresh[i] new tokens, which are the last of lengths[i].
struct TestStep {
    std::vector<int64_t> pages, lengths, starts, slots;
    std::vector<float> x, cos, sin;
    int64_t page_size, per_sequence;
    // of the second rotation, which turns the other way; behind the first's
    void add_rotation() {
        const size_t count = sin.size();
        for (size_t i = 0; i < count; ++i) {
            cos.push_back(cos[i]);
            sin.push_back(-sin[i]);
        }
    }

    int64_t tokens() const { return std::ssize(slots); }
    fewbit::Step view() const {
        return {tokens(), cos.data(), sin.data(), slots.data(),
                {pages.data(), lengths.data(), starts.data(), std::ssize(lengths), per_sequence, page_size}};
    }
};

// The inputs of a token depend on its sequence and place alone.
void add_token(TestStep &s, int64_t sequence, const int64_t *pages, int64_t position) {
    Random random(static_cast<uint64_t>(1000 * sequence + position));
    for (int64_t i = 0; i < kHidden; ++i) s.x.push_back(random.uniform(-1, 1));
    for (int64_t i = 0; i < kWidth / 2; ++i) {
        const double angle = static_cast<double>(position) / static_cast<double>(i + 1);
        s.cos.push_back(static_cast<float>(std::cos(angle)));
        s.sin.push_back(static_cast<float>(std::sin(angle)));
    }
    s.slots.push_back(pages[position / s.page_size] * s.page_size + position % s.page_size);
}

// `tables` [sequences][pages]; the sequences hold `before` tokens each.
TestStep make_step(const std::vector<std::vector<int64_t>> &tables, const std::vector<int64_t> &before,
                   const std::vector<int64_t> &fresh, int64_t page_size = kPage, int64_t first_sequence = 0) {
    TestStep s{{}, {}, {0}, {}, {}, {}, {}, page_size, std::ssize(tables.front())};
    for (size_t i = 0; i < tables.size(); ++i) {
        s.pages.insert(s.pages.end(), tables[i].begin(), tables[i].end());
        s.lengths.push_back(before[i] + fresh[i]);
        s.starts.push_back(s.starts.back() + fresh[i]);
        for (int64_t t = before[i]; t < s.lengths.back(); ++t) {
            add_token(s, first_sequence + static_cast<int64_t>(i), tables[i].data(), t);
        }
    }
    s.add_rotation();
    return s;
}

std::vector<float> run(const Native &native, const TestStep &s, size_t first, size_t last, const std::vector<float> &x) {
    std::vector<float> y(x.size(), kNan);
    if (!native.stack.run(first, last, x.data(), s.view(), y.data())) fail("a stack refused a step within its caches");
    return y;
}

// One layer by its definition, with a cache of plain numbers [rows][kv_heads][width].
struct Oracle {
    const TestLayer &l;
    bool half;
    std::vector<float> keys = std::vector<float>(static_cast<size_t>(kRows * l.kv_heads * kWidth), kNan);
    std::vector<float> values = keys;

    float stored(double x) const {
        const float f = static_cast<float>(x);
        return half ? half_value(float_to_f16(f)) : f;
    }

    // As many numbers as there are weights, in place.
    static void norm(double *x, const std::vector<float> &weight) {
        double squares = 0.0;
        for (size_t i = 0; i < weight.size(); ++i) squares += x[i] * x[i];
        const double root = std::sqrt(squares / static_cast<double>(weight.size()) + static_cast<double>(kEps));
        for (size_t i = 0; i < weight.size(); ++i) x[i] = x[i] / root * static_cast<double>(weight[i]);
    }

    // Of each token; no weight, no norm.
    static std::vector<double> norm_rows(std::vector<double> x, const std::vector<float> &weight) {
        for (size_t begin = 0; !weight.empty() && begin < x.size(); begin += kHidden) norm(x.data() + begin, weight);
        return x;
    }

    static std::vector<float> narrowed(const std::vector<double> &x) {
        std::vector<float> y;
        for (const double v : x) y.push_back(static_cast<float>(v));
        return y;
    }

    static std::vector<double> product(const Made &made, const std::vector<float> &x, int64_t tokens,
                                       const std::vector<float> &bias) {
        std::vector<double> y = expected_product(made, x, tokens).y;
        for (size_t i = 0; !bias.empty() && i < y.size(); ++i) y[i] += static_cast<double>(bias[i % bias.size()]);
        return y;
    }

    void norm_heads(std::vector<double> &qkv, int64_t tokens) const {
        const int64_t stride = (l.heads + 2 * l.kv_heads) * kWidth, inner = l.heads * kWidth;
        for (int64_t t = 0; t < tokens && !l.q_norm.empty(); ++t) {
            double *q = qkv.data() + t * stride;
            for (int64_t i = 0; i < inner; i += std::ssize(l.q_norm)) norm(q + i, l.q_norm);
            for (int64_t i = 0; i < l.kv_heads * kWidth; i += std::ssize(l.k_norm)) norm(q + inner + i, l.k_norm);
        }
    }

    // Number i of a head at `at`, rotated.
    double rotated(const double *at, const TestStep &s, int64_t token, int64_t i) const {
        const int64_t half_width = kWidth / 2, pair = i % half_width;
        const auto angle = static_cast<size_t>((l.rotation * s.tokens() + token) * half_width + pair);
        const auto c = static_cast<double>(s.cos[angle]);
        const auto n = static_cast<double>(s.sin[angle]);
        const double a = at[pair], b = at[half_width + pair];
        return i < half_width ? a * c - b * n : b * c + a * n;
    }

    void append(const std::vector<double> &qkv, const TestStep &s) {
        const int64_t stride = (l.heads + 2 * l.kv_heads) * kWidth;
        for (int64_t t = 0; t < s.tokens(); ++t) {
            const double *k = qkv.data() + t * stride + l.heads * kWidth, *v = k + l.kv_heads * kWidth;
            for (int64_t i = 0; i < l.kv_heads * kWidth; ++i) {
                const auto to = static_cast<size_t>(s.slots[static_cast<size_t>(t)] * l.kv_heads * kWidth + i);
                keys[to] = stored(rotated(k + i / kWidth * kWidth, s, t, i % kWidth));
                values[to] = stored(v[i]);
            }
        }
    }

    // One query head of a token over the positions [0, seen) of its sequence, to the end of y.
    void attend(const std::vector<double> &q, const TestStep &s, size_t sequence, int64_t head, int64_t seen,
                std::vector<float> &y) const {
        const auto place = [&](int64_t position) {
            const auto page = s.pages[sequence * static_cast<size_t>(s.per_sequence) +
                                      static_cast<size_t>(position / s.page_size)];
            const int64_t row = page * s.page_size + position % s.page_size;
            return static_cast<size_t>((row * l.kv_heads + head / (l.heads / l.kv_heads)) * kWidth);
        };
        std::vector<double> sums(kWidth);
        double total = 0.0;
        for (int64_t p = l.window > 0 ? std::max<int64_t>(0, seen - l.window) : 0; p < seen; ++p) {
            double score = 0.0;
            for (size_t i = 0; i < kWidth; ++i) score += q[i] * static_cast<double>(keys[place(p) + i]);
            score *= l.scale > 0.0f ? static_cast<double>(l.scale) : 1.0 / std::sqrt(static_cast<double>(kWidth));
            const auto cap = static_cast<double>(l.soft_cap);
            const double weight = std::exp(cap > 0.0 ? cap * std::tanh(score / cap) : score);
            total += weight;
            for (size_t i = 0; i < kWidth; ++i) sums[i] += weight * static_cast<double>(values[place(p) + i]);
        }
        for (const double sum : sums) y.push_back(static_cast<float>(sum / total));
    }

    std::vector<float> attention(const std::vector<double> &qkv, const TestStep &s) const {
        const int64_t stride = (l.heads + 2 * l.kv_heads) * kWidth;
        std::vector<float> y;
        for (size_t i = 0; i < s.lengths.size(); ++i) {
            for (int64_t t = s.starts[i]; t < s.starts[i + 1]; ++t) {
                for (int64_t h = 0; h < l.heads; ++h) {
                    std::vector<double> q(kWidth);
                    for (int64_t d = 0; d < kWidth; ++d) {
                        q[static_cast<size_t>(d)] = rotated(qkv.data() + t * stride + h * kWidth, s, t, d);
                    }
                    attend(q, s, i, h, s.lengths[i] - (s.starts[i + 1] - t) + 1, y);
                }
            }
        }
        return y;
    }

    std::vector<double> run(const std::vector<float> &x, const TestStep &s) {
        std::vector<double> y(x.begin(), x.end());
        std::vector<double> qkv = product(l.qkv, narrowed(norm_rows(y, l.attention_norm)), s.tokens(), l.qkv_bias);
        norm_heads(qkv, s.tokens());
        append(qkv, s);
        const std::vector<double> o = norm_rows(product(l.o, attention(qkv, s), s.tokens(), l.o_bias), l.attention_after);
        for (size_t i = 0; i < y.size(); ++i) y[i] += o[i];

        const std::vector<double> both = product(l.gate_up, narrowed(norm_rows(y, l.mlp_norm)), s.tokens(), l.gate_up_bias);
        const int64_t inner = l.down.spec.columns;
        std::vector<float> gated;
        for (int64_t t = 0; t < s.tokens(); ++t) {
            for (int64_t i = 0; i < inner; ++i) {
                const double gate = both[static_cast<size_t>(t * 2 * inner + i)];
                const double up = both[static_cast<size_t>(t * 2 * inner + inner + i)];
                const double cubed = std::sqrt(2.0 / 3.14159265358979) * (gate + 0.044715 * gate * gate * gate);
                const double open = l.gelu ? (1.0 + std::tanh(cubed)) / 2.0 : 1.0 / (1.0 + std::exp(-gate));
                gated.push_back(static_cast<float>(gate * open * up));
            }
        }
        const std::vector<double> down = norm_rows(product(l.down, gated, s.tokens(), l.down_bias), l.mlp_after);
        for (size_t i = 0; i < y.size(); ++i) y[i] += down[i];
        return y;
    }
};

// Activations are rounded to int8 before each product: an input that rounding errors push over the middle of two steps
// moves a layer's outputs by some thousandths of their size. Anything wrong moves them by their size.
constexpr double kNear = 0.02;

void expect_layer(const std::vector<float> &got, const std::vector<double> &expected, const std::string &where) {
    double squares = 0.0;
    for (const double e : expected) squares += e * e;
    const double size = std::sqrt(squares / static_cast<double>(expected.size()));
    for (size_t i = 0; i < expected.size(); ++i) {
        const double difference = std::fabs(static_cast<double>(got[i]) - expected[i]);
        // a NaN fails as well
        if (difference <= kNear * size) continue;
        fail(say("%s, at %zu: %.9g, not %.9g", where.c_str(), i, static_cast<double>(got[i]), expected[i]));
    }
}

void expect_cache(const std::vector<uint8_t> &got, const std::vector<float> &expected, bool half, const char *what) {
    for (size_t i = 0; i < expected.size(); ++i) {
        const float g = Native::number(got, half, static_cast<int64_t>(i));
        if (std::isnan(expected[i]) ? std::isnan(g) : std::fabs(g - expected[i]) <= 0.05f) continue;
        fail(say("%s at %zu of a layer's cache: %.9g, not %.9g", what, i, static_cast<double>(g),
                 static_cast<double>(expected[i])));
    }
}

// Three sequences whose pages lie anywhere but side by side; the tables end with a page that does not exist.
const std::vector<std::vector<int64_t>> kTables = {{5, 1, 17, 8, 1 << 30}, {20, 3, 11, 0, 1 << 30}, {14, 22, 9, 2, 1 << 30}};
// New tokens of the three, step by step: prompts of ragged lengths, then single tokens and a pause.
const std::vector<std::vector<int64_t>> kSteps = {{5, 1, 11}, {1, 0, 2}, {7, 1, 1}, {1, 12, 1}, {1, 1, 1}};

// Every step's outputs, one after the other.
std::vector<std::vector<float>> run_steps(const Native &native, size_t layers) {
    std::vector<std::vector<float>> all;
    std::vector<int64_t> before(kTables.size());
    for (const std::vector<int64_t> &fresh : kSteps) {
        const TestStep s = make_step(kTables, before, fresh);
        all.push_back(run(native, s, 0, layers, s.x));
        for (size_t i = 0; i < before.size(); ++i) before[i] += fresh[i];
    }
    return all;
}

// Layer by layer: each gets the native outputs of the one before, so that its own errors alone are seen.
void check_steps(const std::vector<TestLayer> &layers, bool half) {
    Native native(layers, half), whole(layers, half);
    std::vector<Oracle> oracles;
    for (const TestLayer &l : layers) oracles.push_back({l, half});
    const std::vector<std::vector<float>> at_once = run_steps(whole, layers.size());
    std::vector<int64_t> before(kTables.size());
    for (size_t i = 0; i < kSteps.size(); ++i) {
        const TestStep s = make_step(kTables, before, kSteps[i]);
        std::vector<float> x = s.x;
        for (size_t l = 0; l < layers.size(); ++l) {
            const std::vector<float> y = run(native, s, l, l + 1, x);
            expect_layer(y, oracles[l].run(x, s), say("layer %zu, step %zu, %s", l, i, half ? "f16" : "f32"));
            expect_cache(native.keys[l], oracles[l].keys, half, "keys");
            expect_cache(native.values[l], oracles[l].values, half, "values");
            x = y;
        }
        if (x != at_once[i]) fail(say("step %zu: layers one by one and at once have other bits", i));
        for (size_t q = 0; q < before.size(); ++q) before[q] += kSteps[i][q];
    }
    if (!native.same_cache(whole)) fail("layers one by one and at once leave other caches");
}

// Every token in a call of its own.
void check_single_tokens(const std::vector<TestLayer> &layers, bool half) {
    fewbit::set_threads(1);
    const Native together(layers, half), alone(layers, half);
    const std::vector<std::vector<float>> expected = run_steps(together, layers.size());
    std::vector<int64_t> before(kTables.size());
    for (size_t i = 0; i < kSteps.size(); ++i) {
        std::vector<float> y;
        for (size_t q = 0; q < kTables.size(); ++q) {
            for (int64_t t = 0; t < kSteps[i][q]; ++t) {
                const TestStep s = make_step({kTables[q]}, {before[q]++}, {1}, kPage, static_cast<int64_t>(q));
                const std::vector<float> token = run(alone, s, 0, layers.size(), s.x);
                y.insert(y.end(), token.begin(), token.end());
            }
        }
        if (y != expected[i]) fail(say("step %zu: tokens one at a time and together have other bits", i));
    }
    if (!alone.same_cache(together)) fail("tokens one at a time and together leave other caches");
    for (int threads : {2, 3}) {
        fewbit::set_threads(threads);
        const Native again(layers, half);
        if (run_steps(again, layers.size()) != expected) fail(say("%d threads have other bits than one", threads));
        if (!again.same_cache(together)) fail(say("%d threads leave another cache than one", threads));
    }
}

// More tokens than a call keeps its activations for, and work enough for all threads.
void check_long_prompt(const std::vector<TestLayer> &layers) {
    constexpr int64_t kTokens = 530, kLongPage = 64, kLongPages = 10;
    const std::vector<std::vector<int64_t>> table = {{7, 2, 9, 0, 5, 1, 8, 3, 6}};
    const Native once(layers, true, kLongPage * kLongPages), cut(layers, true, kLongPage * kLongPages);
    const TestStep all = make_step(table, {0}, {kTokens}, kLongPage);
    const std::vector<float> expected = run(once, all, 0, layers.size(), all.x);
    std::vector<float> y;
    for (int64_t done = 0, count = 0; done < kTokens; done += count) {
        count = std::min<int64_t>(kTokens - done, done == 0 ? 201 : 83);
        const TestStep s = make_step(table, {done}, {count}, kLongPage);
        const std::vector<float> part = run(cut, s, 0, layers.size(), s.x);
        y.insert(y.end(), part.begin(), part.end());
    }
    if (y != expected || !once.same_cache(cut)) fail("a long prompt in pieces has other bits");
    if (std::any_of(y.begin(), y.end(), [](float v) { return !std::isfinite(v); })) fail("a long prompt gave no numbers");
}

int check_refusals(const std::vector<TestLayer> &layers) {
    Native native(layers, true);
    const Native untouched(layers, true);
    const size_t n = layers.size();
    int count = 0;
    const auto refused = [&](const char *what, const TestStep &s, size_t first, size_t last) {
        std::vector<float> y(s.x.size(), -7.0f);
        if (native.stack.run(first, last, s.x.data(), s.view(), y.data())) fail(say("a stack took %s", what));
        const bool clean = std::all_of(y.begin(), y.end(), [](float v) { return v == -7.0f; });
        if (!clean || !native.same_cache(untouched)) fail(say("a stack refused %s and wrote all the same", what));
        ++count;
    };
    const TestStep good = make_step(kTables, {0, 0, 0}, {5, 1, 11});
    refused("no layers", good, 0, 0);
    refused("layers in reverse", good, 2, 1);
    refused("a layer more than there are", good, 0, n + 1);
    // no token's place stops this one
    refused("a layer more than there are, without tokens", make_step({{}}, {0}, {0}), 0, n + 1);
    const auto with = [&](const char *what, auto &&change) {
        TestStep s = good;
        change(s);
        refused(what, s, 0, n);
    };
    with("a slot below 0", [](TestStep &s) { s.slots.back() = -1; });
    with("a slot behind the cache", [](TestStep &s) { s.slots[3] = kRows; });
    with("a far slot", [](TestStep &s) { s.slots[0] = INT64_MAX; });
    with("a page below 0", [](TestStep &s) { s.pages[0] = -1; });
    with("a page behind the cache", [](TestStep &s) { s.pages[static_cast<size_t>(2 * s.per_sequence + 2)] = kPages; });
    with("a far page", [](TestStep &s) { s.pages[1] = INT64_MAX; });
    with("fewer tokens than are new", [](TestStep &s) { s.lengths[0] = 4; });
    with("a length below 0", [](TestStep &s) { s.lengths[1] = -1; });
    with("more tokens than pages", [](TestStep &s) { s.lengths[2] = s.per_sequence * kPage + 1; });
    with("a length that takes in a missing page", [](TestStep &s) { s.lengths[2] = s.per_sequence * kPage; });
    with("a first start that is not 0", [](TestStep &s) { s.starts[0] = 1; });
    with("starts that go back", [](TestStep &s) { s.starts[1] = 7; });
    with("more tokens than come", [](TestStep &s) { s.starts.back() += 1; });
    with("fewer tokens than come", [](TestStep &s) { s.starts.back() -= 1; });
    // the last layer's cache alone is too small: the first one must not have run
    native.resize(n - 1, 22 * kPage);
    refused("a small cache of the last layer", good, 0, n);
    native.resize(n - 1, kRows);
    run(native, good, 0, n, good.x);
    return count;
}

}  // namespace

std::string test_layers(int) {
    const std::vector<TestLayer> layers = make_layers();
    for (const bool half : {false, true}) {
        fewbit::set_threads(2);
        check_steps(layers, half);
        check_single_tokens(layers, half);
    }
    fewbit::set_threads(2);
    check_long_prompt(layers);
    const int refusals = check_refusals(layers);
    return say("%zu layers, %zu steps, %d refusals", layers.size(), kSteps.size(), refusals);
}

}  // namespace test
