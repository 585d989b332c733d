// A few tokens times packed weights: out[token][row] = sum over columns of x[token][column] * w[row][column].
//
// A tile is 32 rows x 128 columns of codes, in the order of the matrix units' operand A; x is operand B, eight tokens
// wide. A block has WN x WK warps: WN times RB tiles of rows, whose columns WK warps take in turn. Each warp copies its
// tiles ahead of use into STAGES slots of its own in shared memory. Codes are taken as they lie, unsigned; a group's sum
// of x, by one more product with ones, makes good for that. Groups are summed in float32 and scaled there. Which sums are
// made in which order depends on WK alone.
//
// Defined by whoever compiles: what tiles.cuh wants; NT (tokens / 8); WN, WK, RB, STAGES, XAHEAD; BLOCKS (on a
// multiprocessor at a time); GATED (0, or 1: out = silu(first 16 rows of a tile) * last 16).
#include "output.cuh"
#include "tiles.cuh"
#include "units.cuh"

#define WARPS (WN * WK)
// floats between two tokens of a warp's sums: no two threads in one bank
#define PITCH 36
#define SLOT (RB * (CODE_BYTES + (SPAN ? GROUPS * (SCALE_BYTES + SHIFT_BYTES) : 0)))

// tile `at` of RB blocks of rows, `step` tiles apart, into a slot
__device__ __forceinline__ void copy_tiles(char* slot, const Weights& w, u64 at, u64 step, int lane) {
#pragma unroll
    for (int b = 0; b < RB; ++b, at += step) {
        const char* codes = w.codes + at * CODE_BYTES + lane * 16;
#pragma unroll
        for (int c = 0; c < BITS; ++c) copy(slot + b * CODE_BYTES + c * 512 + lane * 16, codes + c * 512);
        if (SPAN) {
            constexpr int scales = GROUPS * SCALE_BYTES, shifts = GROUPS * SHIFT_BYTES;
            char* to = slot + RB * CODE_BYTES + b * scales + lane * 16;
            if (lane < scales / 16) copy(to, w.scales + at * scales + lane * 16);
            to = slot + RB * (CODE_BYTES + scales) + b * shifts + lane * 16;
            if (lane < shifts / 16) copy(to, w.shifts + at * shifts + lane * 16);
        }
    }
}

struct Sums {
    // [16 rows][8 tokens], as the matrix unit has them
    float v[2 * RB][NT][4];
    // sums of x, in every row alike
    float x[NT][4];
};

__device__ __forceinline__ void clear(Sums& s) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s.x[n][i] = 0.0f;
#pragma unroll
            for (int h = 0; h < 2 * RB; ++h) s.v[h][n][i] = 0.0f;
        }
}

// 32 columns
__device__ __forceinline__ void add_columns(Sums& s, const u32 words[RB][4 * BITS], int j, const Words* x) {
    const u32 ones[4] = {0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00};
    u32 pairs[RB][16];
#pragma unroll
    for (int b = 0; b < RB; ++b) Codes<BITS>::unpack(words[b] + BITS * j, pairs[b]);
    // sums that one product after the other adds to would wait for each other
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            u32 low = p ? x[n].z : x[n].x, high = p ? x[n].w : x[n].y;
#pragma unroll
            for (int h = 0; h < 2 * RB; ++h) multiply(s.v[h][n], pairs[h / 2] + h % 2 * 8 + p * 4, low, high);
            multiply(s.x[n], ones, low, high);
        }
}

// acc += scaled sums of a group; scales and shifts of block b lie b * step bytes on
__device__ __forceinline__ void scale(Sums& acc, const Sums& s, const char* scales, u64 scale_step, const char* shifts,
                                      u64 shift_step, int lane) {
#pragma unroll
    for (int b = 0; b < RB; ++b) {
        Scale by;
        Shift more;
        by.load(scales + b * scale_step, lane / 4);
        more.load(shifts + b * shift_step, lane / 4);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int four = 2 * h + i / 2;
                    float less = SHIFTS == 1 ? more.get(four) - CENTRE : -CENTRE;
                    float part = s.v[2 * b + h][n][i] * factor<BITS>(four) + less * s.x[n][i];
                    float& to = acc.v[2 * b + h][n][i];
                    to += by.get(four) * part;
                    if (SHIFTS == 2) to += more.get(four) * s.x[n][i];
                }
    }
}

// x lies as [columns / 32][tokens][32] halves; a thread takes 8 of a token's 32
__device__ __forceinline__ void load_x(Words* x, const u16* halves, int block, int first, int tokens, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        int token = min(first + 8 * n + lane / 4, tokens - 1);
        x[n] = shared_by_all(halves + ((u64)block * tokens + token) * 32 + lane % 4 * 8);
    }
}

// A warp's view of x. XAHEAD 0: a tile's 128 columns are read when they are wanted; 1: a tile early; 2: 32 columns early.
struct Activations {
    const u16* halves;
    int first, tokens, lane;
    Words now[XAHEAD == 2 ? 2 : 4][NT];
    Words next[XAHEAD == 1 ? 4 : 1][NT];

    __device__ __forceinline__ void load(Words* x, int block) const { load_x(x, halves, block, first, tokens, lane); }

    __device__ __forceinline__ void begin(int tile) {
        if (XAHEAD == 2) load(now[0], 4 * tile);
        if (XAHEAD == 1)
#pragma unroll
            for (int j = 0; j < 4; ++j) load(now[j], 4 * tile + j);
    }
    // `following` is the tile after this one
    __device__ __forceinline__ void enter(int tile, int following) {
        if (XAHEAD == 2) return;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (XAHEAD == 1) load(next[j], 4 * following + j);
            if (XAHEAD == 0) load(now[j], 4 * tile + j);
        }
    }
    __device__ __forceinline__ const Words* columns(int j, int tile, int following) {
        if (XAHEAD != 2) return now[j];
        load(now[(j + 1) % 2], j < 3 ? 4 * tile + j + 1 : 4 * following);
        return now[j % 2];
    }
    __device__ __forceinline__ void leave() {
        if (XAHEAD != 1) return;
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int n = 0; n < NT; ++n) now[j][n] = next[j][n];
    }
};

__device__ __forceinline__ void add_tile(Sums& acc, const char* slot, Activations& x, int tile, int following) {
    int lane = x.lane;
    u32 words[RB][4 * BITS];
#pragma unroll
    for (int b = 0; b < RB; ++b)
#pragma unroll
        for (int c = 0; c < BITS; ++c) {
            uint4 v = *(const uint4*)(slot + b * CODE_BYTES + c * 512 + lane * 16);
            words[b][4 * c] = v.x; words[b][4 * c + 1] = v.y; words[b][4 * c + 2] = v.z; words[b][4 * c + 3] = v.w;
        }
    Sums group;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Words* columns = x.columns(j, tile, following);
        if (SPAN == 0) {
            add_columns(acc, words, j, columns);
        } else {
            constexpr int span = SPAN ? SPAN : 128, scales = GROUPS * SCALE_BYTES, shifts = GROUPS * SHIFT_BYTES;
            if (32 * j % span == 0) clear(group);
            add_columns(group, words, j, columns);
            if (32 * (j + 1) % span == 0) {
                int g = 32 * j / span;
                const char* from = slot + RB * CODE_BYTES;
                scale(acc, group, from + g * SCALE_BYTES, scales, from + RB * scales + g * SHIFT_BYTES, shifts, lane);
            }
        }
    }
}

// Sums of 32 rows and 8 tokens for each of WN, over the block's WK warps in order; block b of RB.
__device__ __forceinline__ void write(const float* room, const Output& o, int b, int first, int tokens) {
    constexpr int each = GATED ? 16 : 32;
    for (int e = threadIdx.x; e < WN * 8 * each; e += 32 * WARPS) {
        int r = e % each, slot = e / each % 8, wn = e / each / 8, token = first + slot;
        if (token >= tokens) continue;
        const float* from = room + wn * 8 * PITCH + slot * PITCH + r;
        float sum = 0.0f, up = 0.0f;
#pragma unroll
        for (int k = 0; k < WK; ++k) {
            sum += from[k * WN * 8 * PITCH];
            if (GATED) up += from[k * WN * 8 * PITCH + 16];
        }
        put<GATED>(o, sum, up, (blockIdx.x * WN + wn) * RB + b, r, token);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
product(Weights weights, const u16* halves, Output output, int blocks, int tiles, int tokens) {
    extern __shared__ __align__(16) char shared[];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wn = warp % WN, wk = warp / WN;
    int block = (blockIdx.x * WN + wn) * RB, first = blockIdx.y * NT * 8;
    // rows beyond the last are those of the last once more, and not written
    u64 start = (u64)min(block, blocks - 1) * tiles, step = block + 1 < blocks ? tiles : 0;
    char* slots = shared + warp * STAGES * SLOT;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (wk + s * WK < tiles) copy_tiles(slots + s * SLOT, weights, start + wk + s * WK, step, lane);
        copies_end();
    }
    wait_for_inputs();
    let_next_begin();
    Sums acc;
    clear(acc);
    Activations x{halves, first, tokens, lane};
    int slot = 0, free = STAGES - 1;
    if (wk < tiles) x.begin(wk);
    for (int at = wk; at < tiles; at += WK) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();
        int later = at + (STAGES - 1) * WK, following = min(at + WK, tiles - 1);
        if (later < tiles) copy_tiles(slots + free * SLOT, weights, start + later, step, lane);
        copies_end();
        x.enter(at, following);
        add_tile(acc, slots + slot * SLOT, x, at, following);
        x.leave();
        free = slot;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    if (SPAN == 0) {
        Sums whole;
        clear(whole);
        u64 at = (u64)min(block, blocks - 1), next = step ? 1 : 0;
        scale(whole, acc, weights.scales + at * SCALE_BYTES, next * SCALE_BYTES, weights.shifts + at * SHIFT_BYTES,
              next * SHIFT_BYTES, lane);
        acc = whole;
    }
    // nobody's tiles are needed any more: their room takes the sums
    wait_for_copies<0>();
    float* room = (float*)shared;
    float* mine = room + warp * 8 * PITCH;
#pragma unroll
    for (int b = 0; b < RB; ++b)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            if (first + 8 * n >= tokens) break;
            __syncthreads();
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    mine[(lane % 4 * 2 + i % 2) * PITCH + 16 * h + i / 2 * 8 + lane / 4] = acc.v[2 * b + h][n][i];
            __syncthreads();
            write(room, output, b, first + 8 * n, tokens);
        }
}
