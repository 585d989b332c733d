// More tokens times packed weights: out[token][row] = sum over columns of x[token][column] * w[row][column].
//
// A block has WN x WK warps: WN times RB tiles of 32 rows, 8 * NT tokens, and WK warps that take tiles of 128 columns in
// turn. Activations of XT rounds at a time lie in shared memory for the whole block, in the order of operand B, so that
// one 16-byte read feeds two products; each warp copies its own tiles of weights ahead of use, and makes halves of them
// once for all tokens of the block. blockIdx: tokens, rows, part of the columns; where columns are parted, sums go to
// `partial` and the last block of those that `arrived` adds them up in order. Which sums are made in which order depends
// on WK and the parts alone.
//
// LESS 1: what is to be subtracted from codes is subtracted from their halves, exactly. 0: a group's sum of x, by one
// more product with ones, makes good for it.
//
// Defined by whoever compiles: what tiles.cuh wants; NT, WN, WK, RB; STAGES (tiles of a warp in shared memory); XT (a
// power of two), XSTAGES (rounds' activations there), with XT * (XSTAGES - 1) >= STAGES - 1; BLOCKS (on a multiprocessor
// at a time); LESS; GATED.
#include "output.cuh"
#include "tiles.cuh"
#include "units.cuh"

#define WARPS (WN * WK)
#define THREADS (32 * WARPS)
#define TOKENS (8 * NT)
// floats between two tokens of a warp's sums: no two threads in one bank
#define PITCH 36
#define TILE_BYTES (CODE_BYTES + (SPAN ? GROUPS * (SCALE_BYTES + SHIFT_BYTES) : 0))
#define SLOT (RB * TILE_BYTES)
// bytes of activations: of 128 columns, of XT rounds
#define X_TILE (256 * TOKENS)
#define X_STAGE (XT * WK * X_TILE)
// sums of x are wanted
#define ONES (!LESS || SHIFTS == 2)

// eights of tokens whose products are mixed
#define AT_ONCE (NT % 4 == 0 ? 4 : NT % 3 == 0 ? 3 : NT)

static_assert(XT * (XSTAGES - 1) >= STAGES - 1, "activations would be read before they are there");

// The part of the work that a block has.
struct Part {
    int token, block, tile, tiles;
};

// tile `at` of RB blocks of rows, `step` tiles apart, into a slot
__device__ __forceinline__ void copy_tiles(char* slot, const Weights& w, u64 at, u64 step, int lane) {
#pragma unroll
    for (int b = 0; b < RB; ++b, at += step, slot += TILE_BYTES) {
        const char* codes = w.codes + at * CODE_BYTES + lane * 16;
#pragma unroll
        for (int c = 0; c < BITS; ++c) copy(slot + c * 512 + lane * 16, codes + c * 512);
        if (SPAN) {
            constexpr int scales = GROUPS * SCALE_BYTES, shifts = GROUPS * SHIFT_BYTES;
            if (lane < scales / 16) copy(slot + CODE_BYTES + lane * 16, w.scales + at * scales + lane * 16);
            if (lane < shifts / 16) copy(slot + CODE_BYTES + scales + lane * 16, w.shifts + at * shifts + lane * 16);
        }
    }
}

// A thread's part of copying activations, which lie as [columns / 32][tokens][32] halves. Tokens beyond the last are the
// last once more, and not written.
struct Activations {
    static constexpr int EACH = 4 * TOKENS, COUNT = X_STAGE / 16, ALIKE = THREADS % EACH == 0;
    const char* from;
    u64 block_bytes;
    int first, tokens;

    __device__ __forceinline__ Activations(const u16* halves, const Part& part, int tokens)
        : block_bytes((u64)tokens * 64), first(part.token), tokens(tokens) {
        from = (const char*)halves + (u64)part.tile * 4 * block_bytes + place(threadIdx.x);
    }
    __device__ __forceinline__ int place(int i) const {
        return min(first + i / 4 % TOKENS, tokens - 1) * 64 + i % 4 * 16;
    }
    // those of XT rounds from round XT * stage on, as far as there are any: beyond, what is never used
    template <class Copy>
    __device__ __forceinline__ void copy(char* room, int stage, int tiles, Copy copy) const {
        int last = 4 * (tiles - stage * XT * WK) - 1;
        if (last < 0) return;
        char* to = room + stage % XSTAGES * X_STAGE;
        const char* base = from + (u64)(stage * XT * WK * 4) * block_bytes;
#pragma unroll
        for (int k = 0; k < (COUNT + THREADS - 1) / THREADS; ++k) {
            int i = k * THREADS + threadIdx.x;
            if (COUNT % THREADS && i >= COUNT) break;
            const char* at = base + (u64)min(i / EACH, last) * block_bytes;
            copy(to + i * 16, ALIKE ? at : at - place(threadIdx.x) + place(i));
        }
    }
};

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

// Scales and shifts of a thread's four rows in one group.
struct Group {
    Scale scale;
    Shift shift;

    // two halves to add to a pair of codes of row `four`, raised as they are: exact
    __device__ __forceinline__ u32 less(int four) const {
        if (SHIFTS != 1) return both(0x8000u | (1u << (BITS - 1 + Codes<BITS>::at(four))));
        return both(half_of((shift.get(four) - CENTRE) * __uint_as_float((u32)(127 - 24 + Codes<BITS>::at(four)) << 23)));
    }
    // what a sum over codes is to be multiplied by
    __device__ __forceinline__ float by(int four) const { return scale.get(four) * factor<BITS>(four); }
    // what a sum of x is to be multiplied by
    __device__ __forceinline__ float more(int four) const {
        float offset = LESS ? 0.0f : scale.get(four) * (SHIFTS == 1 ? shift.get(four) - CENTRE : -CENTRE);
        return SHIFTS == 2 ? offset + shift.get(four) : offset;
    }
};

// 32 columns of RB blocks of rows; `x` is where the thread's activations of them lie
__device__ __forceinline__ void add_columns(Sums& s, const u32 words[RB][4 * BITS], int j, const u32 less[RB][4],
                                            const char* x) {
    const u32 ones[4] = {0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00};
    u32 pairs[RB][16];
#pragma unroll
    for (int b = 0; b < RB; ++b) {
        Codes<BITS>::unpack(words[b] + BITS * j, pairs[b]);
        if (LESS)
#pragma unroll
            for (int four = 0; four < 4; ++four)
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    u32& pair = pairs[b][pair_of(four, m)];
                    pair = add_halves(pair, less[b][four]);
                }
    }
    // sums that one product after the other adds to would wait for each other: first halves of some tokens, then second
#pragma unroll
    for (int first = 0; first < NT; first += AT_ONCE) {
        uint4 at[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) at[n] = *(const uint4*)(x + (first + n) * 512);
#pragma unroll
        for (int p = 0; p < 2; ++p)
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                u32 low = p ? at[n].z : at[n].x, high = p ? at[n].w : at[n].y;
#pragma unroll
                for (int h = 0; h < 2 * RB; ++h)
                    multiply(s.v[h][first + n], pairs[h / 2] + h % 2 * 8 + p * 4, low, high);
                if (ONES) multiply(s.x[first + n], ones, low, high);
            }
    }
}

// acc += scaled sums of a group
__device__ __forceinline__ void scale(Sums& acc, const Sums& s, const Group* groups) {
#pragma unroll
    for (int b = 0; b < RB; ++b)
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            float by = groups[b].by(four), more = groups[b].more(four);
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& to = acc.v[2 * b + four / 2][n][four % 2 * 2 + i];
                    to += by * s.v[2 * b + four / 2][n][four % 2 * 2 + i];
                    if (ONES) to += more * s.x[n][i];
                }
        }
}

__device__ __forceinline__ void all_less(u32 less[RB][4], const Group* groups) {
#pragma unroll
    for (int b = 0; b < RB; ++b)
#pragma unroll
        for (int four = 0; four < 4; ++four) less[b][four] = LESS ? groups[b].less(four) : 0;
}

// `groups`: those of the row, where SPAN is 0
__device__ __forceinline__ void add_tile(Sums& acc, const char* slot, const char* x, const Group* row, int lane) {
    u32 words[RB][4 * BITS], less[RB][4];
#pragma unroll
    for (int b = 0; b < RB; ++b)
#pragma unroll
        for (int c = 0; c < BITS; ++c) {
            uint4 v = *(const uint4*)(slot + b * TILE_BYTES + c * 512 + lane * 16);
            words[b][4 * c] = v.x; words[b][4 * c + 1] = v.y; words[b][4 * c + 2] = v.z; words[b][4 * c + 3] = v.w;
        }
    if (SPAN == 0) {
        all_less(less, row);
#pragma unroll
        for (int j = 0; j < 4; ++j) add_columns(acc, words, j, less, x + j * (X_TILE / 4) + lane * 16);
        return;
    }
    constexpr int span = SPAN ? SPAN : 128;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        Group groups[RB];
#pragma unroll
        for (int b = 0; b < RB; ++b) {
            const char* from = slot + b * TILE_BYTES + CODE_BYTES;
            groups[b].scale.load(from + g * SCALE_BYTES, lane / 4);
            groups[b].shift.load(from + GROUPS * SCALE_BYTES + g * SHIFT_BYTES, lane / 4);
        }
        all_less(less, groups);
        Sums sums;
        clear(sums);
#pragma unroll
        for (int j = g * span / 32; j < (g + 1) * span / 32; ++j)
            add_columns(sums, words, j, less, x + j * (X_TILE / 4) + lane * 16);
        scale(acc, sums, groups);
    }
}

// Partial sums of one part of a block's columns lie as [NT][RB][WN][8 tokens][32 rows].
#define PARTIAL (TOKENS * RB * WN * 32)
__device__ __forceinline__ u64 place(int split) {
    return (((u64)blockIdx.y * gridDim.x + blockIdx.x) * gridDim.z + split) * PARTIAL;
}

// Sums of WN x 32 rows and 8 tokens, over the block's WK warps in order.
__device__ __forceinline__ void write(const float* room, const Output& o, const Part& part, int b, int n, int tokens) {
    constexpr int each = GATED ? 16 : 32;
    for (int e = threadIdx.x; e < WN * 8 * each; e += THREADS) {
        int r = e % each, slot = e / each % 8, wn = e / each / 8, token = part.token + 8 * n + slot;
        if (token >= tokens) continue;
        const float* from = room + wn * 8 * PITCH + slot * PITCH + r;
        float sum = 0.0f, up = 0.0f;
#pragma unroll
        for (int k = 0; k < WK; ++k) {
            sum += from[k * WN * 8 * PITCH];
            if (GATED) up += from[k * WN * 8 * PITCH + 16];
        }
        put<GATED>(o, sum, up, part.block + wn * RB + b, r, token);
    }
}

__device__ __forceinline__ void add(float4& to, float4 v) {
    to.x += v.x; to.y += v.y; to.z += v.z; to.w += v.w;
}

// The same to where partial sums lie.
__device__ __forceinline__ void keep(const float* room, float* partial, int b, int n) {
    float4* to = (float4*)(partial + place(blockIdx.z) + (n * RB + b) * WN * 256);
    for (int e = threadIdx.x; e < WN * 64; e += THREADS) {
        const float* from = room + e / 8 * PITCH + e % 8 * 4;
        float4 sum = *(const float4*)from;
#pragma unroll
        for (int k = 1; k < WK; ++k) add(sum, *(const float4*)(from + k * WN * 8 * PITCH));
        to[e] = sum;
    }
}

// Partial sums of all parts of the columns, in order; all of a thread's loads of a part at once.
__device__ __forceinline__ void write_all(const Output& o, const float* partial, const Part& part, int tokens) {
    constexpr int each = GATED ? 4 : 8, count = PARTIAL / 4 / 8 * each, mine = (count + THREADS - 1) / THREADS;
    float4 sums[mine], ups[GATED ? mine : 1];
#pragma unroll
    for (int i = 0; i < mine; ++i) sums[i] = ups[GATED ? i : 0] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    const float4* from = (const float4*)(partial + place(0));
#pragma unroll 2
    for (int z = 0; z < gridDim.z; ++z, from += PARTIAL / 4) {
#pragma unroll
        for (int i = 0; i < mine; ++i) {
            int e = i * THREADS + threadIdx.x, at = e / each * 8 + e % each;
            if (count % THREADS && e >= count) continue;
            add(sums[i], from_others(from + at));
            if (GATED) add(ups[GATED ? i : 0], from_others(from + at + 4));
        }
    }
#pragma unroll
    for (int i = 0; i < mine; ++i) {
        int e = i * THREADS + threadIdx.x, row = e / each, n = row / (8 * WN * RB);
        int b = row / (8 * WN) % RB, wn = row / 8 % WN, token = part.token + 8 * n + row % 8;
        if ((count % THREADS && e >= count) || token >= tokens) continue;
        const float* sum = (const float*)&sums[i];
        const float* up = (const float*)&ups[GATED ? i : 0];
#pragma unroll
        for (int r = 0; r < 4; ++r) put<GATED>(o, sum[r], up[r], part.block + wn * RB + b, e % each * 4 + r, token);
    }
}

__device__ __forceinline__ void write_sums(const Sums& acc, char* shared, const Output& output, float* partial,
                                           const Part& part, int tokens) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* room = (float*)shared;
    float* mine = room + warp * 8 * PITCH;
#pragma unroll
    for (int b = 0; b < RB; ++b)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            if (part.token + 8 * n >= tokens) break;
            __syncthreads();
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    mine[(lane % 4 * 2 + i % 2) * PITCH + 16 * h + i / 2 * 8 + lane / 4] = acc.v[2 * b + h][n][i];
            __syncthreads();
            if (gridDim.z == 1) write(room, output, part, b, n, tokens);
            else keep(room, partial, b, n);
        }
}

// Whether this is the last of the blocks that share rows and tokens; what the others wrote is there then.
__device__ __forceinline__ bool is_last(char* shared, u32* arrived) {
    u32* count = arrived + blockIdx.y * gridDim.x + blockIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        // what the block wrote comes before its count, and others' counts before what is read of theirs
        __threadfence();
        u32 before = atomicAdd(count, 1u);
        __threadfence();
        // as the next launch wants it
        if (before == gridDim.z - 1) *count = 0;
        *(u32*)shared = before;
    }
    __syncthreads();
    return *(u32*)shared == gridDim.z - 1;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
many(Weights weights, const u16* halves, Output output, float* partial, u32* arrived, int blocks, int tiles, int each,
     int tokens) {
    extern __shared__ __align__(16) char shared[];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wn = warp % WN, wk = warp / WN;
    // `each`: tiles of a part of the columns
    int begin = blockIdx.z * each;
    Part part{(int)blockIdx.x * TOKENS, (int)blockIdx.y * WN * RB, begin, min(tiles - begin, each)};
    int block = min(part.block + wn * RB, blocks - 1), rounds = (part.tiles + WK - 1) / WK;
    // rows beyond the last are those of the last once more, and not written
    u64 start = (u64)block * tiles + begin + wk, step = block + 1 < blocks ? tiles : 0;
    int own = (part.tiles - wk + WK - 1) / WK;
    char* slots = shared + XSTAGES * X_STAGE + warp * STAGES * SLOT;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < own) copy_tiles(slots + s * SLOT, weights, start + s * WK, step, lane);
        copies_end();
    }
    Group row[RB];
    if (SPAN == 0)
#pragma unroll
        for (int b = 0; b < RB; ++b) {
            u64 at = (u64)block + (step ? b : 0);
            row[b].scale.load(weights.scales + at * SCALE_BYTES, lane / 4);
            row[b].shift.load(weights.shifts + at * SHIFT_BYTES, lane / 4);
        }
    Activations x(halves, part, tokens);
    wait_for_inputs();
    let_next_begin();
#pragma unroll
    for (int s = 0; s < XSTAGES - 1; ++s) x.copy(shared, s, part.tiles, CopyNow());
    Sums acc;
    clear(acc);
    int slot = 0, free = STAGES - 1;
    for (int at = 0; at < rounds; ++at) {
        wait_for_copies<STAGES - 2>();
        if (at % XT == 0) __syncthreads();
        else __syncwarp();
        int later = at + STAGES - 1;
        if (later < own) copy_tiles(slots + free * SLOT, weights, start + (u64)later * WK, step, lane);
        if (at % XT == 0) x.copy(shared, at / XT + XSTAGES - 1, part.tiles, CopyLater());
        copies_end();
        const char* columns = shared + at / XT % XSTAGES * X_STAGE + (at % XT * WK + wk) * X_TILE;
        if (at < own) add_tile(acc, slots + slot * SLOT, columns, row, lane);
        free = slot;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    if (SPAN == 0) {
        Sums whole;
        clear(whole);
        scale(whole, acc, row);
        acc = whole;
    }
    // nobody's tiles are needed any more: their room takes the sums
    wait_for_copies<0>();
    write_sums(acc, shared, output, partial, part, tokens);
    if (gridDim.z > 1 && is_last(shared, arrived)) write_all(output, partial, part, tokens);
}
