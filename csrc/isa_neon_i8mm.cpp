// NEON with dotprod and i8mm: usdot multiplies unsigned codes by signed activations, so 8 bits need no bias.
#include <arm_neon.h>

namespace fewbit {
namespace {

struct Dot {
    using Codes = uint8x16_t;
    static constexpr int bias8 = 0;

    template <int Bits>
    static Codes codes(uint8x16_t line) {
        return line;
    }
    static int32x4_t quads(int32x4_t sum, Codes a, Codes b, int8x8_t x) {
        return vusdotq_lane_s32(vusdotq_lane_s32(sum, a, x, 0), b, x, 1);
    }
};

}  // namespace
}  // namespace fewbit

#include "isa_neon.inl"

namespace fewbit {
const KernelTable kNeonI8mmKernels = {"neon-i8mm", Dot::bias8, quantize, product, unpack, rms_norm, gated,
                                  attend, read_bits, dots};
}  // namespace fewbit
