// Activations to int8, included by each ISA file: the same float operations everywhere, so the same codes.

namespace fewbit {
namespace {

// Adding 1.5 * 2^23 leaves the nearest integer (ties to even) of a small float in its lowest bits.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4b400000;

inline void quantize_block(const float *x, int8_t *codes, float *scale, int32_t *sum) {
    uint32_t largest = 0;
    for (int i = 0; i < kColumns; ++i) {
        // magnitudes order like their bits, and so NaN is the largest of all
        const uint32_t magnitude = to_bits(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float absmax = from_bits(largest);
    const bool finite = largest < 0x7f800000u;
    // below 1e-35 the inverse would overflow; such a block is zero
    const float inverse = finite && absmax > 1e-35f ? 127.0f / absmax : 0.0f;
    // what is not finite must reach the output, and NaN times any sum does
    *scale = finite ? (absmax > 1e-35f ? absmax / 127.0f : 0.0f) : from_bits(0x7fc00000u);
    int32_t total = 0;
    int32_t rounded[kColumns];
    for (int i = 0; i < kColumns; ++i) {
        const float v = finite ? x[i] * inverse : 0.0f;
        rounded[i] = __builtin_bit_cast(int32_t, v + kRound) - kRoundBits;
    }
    for (int i = 0; i < kColumns; ++i) {
        codes[i] = static_cast<int8_t>(rounded[i]);
        total += rounded[i];
    }
    *sum = total;
}

// Symmetric, scale = absmax / 127 over 32 inputs; the last block is filled with zeros.
void quantize(const float *x, int64_t columns, int8_t *codes, float *scale, int32_t *sums, int step) {
    int64_t done = 0;
    for (; done + kColumns <= columns; done += kColumns) {
        quantize_block(x + done, codes, scale, sums);
        codes += static_cast<int64_t>(step) * kColumns;
        scale += step;
        sums += step;
    }
    if (done < columns) {
        float padded[kColumns] = {};
        for (int64_t i = done; i < columns; ++i) padded[i - done] = x[i];
        quantize_block(padded, codes, scale, sums);
    }
}

}  // namespace
}  // namespace fewbit
