#include "pack.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "numbers.h"
#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fewbit {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a quad's bits lie in a plane of `bits` a code: the row's word of a line, and the shift in it.
uint8_t *word_of(uint8_t *plane, int bits, int lane, int64_t quad) { return plane + quad * bits / 8 * 64 + lane * 4; }
int shift_of(int bits, int64_t quad) { return static_cast<int>(quad % (8 / bits)) * bits; }

int low_plane(int packed_bits) { return packed_bits == 8 ? 8 : packed_bits >= 4 ? 4 : 2; }

void add_bits(uint8_t *plane, int bits, int lane, int64_t quad, uint32_t codes) {
    uint8_t *at = word_of(plane, bits, lane, quad);
    uint32_t word;
    std::memcpy(&word, at, 4);
    word |= (codes & 0x01010101u * ((1u << bits) - 1)) << shift_of(bits, quad);
    std::memcpy(at, &word, 4);
}

// Zeroed codes of a row get their values.
void fill_row(const BlockView &w, uint8_t *codes, int64_t row, const uint8_t *from) {
    const int low = low_plane(w.packed_bits), high = w.packed_bits - low;
    const int64_t bytes = int64_t{64} * w.packed_bits;
    uint8_t *blocks = codes + row / kRows * w.column_blocks * bytes;
    const int lane = static_cast<int>(row % kRows);
    for (int64_t column = 0; column < w.columns; column += 4) {
        uint32_t four = 0;
        std::memcpy(&four, from + column, static_cast<size_t>(std::min<int64_t>(4, w.columns - column)));
        uint8_t *block = blocks + column / kColumns * bytes;
        const int64_t quad = column % kColumns / 4;
        add_bits(block, low, lane, quad, four);
        if (high) add_bits(block + 64 * low, high, lane, quad, four >> low);
    }
}

// A row's group: where its numbers lie, and its super's.
struct Place {
    int64_t group, super;
};

Place place_of(const BlockView &w, int64_t row, int64_t column) {
    const int64_t g = w.halves ? column / (kColumns / 2) : column / kColumns / w.blocks_per_group;
    const int64_t block = row / kRows, lane = row % kRows;
    return {(block * w.groups + g) * kRows + lane, (block * w.supers + (g >> w.super_shift)) * kRows + lane};
}

float load_scale(const BlockView &w, Place at) {
    if (w.scale_type <= Scalar::bf16) return load_scalar(w.scales, at.group, w.scale_type);
    const float super = load_scalar(w.scale_supers, at.super, w.super_type);
    const uint8_t step = static_cast<const uint8_t *>(w.scales)[at.group];
    if (w.scale_type == Scalar::steps) return super * static_cast<float>(step);
    return super * static_cast<float>(static_cast<int8_t>(step));
}

float load_offset(const BlockView &w, Place at) {
    switch (w.offset_type) {
        case Offsets::zeros:
            return -load_scale(w, at) * static_cast<float>(static_cast<const uint8_t *>(w.offsets)[at.group]);
        case Offsets::steps:
            return -load_scalar(w.offset_supers, at.super, Scalar::f16) *
                   static_cast<float>(static_cast<const uint8_t *>(w.offsets)[at.group]);
        case Offsets::f16: return load_scalar(w.offsets, at.group, Scalar::f16);
        default: return load_scalar(w.offsets, at.group, Scalar::f32);
    }
}

void read_row(const BlockView &w, int64_t row, float *y) {
    const int low = low_plane(w.packed_bits), high = w.packed_bits - low;
    const int64_t bytes = int64_t{64} * w.packed_bits;
    uint8_t *blocks = const_cast<uint8_t *>(w.codes) + row / kRows * w.column_blocks * bytes;
    const int lane = static_cast<int>(row % kRows);
    for (int64_t column = 0; column < w.columns; ++column) {
        uint8_t *block = blocks + column / kColumns * bytes;
        const int64_t quad = column % kColumns / 4;
        const auto bits_at = [&](uint8_t *plane, int bits) {
            return word_of(plane, bits, lane, quad)[column % 4] >> shift_of(bits, quad) & ((1 << bits) - 1);
        };
        int32_t code = bits_at(block, low);
        if (high) code |= bits_at(block + 64 * low, high) << low;
        if (w.tabled) code = w.table[code];
        const Place at = place_of(w, row, column);
        const float value = static_cast<float>(code - w.zero) * load_scale(w, at);
        y[column] = w.offsets ? value + load_offset(w, at) : value;
    }
}

// Codes, scales, offsets, supers: the one place that says in what order.
Parts parts_of(const BlockView &w) {
    const auto row_blocks = static_cast<size_t>(ceil_div(w.rows, kRows));
    const size_t per_group = row_blocks * static_cast<size_t>(w.groups) * kRows;
    const auto lines = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    Parts parts{};
    parts.scales = parts.codes + lines(row_blocks * static_cast<size_t>(w.column_blocks) * 64 * w.packed_bits);
    const size_t per_super = row_blocks * static_cast<size_t>(w.supers) * kRows;
    parts.offsets = parts.scales + lines(per_group * static_cast<size_t>(scale_bytes(w.scale_type)));
    parts.scale_supers = parts.offsets + lines(per_group * static_cast<size_t>(offset_bytes(w.offset_type)));
    parts.offset_supers = parts.scale_supers + lines(per_super * static_cast<size_t>(scale_bytes(w.super_type)));
    parts.end = parts.offset_supers + lines(w.offset_type == Offsets::steps ? per_super * 2 : 0);
    return parts;
}

void set_supers(BlockView &view, int64_t span, int64_t super_span, int super_type) {
    const bool two_levels = view.scale_type > Scalar::bf16;
    if (!two_levels && (super_span != 0 || super_type != 0 || view.offset_type == Offsets::steps)) {
        throw std::invalid_argument("supers belong to scales of two levels");
    }
    if (!two_levels) return;
    const int64_t most = int64_t{1} << 20;
    if (super_type < 0 || super_type > 1 || super_span < span || super_span > most || super_span % span != 0 ||
        (super_span / span & (super_span / span - 1)) != 0) {
        throw std::invalid_argument("supers are of type 0 or 1, for a power of two times a span");
    }
    view.super_type = static_cast<Scalar>(super_type);
    while (span << view.super_shift < super_span) ++view.super_shift;
    view.supers = ceil_div(view.groups, int64_t{1} << view.super_shift);
}

// Levels become bytes around 128, and are multiplied like codes of 8 bits.
void set_levels(BlockView &view, const std::vector<int> &levels) {
    if (levels.empty()) return;
    const int bits = view.packed_bits;
    if ((bits != 3 && bits != 4) || levels.size() > size_t{1} << bits || view.zero != 0) {
        throw std::invalid_argument("a table has at most 8 or 16 levels for codes of 3 or 4 bits, and no zero beside it");
    }
    for (size_t i = 0; i < sizeof view.table; ++i) {
        const int level = i < levels.size() ? levels[i] : 0;
        if (level < -127 || level > 127) throw std::invalid_argument("levels are -127 to 127");
        view.table[i] = static_cast<uint8_t>(level + 128);
    }
    view.tabled = true;
    view.zero = 128;
    view.code_bits = 8;
}

// A row's numbers to where every 16th is its own.
void spread(void *all, int64_t first, const void *from, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
        std::memcpy(static_cast<uint8_t *>(all) + (first + i * kRows) * width,
                    static_cast<const uint8_t *>(from) + i * width, static_cast<size_t>(width));
    }
}

}  // namespace

Buffer::Buffer(size_t bytes) : data_(nullptr), size_(bytes) {
    if (bytes == 0) return;
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    data_ = static_cast<uint8_t *>(::operator new(bytes, std::align_val_t(alignment)));
#if defined(__linux__)
    // a wish only: where it is refused, small pages serve
    if (alignment == kHugePage) (void)madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    std::memset(data_, 0, bytes);
}

Buffer::~Buffer() {
    if (data_) ::operator delete(data_, std::align_val_t(size_ >= kHugePage ? kHugePage : 64));
}

int64_t Matrix::add_block(int64_t rows, int64_t span, int code_bits, int scale_type, int32_t zero, int offset_type,
                          int64_t super_span, int super_type, const std::vector<int> &levels) {
    if (memory_) throw std::invalid_argument("blocks are told before there is memory for them");
    // a bound, so that no product of these overflows
    constexpr int64_t kMost = int64_t{1} << 31;
    if (rows > kMost || columns_ > kMost || rows_ > kMost) throw std::invalid_argument("the matrix is too large");
    const bool halves = span == kColumns / 2 && span < columns_;
    if (rows <= 0 || columns_ <= 0 || span <= 0 || (!halves && span % kColumns != 0 && span < columns_) ||
        (halves && columns_ % kColumns != 0)) {
        throw std::invalid_argument(
            "a block needs rows and a span that is a multiple of 32 or covers the row, or 16 in rows of whole blocks");
    }
    if (code_bits < 2 || code_bits > 8 || code_bits == 7 || (halves && code_bits == 5) || scale_type < 0 ||
        scale_type > 4 || zero < 0 || zero > 255 || offset_type < 0 || offset_type > 4) {
        throw std::invalid_argument(
            "codes take 2 to 6 or 8 bits, scale types are 0 to 4, zero is 0 to 255, offset types are 0 to 4");
    }
    BlockView view{};
    view.rows = rows;
    view.columns = columns_;
    view.column_blocks = ceil_div(columns_, kColumns);
    view.halves = halves;
    view.blocks_per_group = halves ? 1 : span >= columns_ ? view.column_blocks : span / kColumns;
    view.groups = halves ? 2 * view.column_blocks : ceil_div(view.column_blocks, view.blocks_per_group);
    view.code_bits = view.packed_bits = code_bits;
    view.scale_type = static_cast<Scalar>(scale_type);
    view.offset_type = static_cast<Offsets>(offset_type);
    view.zero = zero;
    set_supers(view, std::min(span, columns_), super_span, super_type);
    set_levels(view, levels);
    const Parts parts = parts_of(view);
    if (bytes_ > size_t{1} << 48 || parts.end > size_t{1} << 48) throw std::invalid_argument("the matrix is too large");
    blocks_.push_back({view, rows_, std::min(span, columns_), super_span, parts});
    rows_ += rows;
    bytes_ += parts.end;
    return static_cast<int64_t>(blocks_.size()) - 1;
}

void Matrix::allocate() {
    auto own = std::make_shared<Buffer>(bytes_);
    uint8_t *memory = own->data();
    place(memory, bytes_, true, std::move(own));
}

void Matrix::place(uint8_t *memory, size_t bytes, bool writable, std::shared_ptr<const void> owner) {
    if (memory_) throw std::invalid_argument("the matrix has memory");
    if (!memory || bytes_ == 0 || bytes != bytes_ || reinterpret_cast<uintptr_t>(memory) % 64 != 0) {
        throw std::invalid_argument("the memory does not fit the blocks");
    }
    memory_ = memory;
    writable_ = writable;
    owner_ = std::move(owner);
    for (Block &block : blocks_) {
        block.view.codes = memory + block.parts.codes;
        block.view.scales = memory + block.parts.scales;
        if (block.view.offset_type != Offsets::none) block.view.offsets = memory + block.parts.offsets;
        if (block.view.supers != 0) block.view.scale_supers = memory + block.parts.scale_supers;
        if (block.view.offset_type == Offsets::steps) block.view.offset_supers = memory + block.parts.offset_supers;
        memory += block.parts.end;
    }
}

void Matrix::expect_memory() const {
    if (!memory_) throw std::invalid_argument("the matrix has no memory yet");
}

void Matrix::fill(int64_t index, int64_t first, int64_t count, const uint8_t *codes, const void *scales,
                  const void *offsets, const void *scale_supers, const void *offset_supers) {
    if (index < 0 || index >= static_cast<int64_t>(blocks_.size())) throw std::invalid_argument("no such block");
    if (!writable_) throw std::invalid_argument("the matrix has no memory to fill");
    const BlockView &w = blocks_[static_cast<size_t>(index)].view;
    if (first < 0 || count < 0 || first > w.rows - count) throw std::invalid_argument("rows lie outside the block");
    if ((offsets != nullptr) != (w.offsets != nullptr)) throw std::invalid_argument("offsets do not fit the block");
    if ((scale_supers != nullptr) != (w.scale_supers != nullptr) ||
        (offset_supers != nullptr) != (w.offset_supers != nullptr)) {
        throw std::invalid_argument("supers do not fit the block");
    }
    const struct {
        const void *to, *from;
        int64_t count, width;
    } parts[] = {{w.scales, scales, w.groups, scale_bytes(w.scale_type)},
                 {w.offsets, offsets, w.groups, offset_bytes(w.offset_type)},
                 {w.scale_supers, scale_supers, w.supers, scale_bytes(w.super_type)},
                 {w.offset_supers, offset_supers, w.supers, 2}};
    constexpr int64_t kStep = 16;
    // rows share no byte, so any split among threads is safe
    parallel_for(ceil_div(count, kStep), [&](int64_t task) {
        for (int64_t i = task * kStep; i < std::min(count, (task + 1) * kStep); ++i) {
            const int64_t row = first + i;
            fill_row(w, const_cast<uint8_t *>(w.codes), row, codes + i * w.columns);
            for (const auto &part : parts) {
                if (!part.from) continue;
                const int64_t at = row / kRows * part.count * kRows + row % kRows;
                const auto *from = static_cast<const uint8_t *>(part.from) + i * part.count * part.width;
                spread(const_cast<void *>(part.to), at, from, part.count, part.width);
            }
        }
    });
}

bool Matrix::rows(const int64_t *ids, int64_t count, float *y) const {
    expect_memory();
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= rows_) return false;
    }
    parallel_for(ceil_div(count, 16), [&](int64_t task) {
        for (int64_t i = task * 16; i < std::min(count, (task + 1) * 16); ++i) {
            const auto after = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block &b) {
                return ids[i] < b.first_row + b.view.rows;
            });
            const int64_t row = ids[i] - after->first_row;
            float *to = y + i * columns_;
            read_row(after->view, row, to);
        }
    });
    return true;
}

}  // namespace fewbit
