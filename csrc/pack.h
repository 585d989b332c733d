// Weights in the layout of kernels.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace fewbit {

// Zeroed memory on a cache line's border, large ones on huge pages where the system has them.
class Buffer {
  public:
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    uint8_t *data() const { return data_; }
    size_t size() const { return size_; }

  private:
    uint8_t *data_;
    size_t size_;
};

// Where the parts of a block lie in its memory, in bytes; each begins on a cache line's border.
struct Parts {
    size_t codes, scales, offsets, scale_supers, offset_supers;
    size_t end;
};

// Counted up when what lies in a block's memory changes: layouts that were kept are then made anew.
inline constexpr int kLayout = 3;

// Rows that agree in everything a BlockView says.
struct Block {
    BlockView view;
    int64_t first_row;
    int64_t span, super_span;
    Parts parts;
};

// A matrix [rows, columns] of one or several blocks of rows. First its blocks are told, then it gets memory for all of
// them in one piece: its own, or a range of someone else's (a mapped file).
class Matrix {
  public:
    explicit Matrix(int64_t columns) : columns_(columns) {}
    Matrix(const Matrix &) = delete;
    Matrix &operator=(const Matrix &) = delete;

    // `rows` more rows; returns the block's index. `span` is a multiple of 32 or at least `columns`, or 16 where
    // `columns` are whole blocks. Scales of two levels have a super of `super_type` for each `super_span` columns, of
    // which there are a power of two in a span. With `levels`, from -127 to 127, codes are places in that list.
    int64_t add_block(int64_t rows, int64_t span, int code_bits, int scale_type, int32_t zero, int offset_type,
                      int64_t super_span = 0, int super_type = 0, const std::vector<int> &levels = {});

    // Zeroed memory of its own.
    void allocate();

    // Memory that `owner` keeps alive, `bytes` of exactly nbytes() from a cache line's border on. Where it may be
    // written it is zeroed, to be filled; else it holds what `fill` left in another matrix of the same blocks.
    void place(uint8_t *memory, size_t bytes, bool writable, std::shared_ptr<const void> owner);

    // Fill rows [first, first + count) of a block from codes [count][columns] uint8, scales [count][groups] of the
    // block's type, offsets [count][groups] of the block's type and supers [count][supers] of both (null without).
    void fill(int64_t block, int64_t first, int64_t count, const uint8_t *codes, const void *scales,
              const void *offsets, const void *scale_supers = nullptr, const void *offset_supers = nullptr);

    // Dequantized rows `ids` [count] to y [count][columns]. False, with nothing written, where an id is out of range.
    bool rows(const int64_t *ids, int64_t count, float *y) const;

    int64_t row_count() const { return rows_; }
    int64_t column_count() const { return columns_; }
    int64_t nbytes() const { return static_cast<int64_t>(bytes_); }
    // Throws where there is no memory yet.
    void expect_memory() const;
    const std::vector<Block> &blocks() const { return blocks_; }

  private:
    int64_t columns_;
    int64_t rows_ = 0;
    size_t bytes_ = 0;
    std::vector<Block> blocks_;
    std::shared_ptr<const void> owner_;
    uint8_t *memory_ = nullptr;
    bool writable_ = false;
};

}  // namespace fewbit
