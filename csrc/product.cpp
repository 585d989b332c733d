#include "product.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "numbers.h"
#include "pool.h"

namespace fewbit {
namespace {

// Quantized activations of one pass; more tokens than fit are taken in several passes over the weights.
constexpr int64_t kPassBytes = int64_t{8} << 20;
// Activations a task walks through for each of its row blocks. They stay in a core's second-level cache or near it; fewer
// would be nearer, but the more tokens share a row block, the less its unpacking weighs.
constexpr int64_t kTaskBytes = int64_t{1} << 20;
// From so many tiles on, a row block's codes are unpacked once and not once a tile.
constexpr int64_t kUnpackTiles = 3;
constexpr int64_t kLineBytes = 64;
// Tasks for each thread, so that a thread which is held up does not hold up the rest; with many tokens a task is long
// enough for more, and the last one to end leaves less to wait for.
constexpr int64_t kTasksPerThread = 4, kLongTasksPerThread = 24;
// Below this many inputs, waking threads costs more than quantizing.
constexpr int64_t kAlone = 1 << 15;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch of the calling thread, kept from call to call.
struct Scratch {
    std::vector<int8_t> codes;
    std::vector<float> scale, group_sums;
    std::vector<int32_t> sums, half_sums, start;
};

template <class T>
T *room(std::vector<T> &v, int64_t count) {
    if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
    return v.data();
}

// The activations of one pass, tile after tile in the layout of TileView.
struct Activations {
    const int8_t *codes;
    const float *scale;
    const int32_t *sums;
    int64_t tokens, blocks;

    int width(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kTile, tokens - tile * kTile)); }
    int64_t tiles() const { return ceil_div(tokens, kTile); }
};

Activations quantize_tokens(const KernelTable &k, Scratch &scratch, const float *x, int64_t tokens, int64_t columns) {
    const int64_t blocks = ceil_div(columns, kColumns);
    int8_t *codes = room(scratch.codes, tokens * blocks * kColumns);
    float *scale = room(scratch.scale, tokens * blocks);
    int32_t *sums = room(scratch.sums, tokens * blocks);
    const Activations a{codes, scale, sums, tokens, blocks};
    auto one_tile = [&](int64_t tile) {
        for (int t = 0; t < a.width(tile); ++t) {
            const int64_t at = tile * kTile * blocks;
            k.quantize(x + (tile * kTile + t) * columns, columns, codes + (at + t) * kColumns, scale + at + t,
                       sums + at + t, a.width(tile));
        }
    };
    if (tokens * columns < kAlone) {
        for (int64_t tile = 0; tile < a.tiles(); ++tile) one_tile(tile);
    } else {
        parallel_for(a.tiles(), one_tile);
    }
    return a;
}

// Sums of the activations of half blocks, tile after tile [B][2][width].
const int32_t *half_sums(Scratch &scratch, const Activations &a) {
    int32_t *out = room(scratch.half_sums, a.tokens * a.blocks * 2);
    for (int64_t tile = 0; tile < a.tiles(); ++tile) {
        const int64_t width = a.width(tile), from = tile * kTile * a.blocks;
        for (int64_t i = 0; i < a.blocks * width; ++i) {
            const int8_t *x = a.codes + (from + i) * kColumns;
            int32_t sum = 0;
            for (int c = 0; c < kColumns / 2; ++c) sum += x[c];
            int32_t *to = out + 2 * from + i / width * 2 * width + i % width;
            to[0] = sum;
            to[width] = a.sums[from + i] - sum;
        }
    }
    return out;
}

// What each integer sum starts from: codes stand for code - zero, and a kernel may multiply by code - bias. `sums` are
// those of blocks or of half blocks.
const int32_t *starts(const KernelTable &k, Scratch &scratch, int64_t count, const int32_t *sums, const BlockView &w) {
    const int32_t shift = (w.code_bits == 8 ? k.bias8 : 0) - w.zero;
    int32_t *start = room(scratch.start, count);
    for (int64_t i = 0; i < count; ++i) start[i] = shift * sums[i];
    return start;
}

// Sums of the rounded activations over each weight group, [tiles][groups][width].
const float *group_sums(Scratch &scratch, const Activations &a, const int32_t *halves, const BlockView &w) {
    if (!w.offsets) return nullptr;
    float *out = room(scratch.group_sums, a.tokens * w.groups);
    if (w.halves) {
        for (int64_t tile = 0; tile < a.tiles(); ++tile) {
            const int64_t width = a.width(tile), from = tile * kTile * a.blocks;
            for (int64_t i = 0; i < a.blocks * 2 * width; ++i) {
                const float scale = a.scale[from + i / (2 * width) * width + i % width];
                out[2 * from + i] = scale * static_cast<float>(halves[2 * from + i]);
            }
        }
        return out;
    }
    for (int64_t tile = 0; tile < a.tiles(); ++tile) {
        const int width = a.width(tile);
        const int64_t from = tile * kTile * a.blocks;
        float *to = out + tile * kTile * w.groups;
        for (int64_t g = 0; g < w.groups; ++g) {
            for (int t = 0; t < width; ++t) {
                float sum = 0.0f;
                for (int64_t b = g * w.blocks_per_group; b < std::min(a.blocks, (g + 1) * w.blocks_per_group); ++b) {
                    sum += a.scale[from + b * width + t] * static_cast<float>(a.sums[from + b * width + t]);
                }
                to[g * width + t] = sum;
            }
        }
    }
    return out;
}

// One row block times the tiles of a task; its codes stay in the caches while all tiles pass over them.
struct RowBlocks {
    const KernelTable &k;
    const BlockView &w;
    const Activations &a;
    const int32_t *start;
    const float *sums;
    float *y;
    int64_t y_stride;

    TileView tile(int64_t i) const {
        const int64_t at = i * kTile * a.blocks;
        return {a.codes + at * kColumns, a.scale + at, start + (w.halves ? 2 * at : at), sums ? sums + i * kTile * w.groups : nullptr,
                a.width(i)};
    }

    void multiply(int64_t first_row, int64_t last_row, int64_t first_tile, int64_t last_tile) const {
        const bool must = (w.tabled || w.halves) && a.tokens > 1;
        if (last_tile - first_tile == 1 && !must) return product(w, first_row, last_row, first_tile, last_tile, y);
        const bool unpacks = w.packed_bits < 8 && (must || last_tile - first_tile >= kUnpackTiles);
        for (int64_t row = first_row; row < last_row; ++row) {
            if (!unpacks) {
                product(w, row, row + 1, first_tile, last_tile, y);
                continue;
            }
            const BlockView codes = unpacked(row);
            for (int64_t i = first_tile; i < last_tile; ++i) {
                if (row + 1 < last_row) fetch(row + 1, i - first_tile, last_tile - first_tile);
                product(codes, 0, 1, i, i + 1, y + row * kRows);
            }
        }
    }

  private:
    void product(const BlockView &v, int64_t row, int64_t end, int64_t first_tile, int64_t last_tile, float *to) const {
        for (int64_t i = first_tile; i < last_tile; ++i) {
            k.product(v, tile(i), row, end, to + i * kTile * y_stride, y_stride);
        }
    }

    // Part `part` of `parts` of a row block's codes to the caches, while another is multiplied: a row block is too short
    // for the hardware to see far enough ahead.
    void fetch(int64_t row, int64_t part, int64_t parts) const {
        const int64_t lines = w.column_blocks * w.packed_bits;
        const uint8_t *from = w.codes + row * lines * kLineBytes;
        for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i) {
            __builtin_prefetch(from + i * kLineBytes, 0, 2);
        }
    }

    // The row block alone, with a byte for each code, in memory of the calling thread.
    BlockView unpacked(int64_t row) const {
        thread_local std::vector<uint8_t> codes;
        k.unpack(w, row, room(codes, w.column_blocks * kRows * kColumns));
        BlockView v = w;
        v.codes = codes.data();
        v.packed_bits = 8;
        v.tabled = false;
        v.rows = std::min<int64_t>(kRows, w.rows - row * kRows);
        const auto behind = [&](const void *all, int64_t count, int64_t width) -> const void * {
            return all ? static_cast<const uint8_t *>(all) + row * count * kRows * width : nullptr;
        };
        v.scales = behind(w.scales, w.groups, scale_bytes(w.scale_type));
        v.offsets = behind(w.offsets, w.groups, offset_bytes(w.offset_type));
        v.scale_supers = behind(w.scale_supers, w.supers, scale_bytes(w.super_type));
        v.offset_supers = behind(w.offset_supers, w.supers, 2);
        return v;
    }
};

void multiply_block(const KernelTable &k, Scratch &scratch, const Activations &a, const BlockView &w, float *y,
                    int64_t y_stride) {
    const int32_t *halves = w.halves ? half_sums(scratch, a) : nullptr;
    const int32_t *start = starts(k, scratch, a.tokens * a.blocks * (halves ? 2 : 1), halves ? halves : a.sums, w);
    const RowBlocks work{k, w, a, start, group_sums(scratch, a, halves, w), y, y_stride};
    const int64_t row_blocks = ceil_div(w.rows, kRows);
    const int64_t tile_bytes = kTile * a.blocks * kColumns;
    const int64_t most_tiles = std::clamp<int64_t>(kTaskBytes / tile_bytes, 1, a.tiles());
    const int64_t token_tasks = ceil_div(a.tiles(), most_tiles);
    const int64_t tiles_per_task = ceil_div(a.tiles(), token_tasks);
    const int64_t per_thread = tiles_per_task >= kUnpackTiles ? kLongTasksPerThread : kTasksPerThread;
    const int64_t wanted = std::max<int64_t>(1, ceil_div(threads() * per_thread, token_tasks));
    const int64_t rows_per_task = threads() == 1 ? row_blocks : ceil_div(row_blocks, std::min(row_blocks, wanted));
    const int64_t row_tasks = ceil_div(row_blocks, rows_per_task);
    parallel_for(token_tasks * row_tasks, [&](int64_t task) {
        const int64_t first_tile = task / row_tasks * tiles_per_task;
        const int64_t last_tile = std::min(a.tiles(), first_tile + tiles_per_task);
        const int64_t first_row = task % row_tasks * rows_per_task;
        const int64_t last_row = std::min(row_blocks, first_row + rows_per_task);
        work.multiply(first_row, last_row, first_tile, last_tile);
    });
}

}  // namespace

void multiply(const Matrix &matrix, const float *x, int64_t tokens, float *y) {
    thread_local Scratch scratch;
    // read once: the sets round and start their sums in ways that do not mix
    const KernelTable &k = kernels();
    const int64_t columns = matrix.column_count(), rows = matrix.row_count();
    const int64_t padded = ceil_div(columns, kColumns) * kColumns;
    const int64_t per_pass = std::max<int64_t>(8 * kTile, kPassBytes / padded / kTile * kTile);
    for (int64_t done = 0; done < tokens; done += per_pass) {
        const int64_t count = std::min(per_pass, tokens - done);
        const Activations a = quantize_tokens(k, scratch, x + done * columns, count, columns);
        for (const Block &block : matrix.blocks()) {
            multiply_block(k, scratch, a, block.view, y + done * rows + block.first_row, rows);
        }
    }
}

}  // namespace fewbit
