// Weights in the layout of kernels.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fewbit {

// Zeroed memory on a cache line's border, large ones on huge pages where the system has them.
class Buffer {
  public:
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(Buffer &&other) noexcept;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    Buffer &operator=(Buffer &&) = delete;

    uint8_t *data() const { return data_; }
    size_t size() const { return size_; }

  private:
    uint8_t *data_;
    size_t size_;
};

// Rows that agree in everything a BlockView says.
struct Block {
    Buffer codes, scales, offsets;
    BlockView view;
    int64_t first_row;
};

// A matrix [rows, columns] of one or several blocks of rows.
class Matrix {
  public:
    explicit Matrix(int64_t columns) : columns_(columns) {}
    Matrix(const Matrix &) = delete;
    Matrix &operator=(const Matrix &) = delete;

    // Room for `rows` more rows; returns the block's index. `span` is a multiple of 32 or at least `columns`.
    int64_t add_block(int64_t rows, int64_t span, int code_bits, int scale_type, int32_t zero, bool offsets);

    // Fill rows [first, first + count) of a block from codes [count][columns] uint8, scales [count][groups] of the
    // block's type and offsets [count][groups] float32 (null without).
    void fill(int64_t block, int64_t first, int64_t count, const uint8_t *codes, const void *scales,
              const float *offsets);

    // Dequantized rows `ids` [count] to y [count][columns]. False, with nothing written, where an id is out of range.
    bool rows(const int64_t *ids, int64_t count, float *y) const;

    int64_t row_count() const { return rows_; }
    int64_t column_count() const { return columns_; }
    int64_t nbytes() const;
    const std::vector<Block> &blocks() const { return blocks_; }

  private:
    int64_t columns_;
    int64_t rows_ = 0;
    std::vector<Block> blocks_;
};

}  // namespace fewbit
