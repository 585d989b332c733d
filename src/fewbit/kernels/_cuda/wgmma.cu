// Many tokens times packed weights on a Hopper card: out[token][row] = sum over columns of x[token][column] * w[row][column].
//
// The transposed product is computed: weights are operand A, whose registers packed tiles already have the order of; they
// become halves there, scaled. Activations are operand B, in shared memory. A block has 128 rows x NT tokens: two groups
// of four warps, the first with the first 16 rows of each of four tiles, the second with the last 16; a third group, of
// which one warp brings tiles and activations into two rings. While the matrix units multiply 32 columns the next 32 become
// halves. KS blocks, a cluster, share the columns of a tile and add their sums up in each other's memory, in the order of
// their ranks.
//
// x lies as [columns / 64][tokens, filled up to eights][64] halves: of 32 columns the pairs 4 * thread + member lie as
// 4 * member + thread, which is the order operand A has them in; then the 16-byte words of a token's 64 are exchanged, word
// w to w ^ token % 8, which is how the matrix units want them (see `described`). So what a block wants is one stretch.
//
// Defined by whoever compiles: what tiles.cuh wants; NT (32, 64, 128 or 256); AT_ONCE (blocks on a multiprocessor, 1 or 2); XS (slots of 64 columns of x); CS (slots of 128
// columns of codes); KS (1, 2, 4 or 8); GATED (0, or 1: out = silu(first 16 rows of a tile) * last 16).
#include "tiles.cuh"
#include "wgmma_units.cuh"

#define TILES 4
#define USERS 256
#define THREADS (USERS + 128)
// registers of a thread that brings and one that uses
#define BRINGS (AT_ONCE == 2 ? 40 : 56)
#define USES (AT_ONCE == 2 ? 96 : 224)
// bytes of a slot of x, of a slot of codes with their scales and shifts
#define X_BYTES (NT * 128)
#define TILE_SCALES (SPAN ? GROUPS * SCALE_BYTES : 0)
#define TILE_SHIFTS (SPAN ? GROUPS * SHIFT_BYTES : 0)
#define SCALES_AT (TILES * CODE_BYTES)
#define SHIFTS_AT (SCALES_AT + TILES * TILE_SCALES)
#define C_BYTES (SHIFTS_AT + TILES * TILE_SHIFTS)
// floats between two tokens of a block's sums: no two threads in one bank
#define PITCH 132
// floats of eight tokens' sums, of which two lie there
#define ROOM (8 * PITCH)
#define SHARED_BYTES (XS * X_BYTES + CS * C_BYTES + 8 * ROOM + 16 * (XS + CS))
// token tiles whose x stays in the cache while all rows pass
#define NEAR (4096 / NT)

struct Output {
    const float* token_scales;  // or null: all 1
    const float* add;           // or null; laid out as out is
    float* out;
    int stride;                 // between tokens
    int rows;                   // of the matrix
    int pair;                   // 0, or the rows of each of two matrices whose rows lie 16 and 16 in turn
};

struct Task {
    Weights weights;
    const char* x;
    Output output;
    int blocks, tiles, tokens;
    int first, end;  // pieces of 128 rows x NT tokens to be made
    float by;        // weights are multiplied by it, results divided

    __device__ __forceinline__ int padded() const { return (tokens + 7) / 8 * 8; }
    // the first tile of a rank's share of the columns
    __device__ __forceinline__ int tile(int rank) const { return (int)((u64)tiles * rank / KS); }
};

// Where a piece lies.
struct Piece {
    int block, token;
    __device__ __forceinline__ Piece(const Task& task, int number) {
        int across = (task.tokens + NT - 1) / NT, down = (task.blocks + TILES - 1) / TILES;
        int group = number / (NEAR * down), wide = min(NEAR, across - group * NEAR);
        number -= group * NEAR * down;
        block = number / wide * TILES;
        token = (group * NEAR + number % wide) * NT;
    }
};

// SLOTS places in turn, each full or empty.
template <int SLOTS, int BYTES>
struct Ring {
    char* slots;
    u64* barriers;
    int slot = 0, phase = 0;

    __device__ __forceinline__ void make() const {
        for (int s = 0; s < SLOTS; ++s) {
            barrier_make(barriers + s, 1);
            barrier_make(barriers + SLOTS + s, USERS / 32);
        }
    }
    __device__ __forceinline__ u64* full() const { return barriers + slot; }
    __device__ __forceinline__ u64* empty() const { return barriers + SLOTS + slot; }
    __device__ __forceinline__ char* here() const { return slots + slot * BYTES; }
    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
};
struct Rings {
    Ring<XS, X_BYTES> x;
    Ring<CS, C_BYTES> codes;
};

__device__ __forceinline__ void bring(const Task& task, Rings rings, int rank) {
    int lane = threadIdx.x;
    for (int i = task.first + blockIdx.x / KS; i < task.end; i += gridDim.x / KS) {
        Piece piece(task, i);
        int bytes = min(NT, task.padded() - piece.token) * 128;
        u64 row = (u64)min(piece.block + lane, task.blocks - 1) * task.tiles;
        for (int tile = task.tile(rank); tile < task.tile(rank + 1); ++tile) {
            wait_for(rings.codes.empty(), rings.codes.phase ^ 1);
            if (lane == 0) arrive_expecting(rings.codes.full(), C_BYTES);
            __syncwarp();
            if (lane < TILES) {
                char* to = rings.codes.here();
                u64 at = row + tile, *full = rings.codes.full();
                copy_bulk(to + lane * CODE_BYTES, task.weights.codes + at * CODE_BYTES, CODE_BYTES, full);
                if (TILE_SCALES)
                    copy_bulk(to + SCALES_AT + lane * TILE_SCALES, task.weights.scales + at * TILE_SCALES, TILE_SCALES, full);
                if (TILE_SHIFTS)
                    copy_bulk(to + SHIFTS_AT + lane * TILE_SHIFTS, task.weights.shifts + at * TILE_SHIFTS, TILE_SHIFTS, full);
            }
            rings.codes.next();
            for (int half = 0; half < 2; ++half, rings.x.next()) {
                wait_for(rings.x.empty(), rings.x.phase ^ 1);
                if (lane) continue;
                const char* from = task.x + ((u64)(2 * tile + half) * task.padded() + piece.token) * 128;
                arrive_expecting(rings.x.full(), bytes);
                copy_bulk(rings.x.here(), from, bytes, rings.x.full());
            }
        }
    }
}

__device__ __forceinline__ u32 twice(float v) { return half2_of(v, v); }
__device__ __forceinline__ float power_of_two(int n) { return __uint_as_float((u32)(127 + n) << 23); }

// What makes weights of a thread's codes, for its rows: (code * 2^(at - 9) + less) * scale + more. H: the first or the
// last 16 of a tile's rows.
template <int H>
struct Steps {
    u32 scale[2], less[2], more[2];

    __device__ __forceinline__ void load(const char* scales, const char* shifts, int at, float by) {
        Scale s;
        Shift t;
        s.load(scales, at);
        t.load(shifts, at);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int four = 2 * H + i, raised = Codes<BITS>::at(four) - 9;
            scale[i] = twice(s.get(four) * (by * power_of_two(-raised)));
            less[i] = twice(((SHIFTS == 1 ? t.get(four) : 0.0f) - CENTRE) * power_of_two(raised));
            more[i] = twice(t.get(four) * by);
        }
    }
    // codes as unpack gives them, subnormal halves code * 2^(at - 24); exact up to the last step
    __device__ __forceinline__ void apply(u32* pairs) const {
        const u32 raise = 0x78007800;
#pragma unroll
        for (int i = 8 * H; i < 8 * H + 8; ++i) {
            u32 v = fma2(pairs[i], raise, less[i % 2]);
            pairs[i] = SHIFTS == 2 ? fma2(v, scale[i % 2], more[i % 2]) : mul2(v, scale[i % 2]);
        }
    }
};

// The matrix descriptor of operand B: NT rows of 64 halves, 128 bytes each, whose 16-byte words are exchanged by row % 8
// (mode 1, the 128-byte swizzle); eight rows are 1024 bytes, and the whole begins at a multiple of 1024.
__device__ __forceinline__ u64 described(const char* p) {
    return (u64)((place_of(p) & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// [64 rows x NT tokens of four warps as the matrix unit has them]
typedef float Sums[NT / 2];
// operand A of 32 columns, while those before are still being multiplied
typedef u32 Pairs[2][16];

__device__ __forceinline__ void release(u64* empty) {
    if (threadIdx.x % 32 == 0) arrive(empty);
}

// 128 columns. `last` is the slot of x that is still being multiplied, if there is one, and will be.
template <int H>
__device__ __forceinline__ void add_tile(Sums& sums, Pairs& pairs, Rings& rings, const Steps<H>& of_row, u64*& last, bool more,
                                         float by) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    wait_for(rings.codes.full(), rings.codes.phase);
    const char* codes = rings.codes.here();
    u32 words[4 * BITS];
#pragma unroll
    for (int c = 0; c < BITS; ++c) {
        uint4 v = *(const uint4*)(codes + warp * CODE_BYTES + c * 512 + lane * 16);
        words[4 * c] = v.x; words[4 * c + 1] = v.y; words[4 * c + 2] = v.z; words[4 * c + 3] = v.w;
    }
    Steps<H> steps = of_row;
    u64 x = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        constexpr int span = SPAN ? SPAN : 128;
        if (SPAN && 32 * j % span == 0) {
            int g = 32 * j / span;
            steps.load(codes + SCALES_AT + warp * TILE_SCALES + g * SCALE_BYTES,
                       codes + SHIFTS_AT + warp * TILE_SHIFTS + g * SHIFT_BYTES, lane / 4, by);
        }
        u32* now = pairs[j % 2];
        Codes<BITS>::unpack(words + BITS * j, now);
        steps.apply(now);
        if (j == 3) {
            __syncwarp();
            release(rings.codes.empty());
            rings.codes.next();
        }
        if (j % 2 == 0) {
            wait_for(rings.x.full(), rings.x.phase);
            x = described(rings.x.here());
        }
        products_begin();
#pragma unroll
        for (int p = 0; p < 2; ++p)
            multiply_async<NT>(sums, now + 8 * H + 4 * p, x + (j % 2 * 64 + p * 32) / 16, more || j + p > 0);
        products_end();
        products_wait<1>();
        if (j == 2 || (j == 0 && more)) release(last);
        if (j % 2 == 0) {
            last = rings.x.empty();
            rings.x.next();
        }
    }
}

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

struct Writer {
    const Output& o;
    float* room;
    int block, first, tokens;
    float factors[(NT + 31) / 32];  // of token lane + 32 i
    bool whole;                     // fours can be stored at once

    __device__ __forceinline__ Writer(const Task& task, const Piece& piece, float* room)
        : o(task.output), room(room), block(piece.block), first(piece.token), tokens(task.tokens) {
        float inverse = 1.0f / task.by;
#pragma unroll
        for (int i = 0; i < NT / 32; ++i) {
            int token = min(first + 32 * i + (int)threadIdx.x % 32, tokens - 1);
            factors[i] = o.token_scales ? o.token_scales[token] * inverse : inverse;
        }
        whole = ((u64)o.out | (u64)o.add) % 16 == 0 && o.stride % 4 == 0;
    }

    // four rows, from `r` of 128 (gated: of 64) on
    __device__ __forceinline__ void store(int token, int r, float4 v) const {
        int row = 32 * block + r, end = o.rows;
        u64 to = (u64)token * o.stride;
        if (GATED) {
            row = 16 * block + r;
            end = o.pair;
        } else if (o.pair) {
            row = 16 * (block + r / 32) + r % 16;
            end = o.pair;
            to += r % 32 < 16 ? 0 : o.pair;
        }
        to += row;
        if (whole && row + 4 <= end) {
            if (o.add) {
                float4 a = *(const float4*)(o.add + to);
                v.x += a.x; v.y += a.y; v.z += a.z; v.w += a.w;
            }
            *(float4*)(o.out + to) = v;
            return;
        }
        if (row < end) o.out[to] = (o.add ? o.add[to] : 0.0f) + v.x;
        if (row + 1 < end) o.out[to + 1] = (o.add ? o.add[to + 1] : 0.0f) + v.y;
        if (row + 2 < end) o.out[to + 2] = (o.add ? o.add[to + 2] : 0.0f) + v.z;
        if (row + 3 < end) o.out[to + 3] = (o.add ? o.add[to + 3] : 0.0f) + v.w;
    }

    // Tokens 8 n .. 8 n + 8, a warp for each.
    template <int H>
    __device__ __forceinline__ void eight(const Sums& sums, int n) const {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
        if (first + 8 * n >= tokens) return;
        float* at = room + n % 2 * ROOM;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int slot = lane % 4 * 2 + e;
            float factor = __shfl_sync(0xFFFFFFFF, factors[n / 4], n % 4 * 8 + slot);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                at[slot * PITCH + warp % 4 * 32 + 16 * H + 8 * i + lane / 4] = sums[n * 4 + 2 * i + e] * factor;
        }
        // what lay in the other half has been read by all when they meet here again
        meet(1, USERS);
        int token = first + 8 * n + warp, r = lane * 4;
        if (token >= tokens || (GATED && r >= 64)) return;
        if (GATED) {
            const float* from = at + warp * PITCH + r / 16 * 32 + r % 16;
            float4 gate = *(const float4*)from, up = *(const float4*)(from + 16);
            store(token, r, float4{silu(gate.x) * up.x, silu(gate.y) * up.y, silu(gate.z) * up.z, silu(gate.w) * up.w});
        } else {
            store(token, r, *(const float4*)(at + warp * PITCH + r));
        }
    }
};

#if KS > 1
// A block keeps the sums of NT / KS tokens: its own, and those of the others, which lie in its ring.
#define SHARE (NT / 8 / KS)
__device__ __forceinline__ void share(const Sums& sums, float* room, int rank) {
#pragma unroll
    for (int d = 0; d < KS; ++d) {
        if (d == rank) continue;
        float* to = room + (rank < d ? rank : rank - 1) * SHARE * 4 * USERS + (int)threadIdx.x - 128;
#pragma unroll
        for (int v = 0; v < SHARE * 4; ++v) store_there(to + v * USERS, d, sums[d * SHARE * 4 + v]);
    }
}
__device__ __forceinline__ void gather(Sums& sums, const float* room, int d) {
#pragma unroll
    for (int s = 0; s < KS - 1; ++s)
#pragma unroll
        for (int v = 0; v < SHARE * 4; ++v)
            sums[d * SHARE * 4 + v] += room[(s * SHARE * 4 + v) * USERS + (int)threadIdx.x - 128];
}
#endif

template <int H>
__device__ __forceinline__ void use(const Task& task, Rings rings, float* room, int rank) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    for (int i = task.first + blockIdx.x / KS; i < task.end; i += gridDim.x / KS) {
        Piece piece(task, i);
        Sums sums;
        Pairs pairs;
        Steps<H> of_row;
        if (SPAN == 0) {
            u64 b = (u64)min(piece.block + warp, task.blocks - 1);
            of_row.load(task.weights.scales + b * SCALE_BYTES, task.weights.shifts + b * SHIFT_BYTES, lane / 4, task.by);
        }
        u64* last = nullptr;
        int start = task.tile(rank), stop = task.tile(rank + 1);
        for (int tile = start; tile < stop; ++tile) add_tile<H>(sums, pairs, rings, of_row, last, tile > start, task.by);
        Writer writer(task, piece, room);
        products_wait<0>();
        release(last);
#pragma unroll
        for (int v = 0; v < NT / 2; ++v) settled(sums[v]);
#if KS > 1
        // the rings are empty now in all blocks; a cluster has one piece
        cluster_meets();
        share(sums, (float*)rings.x.slots, rank);
        cluster_meets();
#pragma unroll
        for (int d = 0; d < KS; ++d) {
            if (d != rank) continue;
            gather(sums, (const float*)rings.x.slots, d);
#pragma unroll
            for (int n = 0; n < SHARE; ++n) writer.eight<H>(sums, d * SHARE + n);
        }
#else
#pragma unroll
        for (int n = 0; n < NT / 8; ++n) writer.eight<H>(sums, n);
#endif
    }
}

extern "C" __global__ void
#if KS > 1
__cluster_dims__(KS, 1, 1)
#endif
__launch_bounds__(THREADS, AT_ONCE) crowd(const __grid_constant__ Task task) {
    extern __shared__ __align__(1024) char shared[];
    char* codes = shared + XS * X_BYTES;
    float* room = (float*)(codes + CS * C_BYTES);
    u64* barriers = (u64*)(room + 2 * ROOM);
    Rings rings{{shared, barriers}, {codes, barriers + 2 * XS}};
    int rank = KS > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        rings.x.make();
        rings.codes.make();
        barriers_made();
    }
    __syncthreads();
    wait_for_inputs();
    let_next_begin();
    if (threadIdx.x < 128) {
        keep_fewer_registers<BRINGS>();
        if (threadIdx.x < 32) bring(task, rings, rank);
#if KS > 1
        __syncwarp();
        cluster_meets();
        cluster_meets();
#endif
    } else {
        take_more_registers<USES>();
        if (threadIdx.x < 256) use<0>(task, rings, room, rank);
        else use<1>(task, rings, room, rank);
    }
}
