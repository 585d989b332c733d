// The product of packed weights and int8 activations, included by each ISA file after its `Isa` and planes.inl.
//
// `Isa` computes `lanes` rows and up to `tokens` tokens at once (8, or 1) and provides, for codes below 2^Bits:
//   Floats, Sum, Codes<Bits>     vectors of floats, of integer sums, of one quad (4 columns) of codes for each row
//   codes<Bits>(line)
//   begin<Bits>(start), dot<Bits>(sum, a, b, x): two quads times 8 activations, finish<Bits>(sum, start)
// `Packed` is what a code takes in memory: Bits, or 8 where a row block was unpacked for many tokens, or what the place
// in a table takes.
// Every output sees the same sequence of operations whatever the tile's width, so results do not depend on the batch.

namespace fewbit {
namespace {

// Codes are fetched to the second-level cache so many bytes before they are needed: the hardware sees their stream too,
// but not far enough ahead beside the activations of several tokens.
constexpr int kAhead = 8192;

// Always inlined: a call would put every sum that is held in a register into memory and back.
#define FEWBIT_INLINE inline __attribute__((always_inline))

// The scales of `lanes` rows, group after group; pointers move on, so that a group costs few instructions.
class Scales {
  public:
    FEWBIT_INLINE Scales(const BlockView &w, int64_t row_block, int part)
        : type_(w.scale_type),
          super_type_(w.super_type),
          offset_type_(w.offset_type),
          per_super_(1 << w.super_shift),
          scale_(behind(w.scales, row_block * w.groups, part, scale_bytes(w.scale_type))),
          offset_(behind(w.offsets, row_block * w.groups, part, offset_bytes(w.offset_type))),
          super_(behind(w.scale_supers, row_block * w.supers, part, scale_bytes(w.super_type))),
          offset_super_(behind(w.offset_supers, row_block * w.supers, part, 2)) {}

    // Of the next group.
    FEWBIT_INLINE Isa::Floats next() {
        const uint8_t *at = scale_;
        scale_ += kRows * scale_bytes(type_);
        if (type_ <= Scalar::bf16) return Isa::load_scales(at, 0, type_);
        if (left_ == 0) next_super();
        --left_;
        return times(type_ == Scalar::steps ? Isa::load_bytes(at) : Isa::load_signed(reinterpret_cast<const int8_t *>(at)),
                     super_value_);
    }

    // What the group adds whose scale `next` gave last.
    FEWBIT_INLINE Isa::Floats offset(Isa::Floats scale) {
        const uint8_t *at = offset_;
        offset_ += kRows * offset_bytes(offset_type_);
        if (offset_type_ == Offsets::f16) return Isa::load_scales(at, 0, Scalar::f16);
        if (offset_type_ == Offsets::f32) return Isa::load_scales(at, 0, Scalar::f32);
        return times(Isa::load_bytes(at), offset_type_ == Offsets::steps ? offset_super_value_ : negative(scale));
    }

  private:
    FEWBIT_INLINE void next_super() {
        left_ = per_super_;
        super_value_ = Isa::load_scales(super_, 0, super_type_);
        super_ += kRows * scale_bytes(super_type_);
        if (offset_type_ != Offsets::steps) return;
        offset_super_value_ = negative(Isa::load_scales(offset_super_, 0, Scalar::f16));
        offset_super_ += kRows * 2;
    }
    static FEWBIT_INLINE const uint8_t *behind(const void *all, int64_t groups, int part, int64_t bytes) {
        return all ? static_cast<const uint8_t *>(all) + (groups * kRows + part * Isa::lanes) * bytes : nullptr;
    }
    static FEWBIT_INLINE Isa::Floats times(Isa::Floats a, Isa::Floats b) { return Isa::multiply_add(a, b, Isa::zero()); }
    static FEWBIT_INLINE Isa::Floats negative(Isa::Floats a) { return times(a, Isa::splat(-1.0f)); }

    const Scalar type_, super_type_;
    const Offsets offset_type_;
    const int per_super_;
    int left_ = 0;
    const uint8_t *scale_, *offset_, *super_, *offset_super_;
    typename Isa::Floats super_value_ = Isa::zero(), offset_super_value_ = Isa::zero();
};

// Pairs of quads [Pair, End) of a block times the activations behind `x`.
template <class K, int T, int Pair, int End>
inline void add_pairs(const uint8_t *block, int part, const typename Isa::Line &table, const int8_t *x,
                      typename Isa::Sum (&acc)[T]) {
    if constexpr (Pair < End) {
        constexpr int kBits = K::bits;
        const auto a = Isa::template codes<kBits>(levels_of<K::packed, 2 * Pair, K::tabled>(block, part, table));
        const auto b = Isa::template codes<kBits>(levels_of<K::packed, 2 * Pair + 1, K::tabled>(block, part, table));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[t] = Isa::template dot<kBits>(acc[t], a, b, x + t * kColumns + Pair * 8);
        add_pairs<K, T, Pair + 1, End>(block, part, table, x, acc);
    }
}

// Half a block times T tokens, as whole numbers: `half` 0 or 1.
template <class K, int T, int Half>
inline void half_sums(const uint8_t *block, int part, const typename Isa::Line &table, const int8_t *x,
                      const int32_t *start, typename Isa::Floats (&sum)[T]) {
    typename Isa::Sum acc[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t] = Isa::template begin<K::bits>(start[t]);
    add_pairs<K, T, Half * kQuads / 4, (Half + 1) * kQuads / 4>(block, part, table, x, acc);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[t] = Isa::template finish<K::bits>(acc[t], start[t]);
}

// Rows whose groups are half blocks.
template <class K, int T>
void product_halves(const BlockView &w, const TileView &x, int64_t row_block, int part, float (&out)[T][Isa::lanes]) {
    constexpr int kBytes = K::packed * kLine;
    using Floats = Isa::Floats;
    const typename Isa::Line table = Isa::load_table(w.table);
    Scales scales(w, row_block, part);
    const uint8_t *codes = w.codes + row_block * w.column_blocks * kBytes;
    Floats y[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t] = Isa::zero();
    for (int64_t block = 0; block < w.column_blocks; ++block) {
        const int8_t *xq = x.codes + block * x.width * kColumns;
        const int32_t *start = x.start + block * 2 * x.width;
        for (int i = 0; i < K::packed; ++i) __builtin_prefetch(codes + kAhead + i * kLine, 0, 2);
        const Floats first = scales.next();
        // before the second half's super, which may be another
        Floats offset = w.offsets ? scales.offset(first) : first;
        const Floats second = scales.next();
        Floats a[T], b[T];
        half_sums<K, T, 0>(codes, part, table, xq, start, a);
        half_sums<K, T, 1>(codes, part, table, xq, start + x.width, b);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const Floats sum = Isa::multiply_add(b[t], second, Isa::multiply_add(a[t], first, Isa::zero()));
            y[t] = Isa::multiply_add(sum, Isa::splat(x.scale[block * x.width + t]), y[t]);
        }
        codes += kBytes;
        if (!w.offsets) continue;
        const float *sums = x.group_sums + 2 * block * x.width;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) y[t] = Isa::multiply_add(offset, Isa::splat(sums[t]), y[t]);
        offset = scales.offset(second);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) y[t] = Isa::multiply_add(offset, Isa::splat(sums[x.width + t]), y[t]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) Isa::store(out[t], y[t]);
}

// Rows whose groups are whole blocks.
template <class K, int T>
void product_rows(const BlockView &w, const TileView &x, int64_t row_block, int part, float (&out)[T][Isa::lanes]) {
    constexpr int kBytes = K::packed * kLine;
    using Floats = Isa::Floats;
    const typename Isa::Line table = Isa::load_table(w.table);
    Scales scales(w, row_block, part);
    const uint8_t *codes = w.codes + row_block * w.column_blocks * kBytes;
    const int8_t *xq = x.codes;
    const float *xscale = x.scale;
    const int32_t *start = x.start;
    Floats y[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t] = Isa::zero();
    int64_t block = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t end = block + w.blocks_per_group < w.column_blocks ? block + w.blocks_per_group : w.column_blocks;
        Floats sum[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[t] = Isa::zero();
        for (; block < end; ++block) {
            typename Isa::Sum acc[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) acc[t] = Isa::template begin<K::bits>(start[t]);
            for (int i = 0; i < K::packed; ++i) __builtin_prefetch(codes + kAhead + i * kLine, 0, 2);
            add_pairs<K, T, 0, kQuads / 2>(codes, part, table, xq, acc);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                sum[t] = Isa::multiply_add(Isa::template finish<K::bits>(acc[t], start[t]), Isa::splat(xscale[t]), sum[t]);
            }
            codes += kBytes;
            xq += x.width * kColumns;
            xscale += x.width;
            start += x.width;
        }
        const Floats scale = scales.next();
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) y[t] = Isa::multiply_add(sum[t], scale, y[t]);
        if (w.offsets) {
            const Floats offset = scales.offset(scale);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) y[t] = Isa::multiply_add(offset, Isa::splat(x.group_sums[g * x.width + t]), y[t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) Isa::store(out[t], y[t]);
}

// What a kernel is made for: what is multiplied is below 2^Bits, a code takes Packed bits in memory.
template <int Bits, int Packed, bool Tabled = false, bool Halves = false>
struct Kind {
    static constexpr int bits = Bits, packed = Packed;
    static constexpr bool tabled = Tabled, halves = Halves;
};

template <class K, int T>
void product_tile(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    for (int64_t row_block = begin; row_block < end; ++row_block) {
        for (int part = 0; part < kRows / Isa::lanes; ++part) {
            const int64_t row = row_block * kRows + part * Isa::lanes;
            const int64_t left = w.rows - row;
            if (left <= 0) break;
            const int64_t count = left < Isa::lanes ? left : Isa::lanes;
            alignas(64) float out[T][Isa::lanes];
            if constexpr (K::halves) {
                product_halves<K, T>(w, x, row_block, part, out);
            } else {
                product_rows<K, T>(w, x, row_block, part, out);
            }
            for (int t = 0; t < T; ++t) {
                memcpy(y + t * y_stride + row, out[t], static_cast<size_t>(count) * sizeof(float));
            }
        }
    }
}

// Token after token.
template <class K>
void product_each(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    for (int t = 0; t < x.width; ++t) {
        const float *sums = x.group_sums ? x.group_sums + t : nullptr;
        const TileView one{x.codes + t * kColumns, x.scale + t, x.start + t, sums, x.width};
        product_tile<K, 1>(w, one, begin, end, y + t * y_stride, y_stride);
    }
}

template <class K>
void product_together(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    switch (x.width) {
        case 1: return product_tile<K, 1>(w, x, begin, end, y, y_stride);
        case 2: return product_tile<K, 2>(w, x, begin, end, y, y_stride);
        case 3: return product_tile<K, 3>(w, x, begin, end, y, y_stride);
        case 4: return product_tile<K, 4>(w, x, begin, end, y, y_stride);
        case 5: return product_tile<K, 5>(w, x, begin, end, y, y_stride);
        case 6: return product_tile<K, 6>(w, x, begin, end, y, y_stride);
        case 7: return product_tile<K, 7>(w, x, begin, end, y, y_stride);
        default: return product_tile<K, 8>(w, x, begin, end, y, y_stride);
    }
}

template <class K>
void product_kind(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    if constexpr (Isa::tokens == 1) return product_each<K>(w, x, begin, end, y, y_stride);
    else return product_together<K>(w, x, begin, end, y, y_stride);
}

// A byte a code: sums of codes of up to 4 and up to 6 bits have more room than those of bytes.
template <bool Halves>
void product_bytes(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    if (w.code_bits <= 4) return product_kind<Kind<4, 8, false, Halves>>(w, x, begin, end, y, y_stride);
    if (w.code_bits <= 6) return product_kind<Kind<6, 8, false, Halves>>(w, x, begin, end, y, y_stride);
    return product_kind<Kind<8, 8, false, Halves>>(w, x, begin, end, y, y_stride);
}

template <bool Halves>
void product_levels(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    if (w.packed_bits == 3) return product_kind<Kind<8, 3, true, Halves>>(w, x, begin, end, y, y_stride);
    return product_kind<Kind<8, 4, true, Halves>>(w, x, begin, end, y, y_stride);
}

void product_of_halves(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    if (w.tabled) return product_levels<true>(w, x, begin, end, y, y_stride);
    switch (w.packed_bits) {
        case 2: return product_kind<Kind<2, 2, false, true>>(w, x, begin, end, y, y_stride);
        case 3: return product_kind<Kind<3, 3, false, true>>(w, x, begin, end, y, y_stride);
        case 4: return product_kind<Kind<4, 4, false, true>>(w, x, begin, end, y, y_stride);
        case 6: return product_kind<Kind<6, 6, false, true>>(w, x, begin, end, y, y_stride);
        default: return product_bytes<true>(w, x, begin, end, y, y_stride);
    }
}

void product(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    if (w.halves) return product_of_halves(w, x, begin, end, y, y_stride);
    if (w.tabled) return product_levels<false>(w, x, begin, end, y, y_stride);
    switch (w.packed_bits) {
        case 2: return product_kind<Kind<2, 2>>(w, x, begin, end, y, y_stride);
        case 3: return product_kind<Kind<3, 3>>(w, x, begin, end, y, y_stride);
        case 4: return product_kind<Kind<4, 4>>(w, x, begin, end, y, y_stride);
        case 5: return product_kind<Kind<5, 5>>(w, x, begin, end, y, y_stride);
        case 6: return product_kind<Kind<6, 6>>(w, x, begin, end, y, y_stride);
        default: return product_bytes<false>(w, x, begin, end, y, y_stride);
    }
}

}  // namespace
}  // namespace fewbit
