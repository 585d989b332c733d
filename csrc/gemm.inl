// The product of packed weights and int8 activations, included by each ISA file after its `Isa` and planes.inl.
//
// `Isa` computes `lanes` rows at once and provides, for codes below 2^Bits:
//   Floats, Sum, Codes<Bits>     vectors of floats, of integer sums, of one quad (4 columns) of codes for each row
//   codes<Bits>(line)
//   begin<Bits>(start), dot<Bits>(sum, a, b, x): two quads times 8 activations, finish<Bits>(sum, start)
// `Packed` is what a code takes in memory: Bits, or 8 where a row block was unpacked for many tokens.
// Every output sees the same sequence of operations whatever the tile's width, so results do not depend on the batch.

namespace fewbit {
namespace {

// Codes are fetched to the second-level cache so many bytes before they are needed: the hardware sees their stream too,
// but not far enough ahead beside the activations of several tokens.
constexpr int kAhead = 8192;

// The offsets of `lanes` rows' groups, from number `first` on, whose scales are `scale`.
inline Isa::Floats offsets(const BlockView &w, int64_t first, Isa::Floats scale) {
    switch (w.offset_type) {
        case Offsets::zeros: {
            const Isa::Floats zeros = Isa::load_bytes(static_cast<const uint8_t *>(w.offsets) + first);
            return Isa::multiply_add(zeros, Isa::multiply_add(scale, Isa::splat(-1.0f), Isa::zero()), Isa::zero());
        }
        case Offsets::f16: return Isa::load_scales(w.offsets, first, Scalar::f16);
        default: return Isa::load_scales(w.offsets, first, Scalar::f32);
    }
}

template <int Bits, int Packed, int T, int Pair>
inline void add_pairs(const uint8_t *block, int part, const int8_t *x, typename Isa::Sum (&acc)[T]) {
    if constexpr (Pair < kQuads / 2) {
        const auto a = Isa::template codes<Bits>(quad_of<Packed, 2 * Pair>(block, part));
        const auto b = Isa::template codes<Bits>(quad_of<Packed, 2 * Pair + 1>(block, part));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[t] = Isa::template dot<Bits>(acc[t], a, b, x + t * kColumns + Pair * 8);
        add_pairs<Bits, Packed, T, Pair + 1>(block, part, x, acc);
    }
}

template <int Bits, int Packed, int T>
void product_rows(const BlockView &w, const TileView &x, int64_t row_block, int part, float (&out)[T][Isa::lanes]) {
    constexpr int kBytes = Packed * kLine;
    using Floats = Isa::Floats;
    const uint8_t *codes = w.codes + row_block * w.column_blocks * kBytes;
    const int64_t first_scale = row_block * w.groups * kRows + part * Isa::lanes;
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
            for (int t = 0; t < T; ++t) acc[t] = Isa::template begin<Bits>(start[t]);
            for (int i = 0; i < Packed; ++i) __builtin_prefetch(codes + kAhead + i * kLine, 0, 2);
            add_pairs<Bits, Packed, T, 0>(codes, part, xq, acc);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                sum[t] = Isa::multiply_add(Isa::template finish<Bits>(acc[t], start[t]), Isa::splat(xscale[t]), sum[t]);
            }
            codes += kBytes;
            xq += T * kColumns;
            xscale += T;
            start += T;
        }
        const Floats scale = Isa::load_scales(w.scales, first_scale + g * kRows, w.scale_type);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) y[t] = Isa::multiply_add(sum[t], scale, y[t]);
        if (w.offsets) {
            const Floats offset = offsets(w, first_scale + g * kRows, scale);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) y[t] = Isa::multiply_add(offset, Isa::splat(x.group_sums[g * T + t]), y[t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) Isa::store(out[t], y[t]);
}

template <int Bits, int Packed, int T>
void product_tile(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    for (int64_t row_block = begin; row_block < end; ++row_block) {
        for (int part = 0; part < kRows / Isa::lanes; ++part) {
            const int64_t row = row_block * kRows + part * Isa::lanes;
            const int64_t left = w.rows - row;
            if (left <= 0) break;
            const int64_t count = left < Isa::lanes ? left : Isa::lanes;
            alignas(64) float out[T][Isa::lanes];
            product_rows<Bits, Packed, T>(w, x, row_block, part, out);
            for (int t = 0; t < T; ++t) {
                memcpy(y + t * y_stride + row, out[t], static_cast<size_t>(count) * sizeof(float));
            }
        }
    }
}

template <int Bits, int Packed>
void product_bits(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    switch (x.width) {
        case 1: return product_tile<Bits, Packed, 1>(w, x, begin, end, y, y_stride);
        case 2: return product_tile<Bits, Packed, 2>(w, x, begin, end, y, y_stride);
        case 3: return product_tile<Bits, Packed, 3>(w, x, begin, end, y, y_stride);
        case 4: return product_tile<Bits, Packed, 4>(w, x, begin, end, y, y_stride);
        case 5: return product_tile<Bits, Packed, 5>(w, x, begin, end, y, y_stride);
        case 6: return product_tile<Bits, Packed, 6>(w, x, begin, end, y, y_stride);
        case 7: return product_tile<Bits, Packed, 7>(w, x, begin, end, y, y_stride);
        default: return product_tile<Bits, Packed, 8>(w, x, begin, end, y, y_stride);
    }
}

void product(const BlockView &w, const TileView &x, int64_t begin, int64_t end, float *y, int64_t y_stride) {
    if (w.packed_bits == 8) {
        // sums of codes of up to 4 and up to 6 bits have more room than those of bytes
        if (w.code_bits <= 4) return product_bits<4, 8>(w, x, begin, end, y, y_stride);
        if (w.code_bits <= 6) return product_bits<6, 8>(w, x, begin, end, y, y_stride);
        return product_bits<8, 8>(w, x, begin, end, y, y_stride);
    }
    switch (w.packed_bits) {
        case 2: return product_bits<2, 2>(w, x, begin, end, y, y_stride);
        case 3: return product_bits<3, 3>(w, x, begin, end, y, y_stride);
        case 4: return product_bits<4, 4>(w, x, begin, end, y, y_stride);
        case 5: return product_bits<5, 5>(w, x, begin, end, y, y_stride);
        default: return product_bits<6, 6>(w, x, begin, end, y, y_stride);
    }
}

}  // namespace
}  // namespace fewbit
