// Cached keys and values as floats, on the vectors of ops.inl: whoever reads a cache is written once, for one of the
// types below, and called through with_rows. A head of a cached row is `head_bytes` long (kernels.h).

namespace fewbit {
namespace {

// kLanes numbers from number d on, to be multiplied by the head's scale where there is one.
struct FloatRows {
    static constexpr bool scaled = false;
    static Vec load(const uint8_t *head, int64_t d) { return load_vec(reinterpret_cast<const float *>(head) + d); }
};
struct HalfRows {
    static constexpr bool scaled = false;
    static Vec load(const uint8_t *head, int64_t d) {
        return Isa::load_half(reinterpret_cast<const uint16_t *>(head) + d);
    }
};
struct ByteRows {
    static constexpr bool scaled = true;
    static Vec load(const uint8_t *head, int64_t d) {
        return Isa::load_bytes(reinterpret_cast<const int8_t *>(head) + d);
    }
};

// What the numbers of a head are multiplied by.
template <class Rows>
inline float scale_of(const uint8_t *head, int64_t width) {
    if constexpr (!Rows::scaled) return 1.0f;
    uint16_t scale;
    memcpy(&scale, head + width, sizeof scale);
    return bf16_to_float(scale);
}

// A cached head to floats [width]; width is a multiple of 16.
template <class Rows>
inline void read_head(const uint8_t *head, int64_t width, float *out) {
    const float scale = scale_of<Rows>(head, width);
    for (int64_t d = 0; d < width; d += kLanes) {
        const Vec v = Rows::load(head, d);
        store_vec(out + d, Rows::scaled ? v * scale : v);
    }
}

// use(Rows()) for the rows of a cache of this type.
template <class Use>
inline void with_rows(CacheType type, Use &&use) {
    switch (type) {
        case CacheType::f32: return use(FloatRows());
        case CacheType::f16: return use(HalfRows());
        case CacheType::int8: return use(ByteRows());
    }
}

}  // namespace
}  // namespace fewbit
