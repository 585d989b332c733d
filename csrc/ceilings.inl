// What the memory and the multipliers give at most, included by each ISA file: plain loops in the instructions that its
// products are made of.
//
// The empty asm statements hide values from the compiler, which would otherwise see that sums are alike and that products
// repeat, and leave them out.

namespace fewbit {
namespace {

// All bits of a vector of 32-bit words, ORed.
template <class V>
uint32_t any_bits(V v) {
    uint32_t words[sizeof(V) / 4], all = 0;
    memcpy(words, &v, sizeof v);
    for (uint32_t w : words) all |= w;
    return all;
}

// The OR of `bytes` bytes, read once in ascending order.
uint32_t read_bits(const uint8_t *p, int64_t bytes) {
    constexpr int kVectors = 8;
    using V = Isa::IntVec;
    V all[kVectors] = {};
    const uint8_t *const end = p + bytes;
    for (; end - p >= static_cast<int64_t>(sizeof all); p += sizeof all) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            V v;
            memcpy(&v, p + static_cast<size_t>(i) * sizeof v, sizeof v);
            all[i] |= v;
        }
    }
    uint32_t found = 0;
    for (const V &v : all) found |= any_bits(v);
    for (; p < end; ++p) found |= *p;
    return found;
}

// As many sums as cover the latency of an instruction; none of them leaves its register.
#if defined(__AVX512VNNI__)
constexpr int kSums = 16;
constexpr int64_t kDotWidth = 64;
using DotVec = __m512i;
inline void dot_once(DotVec (&sum)[kSums], const uint8_t *w, const int8_t *x) {
    const DotVec a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(x);
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
        asm volatile("" : "+v"(sum[i]));
        sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
    }
}
#elif defined(__AVX2__)
constexpr int kSums = 8;
constexpr int64_t kDotWidth = 32;
using DotVec = __m256i;
inline void dot_once(DotVec (&sum)[kSums], const uint8_t *w, const int8_t *x) {
    const DotVec ones = _mm256_set1_epi16(1);
    DotVec a = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w));
    DotVec b = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
        asm volatile("" : "+x"(a), "+x"(b));
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
}
#else
// four products to each of 16 sums, in whatever way the compiler finds
constexpr int kSums = 1;
constexpr int64_t kDotWidth = 64;
struct DotVec {
    int32_t v[16];
};
inline void dot_once(DotVec (&sum)[kSums], const uint8_t *w, const int8_t *x) {
    asm volatile("" ::: "memory");
    for (int i = 0; i < 16; ++i) {
        const uint8_t *a = w + 4 * i;
        const int8_t *b = x + 4 * i;
        sum[0].v[i] += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
    }
}
#endif

// Rounds of products of the 64 bytes at w and x (as many of them as a vector holds); returns the multiply-adds done and
// leaves the sum of them all, which wraps, in `total`.
int64_t dots(int64_t rounds, const uint8_t *w, const int8_t *x, uint32_t *total) {
    DotVec sum[kSums] = {};
    for (int64_t i = 0; i < rounds; ++i) dot_once(sum, w, x);
    uint32_t words[sizeof sum / 4];
    memcpy(words, sum, sizeof sum);
    *total = 0;
    for (uint32_t word : words) *total += word;
    return rounds * kSums * kDotWidth;
}

}  // namespace
}  // namespace fewbit
