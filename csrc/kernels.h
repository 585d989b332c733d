// The plain data that crosses from the drivers to the per-ISA kernels, and the table of those kernels.
//
// The ISA files are compiled with wider instruction sets than the rest of the extension. A standard-library inline
// function instantiated there could be merged by the linker with the same function elsewhere and then run on a CPU
// without those instructions, so this header and everything the ISA files include stay free of the C++ library.
#pragma once

#include <stdint.h>

namespace fewbit {

// A block of packed weights is 16 rows by 32 columns.
inline constexpr int kRows = 16;
inline constexpr int kColumns = 32;
// Tokens whose activations lie side by side and share one unpacking of the weights.
inline constexpr int kTile = 8;
// Cached rows that one task of the paged attention reads.
inline constexpr int kChunk = 256;

// Scales of two levels are a byte for a group, without or with a sign, times a number for several groups (a "super").
enum class Scalar : int { f32 = 0, f16 = 1, bf16 = 2, steps = 3, signed_steps = 4 };

// What a group adds to scale * code: nothing, a number of its own, -scale * zero with a byte for its zero point, or
// -(byte * super), with halves for supers.
enum class Offsets : int { none = 0, f32 = 1, f16 = 2, zeros = 3, steps = 4 };

// Of the gate in a gated product. gelu_tanh is GELU with tanh in the place of the error function.
enum class Activation : int { silu = 0, gelu_tanh = 1 };

// What a cached head of a token is: `width` numbers, of int8 with their scale (bf16) behind them, of int4 (two a byte)
// with a scale and a least number (f16) for each group.
enum class CacheType : int { f32 = 0, f16 = 1, int8 = 2, int4 = 3 };
constexpr int64_t kCachedGroup = 32;

constexpr int64_t head_bytes(CacheType type, int64_t width) {
    if (type == CacheType::int8) return width + 2;
    if (type == CacheType::int4) return width / 2 + 4 * ((width + kCachedGroup - 1) / kCachedGroup);
    return type == CacheType::f16 ? 2 * width : 4 * width;
}

// Rows that share code width, span, scale type and kind of zero. Layouts, with B = ceil(columns / 32):
//   codes    [row_blocks][B][64 * packed_bits]: quad q (columns 4q..4q+3) of row r lies at bytes 4r..4r+3 of a line of
//            64 bytes. 8 bits: line q. Else a plane of the low 4 bits (2 below 4 bits), then one of the bits that are
//            left: a plane of p bits has p lines, line i holds quads 8i/p .. 8(i+1)/p - 1, the first in the lowest bits
//   scales   [row_blocks][groups][16]
//   offsets  [row_blocks][groups][16] of `offset_type`, null where `zero` is a constant
//   supers   [row_blocks][supers][16], one for scales of two levels and one for their offsets, else null
struct BlockView {
    const uint8_t *codes;
    const void *scales;
    const void *offsets;
    const void *scale_supers;
    const void *offset_supers;
    int64_t rows;
    int64_t columns;
    int64_t column_blocks;
    int64_t groups;
    int64_t blocks_per_group;
    bool halves;        // a group is half a block, 16 columns; `groups` is even
    int64_t supers;
    int super_shift;    // group g belongs to super g >> super_shift
    Scalar super_type;  // of scales: f32 or f16
    int code_bits;      // codes, or what the table makes of them, are below 2^code_bits
    int packed_bits;    // what a code takes: code_bits, or 8; 3 or 4 with a table
    Scalar scale_type;
    Offsets offset_type;
    int32_t zero;
    bool tabled;        // a code is the place of a level in the table, and the level what is multiplied
    alignas(16) uint8_t table[16];
};

// Activations of one tile of up to kTile tokens ("width"), interleaved so that one pointer walks through them:
//   codes [B][width][32] int8, scale [B][width], start [B][width] (what the integer sum starts from),
//   group_sums [groups][width]: sum of the rounded activations over each weight group (null without offsets)
// Where weights' groups are half blocks, `start` is [B][2][width].
struct TileView {
    const int8_t *codes;
    const float *scale;
    const int32_t *start;
    const float *group_sums;
    int width;
};

// One task of paged attention: `fresh` new tokens of a sequence, one key-value head, cached rows [begin, end).
struct AttendTask {
    const float *q;          // first new token, first query head of this key-value head
    int64_t q_stride;        // floats from a token's heads to the next token's
    const uint8_t *k_cache;  // [rows][kv_heads][head_bytes], already at this head
    const uint8_t *v_cache;
    CacheType type;
    int64_t row_bytes;       // from one cached row to the next
    const int64_t *pages;    // page table of the sequence
    int64_t page_size;
    int64_t begin, end, length;
    int fresh, group;        // query heads that share the key-value head
    int width;               // a multiple of 16
    float scale;
    int64_t window;          // rows a token sees, the last ones; 0: all
    float soft_cap;          // scores become cap * tanh(score / cap); 0: they stay
    float *scores;           // scratch [fresh * group][kChunk]
    float *copies;           // scratch [2][kChunk][width]
    float *sums;             // out [fresh * group][width + 2]: weighted values, sum of weights, largest score
};

struct KernelTable {
    const char *name;
    // 8-bit codes are multiplied as code - bias, so that 16-bit sums never saturate
    int32_t bias8;
    // One token's activations to int8; consecutive blocks of 32 are `step` tokens apart in the tile.
    void (*quantize)(const float *x, int64_t columns, int8_t *codes, float *scale, int32_t *sums, int step);
    // Output rows of row blocks [begin, end) for one tile; y is the tile's first token.
    void (*product)(const BlockView &, const TileView &, int64_t begin, int64_t end, float *y, int64_t y_stride);
    // The codes of a row block, or what the table makes of them, as packed_bits = 8, [column_blocks][8 * 64]: worth it
    // for many tokens.
    void (*unpack)(const BlockView &, int64_t row_block, uint8_t *out);
    void (*rms_norm)(const float *x, const float *weight, float *y, int64_t n, float eps);
    void (*gated)(Activation activation, const float *gate, const float *up, float *y, int64_t n);
    void (*attend)(const AttendTask &);
    // The ceilings (ceilings.inl): the OR of some bytes; rounds of products, returning the multiply-adds done.
    uint32_t (*read_bits)(const uint8_t *p, int64_t bytes);
    int64_t (*dots)(int64_t rounds, const uint8_t *w, const int8_t *x, uint32_t *total);
};

extern const KernelTable kScalarKernels;
#if defined(FEWBIT_X86)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#elif defined(FEWBIT_ARM64)
extern const KernelTable kNeonKernels;
extern const KernelTable kNeonI8mmKernels;
#endif

}  // namespace fewbit
