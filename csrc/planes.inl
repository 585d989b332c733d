// Codes out of a block's planes, included by each ISA file after its `Isa`, which provides
//   Line                         the bytes of one quad (4 columns) of `lanes` rows
//   load_line(p), store_line(p, line), left<N>(line), right<N>(line): shifts by N bits that may leak between bytes
//   masked<M>(line)              line & M in every byte;  merged<M>(low, line)  low | (line & M)
//   load_table(p), lookup(table, line)   each byte of line, below 16, as the table has it

namespace fewbit {
namespace {

constexpr int kLine = 64;
constexpr int kQuads = kColumns / 4;
constexpr int kPart = Isa::lanes * 4;

constexpr int low_bits(int bits) { return bits >= 4 ? 4 : 2; }

// A plane of `Plane` bits a code: quad `Q` of a line's 8 / Plane quads, moved from where it lies to bit `To`.
template <int Plane, int Q, int To>
inline Isa::Line plane_at(const uint8_t *plane, int part) {
    constexpr int kEach = 8 / Plane;
    constexpr int kFrom = Q % kEach * Plane;
    const typename Isa::Line line = Isa::load_line(plane + Q / kEach * kLine + part * kPart);
    if constexpr (kFrom > To) return Isa::template right<kFrom - To>(line);
    if constexpr (kFrom < To) return Isa::template left<To - kFrom>(line);
    return line;
}

// The codes of quad `Q`, one byte each, of a block of `Packed` bits a code.
template <int Packed, int Q>
inline Isa::Line quad_of(const uint8_t *block, int part) {
    if constexpr (Packed == 8) {
        return Isa::load_line(block + Q * kLine + part * kPart);
    } else {
        constexpr int kLow = low_bits(Packed), kHigh = Packed - kLow;
        const typename Isa::Line low = Isa::template masked<(1 << kLow) - 1>(plane_at<kLow, Q, 0>(block, part));
        if constexpr (kHigh == 0) {
            return low;
        } else {
            return Isa::template merged<((1 << kHigh) - 1) << kLow>(
                low, plane_at<kHigh, Q, kLow>(block + kLow * kLine, part));
        }
    }
}

// What is multiplied: the codes of a quad, or their levels.
template <int Packed, int Q, bool Tabled>
inline Isa::Line levels_of(const uint8_t *block, int part, const typename Isa::Line &table) {
    if constexpr (Tabled) return Isa::lookup(table, quad_of<Packed, Q>(block, part));
    return quad_of<Packed, Q>(block, part);
}

template <int Packed, int Q, bool Tabled>
inline void unpack_quads(const uint8_t *block, int part, const typename Isa::Line &table, uint8_t *out) {
    if constexpr (Q < kQuads) {
        Isa::store_line(out + Q * kLine + part * kPart, levels_of<Packed, Q, Tabled>(block, part, table));
        unpack_quads<Packed, Q + 1, Tabled>(block, part, table, out);
    }
}

template <int Packed, bool Tabled = false>
void unpack_bits(const BlockView &w, int64_t row_block, uint8_t *out) {
    const uint8_t *block = w.codes + row_block * w.column_blocks * Packed * kLine;
    const typename Isa::Line table = Isa::load_table(w.table);
    for (int64_t b = 0; b < w.column_blocks; ++b) {
        for (int part = 0; part < kRows / Isa::lanes; ++part) unpack_quads<Packed, 0, Tabled>(block, part, table, out);
        block += Packed * kLine;
        out += kQuads * kLine;
    }
}

void unpack(const BlockView &w, int64_t row_block, uint8_t *out) {
    if (w.tabled) return w.packed_bits == 3 ? unpack_bits<3, true>(w, row_block, out) : unpack_bits<4, true>(w, row_block, out);
    switch (w.packed_bits) {
        case 2: return unpack_bits<2>(w, row_block, out);
        case 3: return unpack_bits<3>(w, row_block, out);
        case 4: return unpack_bits<4>(w, row_block, out);
        case 5: return unpack_bits<5>(w, row_block, out);
        case 6: return unpack_bits<6>(w, row_block, out);
        default: return unpack_bits<8>(w, row_block, out);
    }
}

}  // namespace
}  // namespace fewbit
