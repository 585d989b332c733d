// The product, and reading rows back, beside loops over the definition.
#include "matrices.h"
#include "pool.h"

namespace test {
namespace {

constexpr int64_t kMostTokens = 40;
constexpr int64_t kTokenCounts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, kMostTokens};

struct Covered {
    int64_t shapes = 0, products = 0;
};

void check_rows(const Made &made, Random &random) {
    const int64_t columns = made.spec.columns;
    std::vector<int64_t> ids(static_cast<size_t>(random.whole(1, 40)));
    for (int64_t &id : ids) id = random.whole(0, made.rows - 1);
    const int64_t count = static_cast<int64_t>(ids.size());
    std::vector<float> y(ids.size() * static_cast<size_t>(columns), kNan);
    if (!made.matrix->rows(ids.data(), count, y.data())) fail("rows refused " + made.spec.words());
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < columns; ++c) {
            const size_t at = static_cast<size_t>(ids[static_cast<size_t>(i)] * columns + c);
            const float value = static_cast<float>(made.level[at]) * made.scale[at] + made.offset[at];
            const float got = y[static_cast<size_t>(i * columns + c)];
            if (got != value) {
                fail(say("row %lld, column %lld reads back %g, not %g: ", static_cast<long long>(at) / columns,
                         static_cast<long long>(c), static_cast<double>(got), static_cast<double>(value)) +
                     made.spec.words());
            }
        }
    }
    ids.back() = random.whole(0, 1) ? made.rows : -1;
    if (made.matrix->rows(ids.data(), count, y.data())) fail("rows took an id outside of " + made.spec.words());
}

void check_product(const Made &made, const std::vector<float> &x, int64_t tokens, const std::vector<float> &y) {
    const Expected e = expected_product(made, x, tokens);
    for (size_t i = 0; i < y.size(); ++i) {
        // a NaN fails as well
        if (std::fabs(static_cast<double>(y[i]) - e.y[i]) <= 1e-5 * e.absolute[i]) continue;
        const long long token = static_cast<long long>(i) / made.rows, row = static_cast<long long>(i) % made.rows;
        fail(say("token %lld of %lld, row %lld: %.9g, not %.9g: ", token, static_cast<long long>(tokens), row,
                 static_cast<double>(y[i]), e.y[i]) +
             made.spec.words());
    }
}

// How many tokens come at once and how many threads run must not show in a single bit.
int64_t check_invariance(const Made &made, const std::vector<float> &x, const std::vector<float> &y) {
    int64_t products = 0;
    for (int64_t tokens : kTokenCounts) {
        fewbit::set_threads(static_cast<int>(1 + tokens % 3));
        const std::vector<float> fewer = product_of(made, x, tokens);
        if (!same_bits(fewer.data(), y.data(), static_cast<int64_t>(fewer.size()))) {
            fail(say("%lld tokens alone on %d threads give other bits: ", static_cast<long long>(tokens),
                     fewbit::threads()) +
                 made.spec.words());
        }
        ++products;
    }
    for (int threads = 1; threads <= 3; ++threads) {
        fewbit::set_threads(threads);
        for (int64_t tokens : {int64_t{1}, kMostTokens}) {
            const std::vector<float> again = product_of(made, x, tokens);
            if (!same_bits(again.data(), y.data(), static_cast<int64_t>(again.size()))) {
                fail(say("%d threads give other bits: ", threads) + made.spec.words());
            }
            ++products;
        }
    }
    fewbit::set_threads(2);
    return products;
}

void check_matrix(const MatrixSpec &spec, std::vector<float> x, Random &random, Covered &covered) {
    const Made made = make_matrix(spec, random);
    check_rows(made, random);
    // a block of 32 activations that are all zero
    const int64_t first = random.whole(0, kMostTokens * spec.columns - 1);
    for (int64_t i = first; i < std::min(first + 70, kMostTokens * spec.columns); ++i) x[static_cast<size_t>(i)] = 0.0f;
    const std::vector<float> y = product_of(made, x, kMostTokens);
    check_product(made, x, kMostTokens, y);
    covered.products += 1 + check_invariance(made, x, y);
    ++covered.shapes;
}

BlockSpec random_block(int64_t columns, int64_t rows, int bits, Random &random) {
    const int64_t span = random.one_of<int64_t>({32, 64, 96, 128, columns, columns + 5});
    const int32_t top = (1 << bits) - 1;
    const int32_t zero = random.one_of<int32_t>({0, 0, (top + 1) / 2, top, static_cast<int32_t>(random.whole(0, 255))});
    return {rows, span, bits, static_cast<int>(random.whole(0, 2)), zero,
            static_cast<int>(random.one_of<int64_t>({0, 0, 0, 1, 2, 3}))};
}

// What else blocks of ggml have: groups of 16, scales of two levels, tables.
BlockSpec random_ggml_block(int64_t columns, int64_t rows, int bits, Random &random) {
    BlockSpec b = random_block(columns, rows, bits, random);
    b.span = random.one_of<int64_t>(columns % 32 == 0 && bits != 5 ? std::vector<int64_t>{16, 16, 32} : std::vector<int64_t>{32, 64});
    if (random.whole(0, 2)) {
        b.scale_type = static_cast<int>(random.whole(3, 4));
        b.super_type = static_cast<int>(random.whole(0, 1));
        b.super_span = b.span << random.whole(0, 4);
        b.offset_type = static_cast<int>(random.one_of<int64_t>({0, 2, 3, 4, 4}));
    }
    if ((bits == 3 || bits == 4) && random.whole(0, 1)) {
        b.zero = 0;
        for (int64_t i = random.whole(2, int64_t{1} << bits); i > 0; --i) b.levels.push_back(static_cast<int>(random.whole(-127, 127)));
    }
    // a span longer than the row is the row
    b.span = std::min(b.span, columns);
    return b;
}

}  // namespace

// All widths at every number of columns up to 100 and every number of rows up to 70, everything else at random.
std::string test_products(int every) {
    Random random(1);
    Covered covered;
    std::vector<int64_t> columns;
    for (int64_t c = 1; c <= 100; ++c) columns.push_back(c);
    columns.insert(columns.end(), {127, 128, 129, 159, 160, 161, 255, 256, 257, 320, 383, 511, 513, 640, 699, 700});
    int64_t at = 0, turn = 0;
    for (int64_t c : columns) {
        for (int bits : kWidths) {
            if (at++ % every != 0) continue;
            // 37 and 70 have no common divisor, so all numbers of rows take their turn
            MatrixSpec spec{c, {random_block(c, c > 100 ? 1 + turn % 37 : 1 + turn * 37 % 70, bits, random)}, false};
            ++turn;
            if (random.whole(0, 4) == 0) {
                for (int64_t more = random.whole(1, 2); more > 0; --more) {
                    const int other = kWidths[random.whole(0, static_cast<int64_t>(std::size(kWidths)) - 1)];
                    spec.blocks.push_back(random_block(c, random.whole(1, 33), other, random));
                }
            }
            check_matrix(spec, random.values(kMostTokens * c), random, covered);
        }
    }
    return say("%lld shapes, %lld products", static_cast<long long>(covered.shapes),
               static_cast<long long>(covered.products));
}

std::string test_ggml_products(int every) {
    Random random(4);
    Covered covered;
    int64_t at = 0;
    for (const int64_t c : {32, 64, 96, 160, 256, 320, 512, 700, 768}) {
        for (int bits : kWidths) {
            for (int again = 0; again < 4; ++again) {
                if (at++ % every != 0) continue;
                MatrixSpec spec{c, {random_ggml_block(c, random.whole(1, 70), bits, random)}, random.whole(0, 4) == 0};
                if (random.whole(0, 2) == 0) {
                    const int other = kWidths[random.whole(0, static_cast<int64_t>(std::size(kWidths)) - 1)];
                    spec.blocks.push_back(random_ggml_block(c, random.whole(1, 33), other, random));
                }
                check_matrix(spec, random.values(kMostTokens * c), random, covered);
            }
        }
    }
    return say("%lld shapes, %lld products", static_cast<long long>(covered.shapes),
               static_cast<long long>(covered.products));
}

// The largest codes times the largest activations of one sign: where sums of 16 bits would overflow, they do here.
std::string test_extremes(int) {
    Random random(2);
    Covered covered;
    for (int bits : kWidths) {
        const int32_t top = (1 << bits) - 1;
        for (int32_t zero : {0, (top + 1) / 2, 255}) {
            for (int64_t c : {32, 96, 250}) {
                std::vector<float> x(static_cast<size_t>(kMostTokens * c));
                for (size_t i = 0; i < x.size(); ++i) {
                    const size_t token = i / static_cast<size_t>(c);
                    // tokens all positive, all negative, mixed
                    x[i] = token % 3 == 0 ? 1.0f : token % 3 == 1 ? -1.0f : random.whole(0, 1) ? 1.0f : -1.0f;
                }
                check_matrix({c, {{33, c, bits, 0, zero, false}}, true}, x, random, covered);
            }
        }
    }
    return say("%lld shapes, %lld products", static_cast<long long>(covered.shapes),
               static_cast<long long>(covered.products));
}

// Rows so long that the tokens are taken in several tasks, in several passes, and the driver may cut the row itself.
std::string test_long_rows(int) {
    Random random(3);
    const struct {
        MatrixSpec spec;
        int64_t tokens;
    } cases[] = {{{5000, {{40, 128, 4, 1, 8, false}}, false}, 33},
                 {{5000, {{17, 32, 3, 2, 0, true}}, false}, 33},
                 {{20000, {{3, 64, 5, 0, 0, true}}, false}, 70},
                 {{20001, {{2, 20001, 6, 0, 31, false}}, false}, 30},
                 {{140000, {{1, 128, 8, 1, 128, false}}, false}, 67}};
    for (const auto &[spec, tokens] : cases) {
        const Made made = make_matrix(spec, random);
        const std::vector<float> x = random.values(tokens * spec.columns);
        const std::vector<float> y = product_of(made, x, tokens);
        check_product(made, x, tokens, y);
        for (int64_t token = 0; token < tokens; token += tokens / 3) {
            const std::vector<float> alone(x.begin() + token * spec.columns, x.begin() + (token + 1) * spec.columns);
            const std::vector<float> row = product_of(made, alone, 1);
            if (!same_bits(row.data(), y.data() + token * made.rows, made.rows)) {
                fail(say("token %lld alone gives other bits: ", static_cast<long long>(token)) + spec.words());
            }
        }
    }
    return say("%zu shapes", std::size(cases));
}

}  // namespace test
