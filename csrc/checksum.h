// Tells a range of memory from one with other bytes: damage, not malice.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit {

// The same for the same bytes on every machine of the same byte order; one changed word always changes it.
uint64_t checksum(const uint8_t *bytes, size_t count);

}  // namespace fewbit
