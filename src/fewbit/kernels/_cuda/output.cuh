// Where products go, alike for every kernel that makes them.
#pragma once
#include "pieces.cuh"

struct Output {
    const float* token_scales;  // or null: all 1
    const float* add;           // or null; laid out as out is
    float* out;
    int stride;                 // between tokens
    int rows;                   // of the matrix
    int pair;                   // 0, or the rows of each of two matrices whose rows lie 16 and 16 in turn
};

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

// The sum of row r of a block of 32 rows goes where it belongs; GATED: r is of the first 16, `up` the sum of row r + 16.
template <int GATES>
__device__ __forceinline__ void put(const Output& o, float sum, float up, int block, int r, int token) {
    float factor = o.token_scales ? o.token_scales[token] : 1.0f;
    sum *= factor;
    int row = 32 * block + r;
    bool there = row < o.rows;
    if (GATES) {
        sum = silu(sum) * (up * factor);
        row = 16 * block + r;
        there = row < o.pair;
    } else if (o.pair) {
        row = 16 * block + r % 16;
        there = row < o.pair;
        row += r < 16 ? 0 : o.pair;
    }
    if (!there) return;
    u64 to = (u64)token * o.stride + row;
    o.out[to] = o.add ? o.add[to] + sum : sum;
}
