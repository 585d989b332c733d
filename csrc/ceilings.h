// Plain loops over all threads of the pool, against which products are held. The caller takes the time.
#pragma once

#include <cstdint>

namespace fewbit {

// The OR of `bytes` bytes; each thread reads a contiguous part of them once.
uint32_t read_all(const uint8_t *data, int64_t bytes);

// Each thread multiplies the 64 bytes at w and x `rounds` times. Returns the multiply-adds of all threads; `total` gets
// one thread's sum of products (all threads have the same), which wraps.
int64_t dot_all(int64_t rounds, const uint8_t *w, const int8_t *x, uint32_t *total);

}  // namespace fewbit
