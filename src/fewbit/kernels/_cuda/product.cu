// A few tokens times packed weights: out[token][row] = sum over columns of x[token][column] * w[row][column].
//
// A tile is 32 rows x 128 columns of codes, BITS x 16 bytes for each of a warp's 32 threads, in the order of the matrix
// units' operand A; x is operand B, eight tokens wide. A block has WN x WK warps: WN tiles of rows, whose columns WK
// warps take in turn, each with AHEAD tiles on their way from memory. Codes and activations are halves; a group's
// products are summed in float32 and scaled there. Which sums are made in which order depends on WK alone: a token's
// results are the same whatever tokens are beside it.
//
// Defined by whoever compiles: what tiles.cuh wants; NT (tokens / 8); WN, WK, AHEAD; GATED (0, or 1: out =
// silu(first 16 rows of a block) * last 16).
#include "tiles.cuh"

#define WARPS (WN * WK)
// floats between two tokens of a warp's sums: no two threads in one bank
#define PITCH 36

// c += a b; a 16 x 16, b 16 x 8
__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Sums {
    // [half of the 32 rows][8 tokens][as the matrix unit has them]
    float v[2][NT][4];
    // sums of x, in every row alike
    float x[NT][4];
};

__device__ __forceinline__ void clear(Sums& s) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s.v[0][n][i] = s.v[1][n][i] = s.x[n][i] = 0.0f;
}

// acc += scaled sums
__device__ __forceinline__ void scale(Sums& acc, const Sums& s, const Four<SCALES>& scales, const Shift& shifts) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int four = 2 * h + i / 2;
                float part = s.v[h][n][i];
                if (SHIFTS == 1) part += shifts.get(four) * s.x[n][i];
                acc.v[h][n][i] += scales.get(four) * part;
                if (SHIFTS == 2) acc.v[h][n][i] += shifts.get(four) * s.x[n][i];
            }
}

// 32 columns of a tile
__device__ __forceinline__ void add_columns(Sums& s, const u32* words, const Words* x) {
    const u32 ones[4] = {0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00};
    u32 pairs[16];
    Codes<BITS>::unpack(words, pairs);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        multiply(s.v[0][n], pairs, x[n].x, x[n].y);
        multiply(s.v[1][n], pairs + 8, x[n].x, x[n].y);
        multiply(s.v[0][n], pairs + 4, x[n].z, x[n].w);
        multiply(s.v[1][n], pairs + 12, x[n].z, x[n].w);
        if (SHIFTS) {
            multiply(s.x[n], ones, x[n].x, x[n].y);
            multiply(s.x[n], ones, x[n].z, x[n].w);
        }
    }
}

// x lies as [columns / 32][tokens][32] halves; a thread takes 8 of a token's 32
__device__ __forceinline__ void load_x(Words* x, const u16* halves, int block, int first, int tokens, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        int token = first + 8 * n + lane / 4;
        x[n] = Words{0, 0, 0, 0};
        if (token < tokens) x[n] = shared_by_all(halves + ((u64)block * tokens + token) * 32 + lane % 4 * 8);
    }
}

__device__ __forceinline__ void add_tile(Sums& acc, const Tile& tile, const u16* halves, int at, int first, int tokens,
                                         int lane) {
    const u32* words = (const u32*)tile.words;
    Words x[4][NT];
    // few tokens: all of the tile's at once; many: as they are needed
    if (NT <= 2)
#pragma unroll
        for (int j = 0; j < 4; ++j) load_x(x[j], halves, 4 * at + j, first, tokens, lane);
    Sums group;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (NT > 2) load_x(x[j], halves, 4 * at + j, first, tokens, lane);
        if (SPAN == 0) {
            add_columns(acc, words + BITS * j, x[j]);
        } else {
            if (32 * j % (SPAN ? SPAN : 1) == 0) clear(group);
            add_columns(group, words + BITS * j, x[j]);
            if (32 * (j + 1) % (SPAN ? SPAN : 1) == 0) {
                constexpr int span = SPAN ? SPAN : 128;
                scale(acc, group, tile.scales[32 * j / span], tile.shifts[32 * j / span]);
            }
        }
    }
}

struct Output {
    const float* token_scales;  // or null: all 1
    const float* add;           // or null; laid out as out is
    float* out;
    int stride;                 // between tokens
    int rows;                   // of the matrix
    int pair;                   // 0, or the rows of each of two matrices whose rows lie 16 and 16 in turn
};

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

// The block's sums over its WK warps, in order, scaled and written.
__device__ __forceinline__ void finish(const Sums& acc, float* room, const Output& o, int first, int tokens, int lane,
                                       int warp) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        if (n) __syncthreads();
        if (first + 8 * n >= tokens) break;
        float* mine = room + warp * 8 * PITCH;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                mine[(lane % 4 * 2 + i % 2) * PITCH + 16 * h + i / 2 * 8 + lane / 4] = acc.v[h][n][i];
        __syncthreads();
        constexpr int each = GATED ? 16 : 32;
        for (int e = threadIdx.x; e < WN * 8 * each; e += 32 * WARPS) {
            int r = e % each, slot = e / each % 8, wn = e / each / 8, token = first + 8 * n + slot;
            if (token >= tokens) continue;
            const float* from = room + wn * 8 * PITCH + slot * PITCH + r;
            float sum = 0.0f, up = 0.0f;
#pragma unroll
            for (int k = 0; k < WK; ++k) {
                sum += from[k * WN * 8 * PITCH];
                if (GATED) up += from[k * WN * 8 * PITCH + 16];
            }
            float factor = o.token_scales ? o.token_scales[token] : 1.0f;
            sum *= factor;
            int block = blockIdx.x * WN + wn, row = 32 * block + r;
            bool there = row < o.rows;
            if (GATED) {
                sum = silu(sum) * (up * factor);
                row = 16 * block + r;
                there = row < o.pair;
            } else if (o.pair) {
                row = 16 * block + r % 16;
                there = row < o.pair;
                row += r < 16 ? 0 : o.pair;
            }
            if (!there) continue;
            u64 to = (u64)token * o.stride + row;
            o.out[to] = o.add ? o.add[to] + sum : sum;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
product(Weights weights, const u16* x, Output output, int blocks, int tiles, int tokens) {
    __shared__ float room[WARPS * 8 * PITCH];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wn = warp % WN, wk = warp / WN;
    int block = min((int)(blockIdx.x * WN) + wn, blocks - 1), first = blockIdx.y * NT * 8;
    u64 start = (u64)block * tiles;
    Tile ring[AHEAD];
#pragma unroll
    for (int s = 0; s < AHEAD; ++s)
        if (wk + s * WK < tiles) load(ring[s], weights, start + wk + s * WK, lane);
    wait_for_inputs();
    let_next_begin();
    Sums acc;
    clear(acc);
    for (int at = wk; at < tiles; at += AHEAD * WK) {
#pragma unroll
        for (int s = 0; s < AHEAD; ++s) {
            int now = at + s * WK, later = now + AHEAD * WK;
            if (now < tiles) add_tile(acc, ring[s], x, now, first, tokens, lane);
            if (later < tiles) load(ring[s], weights, start + later, lane);
        }
    }
    if (SPAN == 0) {
        Four<SCALES> scales;
        Shift shifts;
        scales.load(weights.scales, block * 8 + lane / 4);
        shifts.load(weights.shifts, block * 8 + lane / 4);
        Sums whole;
        clear(whole);
        scale(whole, acc, scales, shifts);
        acc = whole;
    }
    finish(acc, room, output, first, tokens, lane, warp);
}
