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
        int8_t codes[kLanes];
        for (int i = 0; i < kLanes / 2; ++i) {
            const uint8_t pair = head[d / 2 + i];
            codes[2 * i] = static_cast<int8_t>(pair & 15);
            codes[2 * i + 1] = static_cast<int8_t>(pair >> 4);
        }
        uint16_t group[2];
        memcpy(group, numbers + d / kCachedGroup * 4, sizeof group);
        return Isa::load_bytes(codes) * splat_vec(f16_to_float(group[0])) + splat_vec(f16_to_float(group[1]));
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
