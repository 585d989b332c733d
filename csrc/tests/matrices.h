// Random matrices beside what they mean.
#pragma once

#include <functional>
#include <memory>

#include "check.h"
#include "pack.h"

namespace test {

inline constexpr int kWidths[] = {2, 3, 4, 5, 6, 8};

struct BlockSpec {
    int64_t rows, span;
    int bits, scale_type;
    int32_t zero;
    int offset_type;
    // scales of two levels (types 3 and 4), and a table
    int64_t super_span = 0;
    int super_type = 0;
    std::vector<int> levels = {};
};

void add_block(fewbit::Matrix &matrix, const BlockSpec &b);

// Extremes: codes are 0 or the largest, so that a sum which can overflow does.
struct MatrixSpec {
    int64_t columns;
    std::vector<BlockSpec> blocks;
    bool extremes;

    std::string words() const {
        std::string text = say("%lld columns", static_cast<long long>(columns));
        for (const BlockSpec &b : blocks) {
            text += say(", [%lld rows, span %lld, %d bits, scales %d, zero %d, offsets %d, supers %d for %lld, %zu levels]",
                        static_cast<long long>(b.rows), static_cast<long long>(b.span), b.bits, b.scale_type, b.zero,
                        b.offset_type, b.super_type, static_cast<long long>(b.super_span), b.levels.size());
        }
        return text;
    }
};

// A matrix in the library's layout and, row by row, what it was filled from.
struct Made {
    MatrixSpec spec;
    std::unique_ptr<fewbit::Matrix> matrix;
    // value [row][column] = level * scale + offset
    std::vector<int32_t> level;
    std::vector<float> scale, offset;
    int64_t rows = 0;
};

// `place` gives it memory, of its own unless told otherwise.
Made make_matrix(const MatrixSpec &spec, Random &random,
                 const std::function<void(fewbit::Matrix &)> &place = [](fewbit::Matrix &m) { m.allocate(); });

// y [tokens][rows] and, for each, the sum of absolute products: a loop over the definition, in double.
struct Expected {
    std::vector<double> y, absolute;
};
Expected expected_product(const Made &made, const std::vector<float> &x, int64_t tokens);

std::vector<float> product_of(const Made &made, const std::vector<float> &x, int64_t tokens);

}  // namespace test
