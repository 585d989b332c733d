// Operations around the products, on raw float32 data.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fewbit {

// y [tokens][n] = x / root of mean square * weight
void rms_norm_rows(const float *x, const float *weight, float *y, int64_t tokens, int64_t n, float eps);

// gate_up [tokens][2n], gate first -> y [tokens][n] = activation(gate) * up
void gated_rows(Activation activation, const float *gate_up, float *y, int64_t tokens, int64_t n);

// Heads of one token are contiguous; tokens are `stride` floats apart.
struct Heads {
    const float *data;
    int64_t stride;
    int64_t heads;
};

// Keys and values [rows][heads][head_bytes] each.
struct Cache {
    uint8_t *keys;
    uint8_t *values;
    CacheType type;
    int64_t rows;
    int64_t heads;
};

// Rotates q and k (halves) by cos, sin [tokens][width / 2]; q to q_out [tokens][heads][width], k and v to the caches'
// rows `slots`. False, with nothing written, where a slot is out of range.
// int8: keys, and q with them, are multiplied by a Hadamard matrix first; the scale is the largest magnitude / 127,
// rounded to bf16, and a number the nearest multiple of it.
bool rotate_append(const Heads &q, const Heads &k, const Heads &v, const float *cos, const float *sin,
                   const int64_t *slots, const Cache &cache, int64_t tokens, int64_t width, float *q_out);

// Whether all of `slots` [tokens] are rows of a cache.
bool are_slots(const int64_t *slots, int64_t tokens, int64_t cache_rows);

struct Sequences {
    const int64_t *pages;    // [count][pages_per_sequence]
    const int64_t *lengths;  // [count]
    const int64_t *starts;   // [count + 1]
    int64_t count, pages_per_sequence, page_size;
};

// Whether every index that attend_paged follows lies in the step and in the cache.
bool are_places(const Sequences &sequences, int64_t tokens, int64_t cache_rows);

// What scores are made of: products times `scale`, held by `soft_cap` (0: not), of the last `window` rows (0: of all).
struct Scores {
    float scale;
    int64_t window = 0;
    float soft_cap = 0.0f;
};

// Causal attention of q [tokens][heads][width], contiguous, over the paged cache -> y [tokens][heads * width].
// Takes widths that are multiples of 16. False, with nothing written, where `are_places` says so.
bool attend_paged(const float *q, const Cache &cache, const Sequences &sequences, int64_t tokens, int64_t heads,
                  int64_t width, const Scores &scores, float *y);

}  // namespace fewbit
