// NEON with dotprod: sdot adds four products of signed bytes to a 32-bit sum.
#include <arm_neon.h>

namespace fewbit {
namespace {

struct Dot {
    using Codes = int8x16_t;
    // both sides are signed, so codes of 8 bits are moved to -128..127; shorter ones are not negative as they are
    static constexpr int bias8 = 128;

    template <int Bits>
    static Codes codes(uint8x16_t line) {
        if constexpr (Bits == 8) line = veorq_u8(line, vdupq_n_u8(128));
        return vreinterpretq_s8_u8(line);
    }
    static int32x4_t quads(int32x4_t sum, Codes a, Codes b, int8x8_t x) {
        return vdotq_lane_s32(vdotq_lane_s32(sum, a, x, 0), b, x, 1);
    }
};

}  // namespace
}  // namespace fewbit

#include "isa_neon.inl"

namespace fewbit {
const KernelTable kNeonKernels = {"neon-dotprod", Dot::bias8, quantize, product, unpack, rms_norm, gated,
                                  attend, read_bits, dots};
}  // namespace fewbit
