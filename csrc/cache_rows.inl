// Cached keys and values as floats, on the vectors of ops.inl. What reads a cache is a template over the types below,
// each made of where a head of a cached row begins, and is chosen by with_rows. A head takes head_bytes (kernels.h).

namespace fewbit {
namespace {

struct FloatRow {
    const uint8_t *head;
    FloatRow(const uint8_t *head_, int64_t) : head(head_) {}
    // kLanes numbers from number d on
    Vec load(int64_t d) const { return load_vec(reinterpret_cast<const float *>(head) + d); }
};

struct HalfRow {
    const uint8_t *head;
    HalfRow(const uint8_t *head_, int64_t) : head(head_) {}
    Vec load(int64_t d) const { return Isa::load_half(reinterpret_cast<const uint16_t *>(head) + d); }
};

struct ByteRow {
    const uint8_t *head;
    Vec scale;
    ByteRow(const uint8_t *head_, int64_t width) : head(head_) {
        uint16_t bits;
        memcpy(&bits, head + width, sizeof bits);
        scale = splat_vec(bf16_to_float(bits));
    }
    // a product of one rounding, as in a row that was read before
    Vec load(int64_t d) const { return Isa::load_bytes(reinterpret_cast<const int8_t *>(head) + d) * scale; }
};

struct NibbleRow {
    const uint8_t *head, *numbers;
    NibbleRow(const uint8_t *head_, int64_t width) : head(head_), numbers(head_ + width / 2) {}
    // a vector lies in one group; codes times a half are exact, so that the sum has one rounding, fused or not
    Vec load(int64_t d) const {
        uint16_t group[2];
        memcpy(group, numbers + d / kCachedGroup * 4, sizeof group);
        return codes(d) * splat_vec(Isa::half(group[0])) + splat_vec(Isa::half(group[1]));
    }
    // Eight codes a word: every lane has its word, and shifts it by what is its own.
    Vec codes(int64_t d) const {
        Isa::IntVec x = {}, shift, upper;
        uint32_t words[2] = {0, 0};
        memcpy(words, head + d / 2, kLanes / 2);
        for (int l = 0; l < kLanes; ++l) {
            shift[l] = 4 * (l % 8);
            upper[l] = l < 8 ? 0 : -1;
        }
        const int32_t low = static_cast<int32_t>(words[0]), high = static_cast<int32_t>(words[1]);
        x = kLanes > 8 ? (upper & (x + high)) | (~upper & (x + low)) : x + low;
        return __builtin_convertvector((x >> shift) & 15, Vec);
    }
};

// A cached head to floats [width]; width is a multiple of 16.
template <class Row>
inline void read_head(const uint8_t *head, int64_t width, float *out) {
    const Row row(head, width);
    for (int64_t d = 0; d < width; d += kLanes) store_vec(out + d, row.load(d));
}

// use.operator()<Row>() for the rows of a cache of this type.
template <class Use>
inline void with_rows(CacheType type, Use &&use) {
    switch (type) {
        case CacheType::f32: return use.template operator()<FloatRow>();
        case CacheType::f16: return use.template operator()<HalfRow>();
        case CacheType::int8: return use.template operator()<ByteRow>();
        case CacheType::int4: return use.template operator()<NibbleRow>();
    }
}

}  // namespace
}  // namespace fewbit
