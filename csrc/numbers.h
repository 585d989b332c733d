// 16-bit floats in plain integer arithmetic, for code that may not use conversion instructions.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace fewbit {
namespace {

inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float bf16_to_float(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

// Nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// IEEE 754 binary16. Moving exponent and mantissa into place leaves the exponent 112 too small; a multiplication puts
// that right and normalizes subnormals on the way. Infinities and NaN get the largest exponent instead.
inline float f16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t rest = static_cast<uint32_t>(h & 0x7fff) << 13;
    const float magnitude = from_bits(rest) * from_bits((127u + 112u) << 23);
    const uint32_t bits = rest >= (0x7c00u << 13) ? (rest | 0x7f800000u) : to_bits(magnitude);
    return from_bits(sign | bits);
}

// Nearest, ties to even; what is beyond the range, infinities too, to the largest finite number; NaN stays NaN.
inline uint16_t float_to_f16(float x) {
    const uint32_t bits = to_bits(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    const uint32_t abs = bits & 0x7fffffffu;
    if (abs > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
    if (abs >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7bff);
    if (abs < 0x38800000u) {
        // a subnormal's steps are those of 0.5: adding it lets the float adder round
        return static_cast<uint16_t>(sign | (to_bits(from_bits(abs) + 0.5f) - 0x3f000000u));
    }
    const uint32_t rounded = abs + 0xfffu + ((abs >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

inline float load_scalar(const void *base, int64_t i, Scalar type) {
    if (type == Scalar::f32) return static_cast<const float *>(base)[i];
    const uint16_t h = static_cast<const uint16_t *>(base)[i];
    return type == Scalar::f16 ? f16_to_float(h) : bf16_to_float(h);
}

inline int64_t offset_bytes(Offsets type) {
    switch (type) {
        case Offsets::none: return 0;
        case Offsets::f32: return 4;
        case Offsets::f16: return 2;
        default: return 1;
    }
}

inline int64_t scale_bytes(Scalar type) {
    return type == Scalar::f32 ? 4 : type == Scalar::f16 || type == Scalar::bf16 ? 2 : 1;
}

}  // namespace
}  // namespace fewbit
