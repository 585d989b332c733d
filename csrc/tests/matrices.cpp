#include "matrices.h"

#include <algorithm>

#include "product.h"

namespace test {
namespace {

// Scales of a block: as stored, and their values.
struct Scales {
    std::vector<uint8_t> bytes;
    std::vector<float> values;
};

Scales random_scales(int type, int64_t count, Random &random) {
    Scales s;
    s.values.resize(static_cast<size_t>(count));
    s.bytes.resize(static_cast<size_t>(count) * (type == 0 ? 4 : 2));
    for (int64_t i = 0; i < count; ++i) {
        const size_t at = static_cast<size_t>(i);
        const uint16_t sign = random.whole(0, 1) ? 0x8000 : 0;
        if (type == 0) {
            s.values[at] = random.uniform(-0.1f, 0.1f);
            std::memcpy(&s.bytes[at * 4], &s.values[at], 4);
        } else {
            // 2^-9 to 2^-3, the f16 ones now and then subnormal; all fractions
            const int64_t exponent = type == 1 ? (random.whole(0, 15) ? random.whole(6, 12) << 10 : 0)
                                               : random.whole(118, 124) << 7;
            const uint16_t h = static_cast<uint16_t>(sign | exponent | random.whole(0, type == 1 ? 1023 : 127));
            s.values[at] = type == 1 ? half_value(h) : bfloat_value(h);
            std::memcpy(&s.bytes[at * 2], &h, 2);
        }
    }
    return s;
}

// What is left of two numbers for each group: as stored, and their product, which float32 holds exactly.
struct TwoLevel {
    std::vector<uint8_t> steps;
    Scales supers;
    std::vector<float> values;
};

TwoLevel random_two_level(const BlockSpec &b, int type, bool with_sign, int64_t groups, Random &random) {
    const int64_t per = b.super_span / b.span, supers = (groups + per - 1) / per;
    TwoLevel found{{}, random_scales(type, b.rows * supers, random), {}};
    for (int64_t i = 0; i < b.rows * groups; ++i) {
        const auto step = static_cast<int>(with_sign ? random.whole(-128, 127) : random.whole(0, 255));
        found.steps.push_back(static_cast<uint8_t>(step));
        const size_t super = static_cast<size_t>(i / groups * supers + i % groups / per);
        found.values.push_back(found.supers.values[super] * static_cast<float>(step));
    }
    return found;
}

// All numbers of a block beside its codes.
struct Numbers {
    std::vector<uint8_t> scales, offsets, scale_supers, offset_supers;
    std::vector<float> scale, offset;
};

Numbers random_numbers(const BlockSpec &b, int64_t groups, Random &random) {
    Numbers n;
    if (b.scale_type >= 3) {
        const TwoLevel two = random_two_level(b, b.super_type, b.scale_type == 4, groups, random);
        n.scales = two.steps;
        n.scale_supers = two.supers.bytes;
        n.scale = two.values;
    } else {
        const Scales s = random_scales(b.scale_type, b.rows * groups, random);
        n.scales = s.bytes;
        n.scale = s.values;
    }
    n.offset.resize(n.scale.size());
    if (b.offset_type == 1 || b.offset_type == 2) {
        const Scales s = random_scales(b.offset_type - 1, b.rows * groups, random);
        n.offsets = s.bytes;
        n.offset = s.values;
    } else if (b.offset_type == 3) {
        for (size_t i = 0; i < n.scale.size(); ++i) {
            n.offsets.push_back(static_cast<uint8_t>(random.whole(0, 255)));
            n.offset[i] = -(n.scale[i] * static_cast<float>(n.offsets[i]));
        }
    } else if (b.offset_type == 4) {
        const TwoLevel two = random_two_level(b, 1, false, groups, random);
        n.offsets = two.steps;
        n.offset_supers = two.supers.bytes;
        for (size_t i = 0; i < n.scale.size(); ++i) n.offset[i] = -two.values[i];
    }
    return n;
}

void fill_block(Made &made, int64_t index, const BlockSpec &b, Random &random) {
    const int64_t columns = made.spec.columns, span = std::min(b.span, columns), groups = (columns + span - 1) / span;
    const auto places = static_cast<int64_t>(b.levels.size());
    const int64_t top = places ? places - 1 : (int64_t{1} << b.bits) - 1;
    std::vector<uint8_t> codes(static_cast<size_t>(b.rows * columns));
    for (uint8_t &c : codes) {
        c = static_cast<uint8_t>(made.spec.extremes ? random.whole(0, 3) ? top : 0 : random.whole(0, top));
    }
    const Numbers n = random_numbers(b, groups, random);
    // in two pieces, as a reader of slices does
    const int64_t cut = random.whole(0, b.rows);
    for (const auto &[first, count] : {std::pair{int64_t{0}, cut}, std::pair{cut, b.rows - cut}}) {
        const auto from = [&](const std::vector<uint8_t> &all) {
            return all.empty() ? nullptr : all.data() + all.size() / static_cast<size_t>(b.rows) * static_cast<size_t>(first);
        };
        made.matrix->fill(index, first, count, codes.data() + first * columns, from(n.scales), from(n.offsets),
                          from(n.scale_supers), from(n.offset_supers));
    }
    for (int64_t row = 0; row < b.rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            const size_t at = static_cast<size_t>(row * groups + column / span);
            const uint8_t code = codes[static_cast<size_t>(row * columns + column)];
            made.level.push_back(places ? b.levels[code] : code - b.zero);
            made.scale.push_back(n.scale[at]);
            made.offset.push_back(n.offset[at]);
        }
    }
    made.rows += b.rows;
}

// Activations as the kernels round them: to 127 steps of the largest of 32, ties to even.
std::vector<double> rounded(const std::vector<float> &x, int64_t tokens, int64_t columns) {
    std::vector<double> out(x.size());
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t first = 0; first < columns; first += 32) {
            const int64_t last = std::min(columns, first + 32);
            float largest = 0.0f;
            for (int64_t c = first; c < last; ++c) {
                largest = std::max(largest, std::fabs(x[static_cast<size_t>(t * columns + c)]));
            }
            if (largest == 0.0f) continue;
            const float inverse = 127.0f / largest, scale = largest / 127.0f;
            for (int64_t c = first; c < last; ++c) {
                const size_t at = static_cast<size_t>(t * columns + c);
                out[at] = static_cast<double>(std::nearbyint(x[at] * inverse)) * static_cast<double>(scale);
            }
        }
    }
    return out;
}

}  // namespace

void add_block(fewbit::Matrix &matrix, const BlockSpec &b) {
    matrix.add_block(b.rows, b.span, b.bits, b.scale_type, b.zero, b.offset_type, b.super_span, b.super_type, b.levels);
}

Made make_matrix(const MatrixSpec &spec, Random &random, const std::function<void(fewbit::Matrix &)> &place) {
    Made made{spec, std::make_unique<fewbit::Matrix>(spec.columns), {}, {}, {}};
    for (const BlockSpec &b : spec.blocks) add_block(*made.matrix, b);
    place(*made.matrix);
    for (size_t i = 0; i < spec.blocks.size(); ++i) {
        fill_block(made, static_cast<int64_t>(i), spec.blocks[i], random);
    }
    if (made.matrix->row_count() != made.rows) fail("row_count of " + spec.words());
    return made;
}

Expected expected_product(const Made &made, const std::vector<float> &x, int64_t tokens) {
    const int64_t columns = made.spec.columns;
    const std::vector<double> q = rounded(x, tokens, columns);
    Expected e{std::vector<double>(static_cast<size_t>(tokens * made.rows)), {}};
    e.absolute = e.y;
    for (int64_t row = 0; row < made.rows; ++row) {
        for (int64_t c = 0; c < columns; ++c) {
            const size_t at = static_cast<size_t>(row * columns + c);
            const double scaled = static_cast<double>(made.level[at]) * static_cast<double>(made.scale[at]);
            const double offset = static_cast<double>(made.offset[at]);
            for (int64_t t = 0; t < tokens; ++t) {
                const double input = q[static_cast<size_t>(t * columns + c)];
                const size_t to = static_cast<size_t>(t * made.rows + row);
                e.y[to] += (scaled + offset) * input;
                e.absolute[to] += (std::fabs(scaled) + std::fabs(offset)) * std::fabs(input);
            }
        }
    }
    return e;
}

std::vector<float> product_of(const Made &made, const std::vector<float> &x, int64_t tokens) {
    std::vector<float> y(static_cast<size_t>(tokens * made.rows), kNan);
    // the first tokens in memory that ends with them: reading on is an error for AddressSanitizer
    const std::vector<float> exact(x.begin(), x.begin() + tokens * made.spec.columns);
    fewbit::multiply(*made.matrix, exact.data(), tokens, y.data());
    return y;
}

}  // namespace test
