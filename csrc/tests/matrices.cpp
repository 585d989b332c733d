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

// Offsets of a block: as stored, and their values.
struct Offsets {
    std::vector<uint8_t> bytes;
    std::vector<float> values;
    int64_t width;
};

Offsets random_offsets(int type, const Scales &scales, Random &random) {
    const auto count = static_cast<int64_t>(scales.values.size());
    if (type == 1 || type == 2) {
        const Scales s = random_scales(type - 1, count, random);
        return {s.bytes, s.values, type == 1 ? 4 : 2};
    }
    Offsets found{{}, std::vector<float>(scales.values.size()), 1};
    if (type == 0) return found;
    for (size_t i = 0; i < scales.values.size(); ++i) {
        found.bytes.push_back(static_cast<uint8_t>(random.whole(0, 255)));
        found.values[i] = -(scales.values[i] * static_cast<float>(found.bytes[i]));
    }
    return found;
}

void fill_block(Made &made, int64_t index, const BlockSpec &b, Random &random) {
    const int64_t columns = made.spec.columns, span = std::min(b.span, columns), groups = (columns + span - 1) / span;
    const int64_t top = (int64_t{1} << b.bits) - 1;
    std::vector<uint8_t> codes(static_cast<size_t>(b.rows * columns));
    for (uint8_t &c : codes) {
        c = static_cast<uint8_t>(made.spec.extremes ? random.whole(0, 3) ? top : 0 : random.whole(0, top));
    }
    const Scales scales = random_scales(b.scale_type, b.rows * groups, random);
    const Offsets offsets = random_offsets(b.offset_type, scales, random);
    // in two pieces, as a reader of slices does
    const int64_t cut = random.whole(0, b.rows);
    for (const auto &[first, count] : {std::pair{int64_t{0}, cut}, std::pair{cut, b.rows - cut}}) {
        const int64_t scale_bytes = b.scale_type == 0 ? 4 : 2;
        made.matrix->fill(index, first, count, codes.data() + first * columns,
                          scales.bytes.data() + first * groups * scale_bytes,
                          b.offset_type ? offsets.bytes.data() + first * groups * offsets.width : nullptr);
    }
    for (int64_t row = 0; row < b.rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            const size_t at = static_cast<size_t>(row * groups + column / span);
            made.level.push_back(codes[static_cast<size_t>(row * columns + column)] - b.zero);
            made.scale.push_back(scales.values[at]);
            made.offset.push_back(offsets.values[at]);
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

Made make_matrix(const MatrixSpec &spec, Random &random, const std::function<void(fewbit::Matrix &)> &place) {
    Made made{spec, std::make_unique<fewbit::Matrix>(spec.columns), {}, {}, {}};
    for (const BlockSpec &b : spec.blocks) {
        made.matrix->add_block(b.rows, b.span, b.bits, b.scale_type, b.zero, b.offset_type);
    }
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
