// Many tokens times packed weights on a Hopper card: out[token][row] = sum over columns of x[token][column] * w[row][column].
//
// The transposed product is computed: weights are operand A, whose registers packed tiles already have the order of; they
// become halves there, scaled. Activations are operand B, in shared memory. A block has 128 rows x NT tokens: two groups
// of four warps, the first with the first 16 rows of each of four tiles, the second with the last 16; a third group, of
// which one warp brings tiles and activations into two rings. While the matrix units multiply 32 columns the next 32 become
// halves. KS blocks, a cluster, share the columns of a tile and add their sums up in each other's memory, in the order of
// their ranks. What is run once for all columns is kept short: its instructions come from far.
//
// x lies as [columns / 64][tokens, filled up to eights][64] halves: of 32 columns the pairs 4 * thread + member lie as
// 4 * member + thread, which is the order operand A has them in; then the 16-byte words of a token's 64 are exchanged, word
// w to w ^ token % 8, which is how the matrix units want them (see `described`). So what a block wants is one stretch.
//
// Defined by whoever compiles: what tiles.cuh wants; NT (32, 64, 128 or 256); AT_ONCE (blocks on a multiprocessor, 1 or 2); XS (slots of 64 columns of x); CS (slots of 128
// columns of codes); KS (1, 2, 4 or 8); GATED (0, or 1: out = silu(first 16 rows of a tile) * last 16).
#include "output.cuh"
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
// tokens whose sums are turned round at a time, in two rooms
#define PART (NT / 4)
#define ROOMS_BYTES (2 * PART * PITCH * 4)
#define SHARED_BYTES (XS * X_BYTES + CS * C_BYTES + ROOMS_BYTES + 16 * (XS + CS))
// token tiles whose x stays in the cache while all rows pass
#define NEAR_TILES (4096 / NT)

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
        int group = number / (NEAR_TILES * down), wide = min(NEAR_TILES, across - group * NEAR_TILES);
        number -= group * NEAR_TILES * down;
        block = number / wide * TILES;
        token = (group * NEAR_TILES + number % wide) * NT;
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

// A thread's sums of tokens 8 n .. 8 n + 8 go to a room: [token][128 rows].
template <int H, class Room>
__device__ __forceinline__ void turn(const Sums& sums, int n, const Room& room, int slot) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int v = 0; v < 4; ++v)
        room.store((slot + v % 2) * PITCH + 8 * (v / 2), (lane % 4 * 2) * PITCH + warp * 32 + 16 * H + lane / 4, sums[n * 4 + v]);
}

// Rows of a block, as the threads of a warp write them: those of a tile side by side.
struct Writer {
    const Output& o;
    int tokens;
    float inverse;
    int to[4];  // a thread's places of a token, -1 where there is none

    __device__ __forceinline__ Writer(const Task& task, int block) : o(task.output), tokens(task.tokens), inverse(1.0f / task.by) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            int row = 32 * (block + q) + lane;
            if (GATED) {
                row = 16 * block + 32 * q + lane;
                to[q] = q < 2 && row < o.pair ? row : -1;
            } else if (o.pair) {
                row = 16 * (block + q) + lane % 16;
                to[q] = row < o.pair ? row + (lane < 16 ? 0 : o.pair) : -1;
            } else {
                to[q] = row < o.rows ? row : -1;
            }
        }
    }
    // what tokens first + warp + 8 * lane are to be multiplied by
    __device__ __forceinline__ float factor(int first) const {
        int token = first + (int)threadIdx.x / 32 - 4 + 8 * ((int)threadIdx.x % 32);
        return o.token_scales ? o.token_scales[min(token, tokens - 1)] * inverse : inverse;
    }
    // COUNT tokens from a room, or from KS rooms, one of each rank, which are added up in their order
    template <int COUNT>
    __device__ __forceinline__ void write(const float* room, int first, float factors) const {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
        float* out[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) out[q] = o.out + (u64)(first + warp) * o.stride + to[q];
        u64 apart = (u64)o.add - (u64)o.out;
        const float* from = room + warp * PITCH + lane;
#pragma unroll 1
        for (int i = 0; i < (COUNT + 7) / 8; ++i, from += 8 * PITCH) {
            float by = __shfl_sync(0xFFFFFFFF, factors, i);
            if (first + warp + 8 * i >= tokens || warp + 8 * i >= COUNT) return;
            float v[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) v[q] = from[32 * q];
#pragma unroll
            for (int r = 1; r < KS; ++r)
#pragma unroll
                for (int q = 0; q < 4; ++q) v[q] += from[r * COUNT * PITCH + 32 * q];
#pragma unroll
            for (int q = 0; q < 4; ++q) v[q] *= by;
            if (GATED) {
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    // 16 rows of the first matrix, 16 of the second: lanes 0 to 15 have what lanes 16 to 31 want
                    float up = __shfl_down_sync(0xFFFFFFFF, v[q], 16);
                    v[q] = silu(v[q]) * up;
                }
                // two tiles' halves of a warp become one
                float a = __shfl_up_sync(0xFFFFFFFF, v[1], 16), b = __shfl_up_sync(0xFFFFFFFF, v[3], 16);
                v[0] = lane < 16 ? v[0] : a;
                v[1] = lane < 16 ? v[2] : b;
            }
            if (o.add) {
                float more[4];
#pragma unroll
                for (int q = 0; q < 4; ++q) more[q] = to[q] >= 0 ? *(const float*)((u64)out[q] + apart) : 0.0f;
#pragma unroll
                for (int q = 0; q < 4; ++q) v[q] += more[q];
            }
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                if (to[q] >= 0) *out[q] = v[q];
                out[q] += 8 * (u64)o.stride;
            }
        }
    }
};

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
        Writer writer(task, piece.block);
        constexpr int part = KS > 1 ? NT / KS : PART;
        float factors[KS > 1 ? 1 : NT / PART];
        int own = piece.token + (KS > 1 ? rank * part : 0);
#pragma unroll
        for (int c = 0; c < (KS > 1 ? 1 : NT / PART); ++c) factors[c] = writer.factor(own + c * part);
        products_wait<0>();
        release(last);
#pragma unroll
        for (int v = 0; v < NT / 2; ++v) settled(sums[v]);
#if KS > 1
        // the rings are empty in all blocks when they meet: the sums of a rank's tokens go to its room `rank` there
        cluster_meets();
#pragma unroll
        for (int d = 0; d < KS; ++d) {
            Far there((float*)rings.x.slots + rank * part * PITCH, d);
#pragma unroll
            for (int n = 0; n < part / 8; ++n) turn<H>(sums, d * (part / 8) + n, there, 8 * n);
        }
        cluster_meets();
        writer.write<part>((const float*)rings.x.slots, own, factors[0]);
#else
#pragma unroll
        for (int c = 0; c < NT / PART; ++c) {
            if (own + c * part >= task.tokens) break;
            Near here{room + c % 2 * PART * PITCH};
#pragma unroll
            for (int n = 0; n < part / 8; ++n) turn<H>(sums, c * (part / 8) + n, here, 8 * n);
            // what lay in the other room has been read by all when they meet here
            meet(1, USERS);
            writer.write<part>(here.at, own + c * part, factors[c]);
        }
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
    u64* barriers = (u64*)((char*)room + ROOMS_BYTES);
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
        // once for each of the users' meetings; a cluster has one piece
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
