// Many tokens times packed weights on a Hopper card: out[token][row] = sum over columns of x[token][column] * w[row][column].
//
// The transposed product is computed: weights are operand A, whose registers packed tiles already have the order of; they
// become halves there, scaled. Activations are operand B, in shared memory. A block has 256 rows x NT tokens: two groups
// of four warps, each warp with 32 rows, and a third group of which one warp brings the tiles into a ring of STAGES. While
// the matrix units multiply 32 columns the next 32 become halves. KS blocks, a cluster, share the columns of a tile and
// add their sums up in each other's memory, in the order of their ranks. MC blocks, a cluster too, have the same tokens and
// each brings a part of x to all.
//
// x lies as [columns / 64][tokens, filled up to eights][64] halves: of 32 columns the pairs 4 * thread + member lie as
// 4 * member + thread, which is the order operand A has them in; then the 16-byte words of a token's 64 are exchanged, word
// w to w ^ token % 8, which is how the matrix units want them (see `described`). So a stage's part of x is one stretch.
//
// Defined by whoever compiles: what tiles.cuh wants; NT (64 or 128); STAGES; KS (1, 2, 4 or 8); MC (1 or 2; 1 unless KS is); SKEW (tiles that the
// second group stays behind the first, so that one writes while the other multiplies); GATED (0, or 1: out = silu(first
// 16 rows of a tile) * last 16).
#include "tiles.cuh"
#include "wgmma_units.cuh"
#define BLOCKS 4

#define GROUPS_OF_WARPS 2
#define WARPS (4 * GROUPS_OF_WARPS)
#define THREADS (32 * (WARPS + 4))
#define CLUSTER (KS * MC)
// bytes of a stage
#define X_BYTES (NT * 256)
#define SCALES_AT (X_BYTES + BLOCKS * CODE_BYTES)
#define TILE_SCALES (SPAN ? GROUPS * SCALE_BYTES : 0)
#define TILE_SHIFTS (SPAN ? GROUPS * SHIFT_BYTES : 0)
#define SHIFTS_AT (SCALES_AT + BLOCKS * TILE_SCALES)
#define STAGE_BYTES ((SHIFTS_AT + BLOCKS * TILE_SHIFTS + 1023) / 1024 * 1024)
// floats between two tokens of a warp's sums: no two threads in one bank
#define PITCH 20
#define ROOM_BYTES (WARPS * 8 * PITCH * 4)

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
    float by;  // weights are multiplied by it, results divided

    __device__ __forceinline__ int padded() const { return (tokens + 7) / 8 * 8; }
    __device__ __forceinline__ int across() const { return (tokens + NT - 1) / NT; }
    __device__ __forceinline__ int count() const { return (blocks + BLOCKS * MC - 1) / (BLOCKS * MC) * across(); }
    // of pieces numbered 0 .. count, the first token and a warp's block of rows
    __device__ __forceinline__ int token(int piece) const { return piece % across() * NT; }
    __device__ __forceinline__ int block(int piece, int rank, int warp) const {
        return (piece / across() * MC + rank % MC) * BLOCKS + warp;
    }
    // of `rank` in a cluster
    __device__ __forceinline__ int tile(int rank) const { return (int)((u64)tiles * (rank / MC) / KS); }
};

// Where a walk round the ring has come.
struct Place {
    int slot = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
};

struct Ring {
    char* stages;
    u64* full;
    u64* empty;
};

__device__ __forceinline__ void bring(const Task& task, const Ring& ring, int rank) {
    int lane = threadIdx.x % 32;
    Place at;
    for (int i = blockIdx.x / CLUSTER; i < task.count(); i += gridDim.x / CLUSTER) {
        int first = task.token(i), block = task.block(i, rank, lane);
        int bytes = min(NT, task.padded() - first) * 128;
        u64 row = (u64)min(block, task.blocks - 1) * task.tiles;
        for (int tile = task.tile(rank); tile < task.tile(rank + MC); ++tile, at.next()) {
            wait_for(ring.empty + at.slot, at.phase ^ 1);
            char* stage = ring.stages + at.slot * STAGE_BYTES;
            u64* full = ring.full + at.slot;
            if (lane == 0) arrive_expecting(full, 2 * bytes + BLOCKS * (CODE_BYTES + TILE_SCALES + TILE_SHIFTS));
            __syncwarp();
            if (lane < BLOCKS) {
                copy_bulk(stage + X_BYTES + lane * CODE_BYTES, task.weights.codes + (row + tile) * CODE_BYTES, CODE_BYTES, full);
                if (TILE_SCALES)
                    copy_bulk(stage + SCALES_AT + lane * TILE_SCALES, task.weights.scales + (row + tile) * TILE_SCALES, TILE_SCALES, full);
                if (TILE_SHIFTS)
                    copy_bulk(stage + SHIFTS_AT + lane * TILE_SHIFTS, task.weights.shifts + (row + tile) * TILE_SHIFTS, TILE_SHIFTS, full);
            } else if (lane < BLOCKS + 2) {
                int half = lane - BLOCKS;
                char* to = stage + half * NT * 128;
                const char* from = task.x + ((u64)(2 * tile + half) * task.padded() + first) * 128;
                if (MC == 1) copy_bulk(to, from, bytes, full);
                if (MC == 2 && half == rank) copy_bulk_to(to, from, bytes, full, 3);
            }
        }
    }
}

__device__ __forceinline__ u32 twice(float v) { return half2_of(v, v); }
__device__ __forceinline__ float power_of_two(int n) { return __uint_as_float((u32)(127 + n) << 23); }

// What makes weights of a thread's codes, for its four rows: (code * 2^(at - 9) + less) * scale + more.
struct Steps {
    u32 scale[4], less[4], more[4];

    __device__ __forceinline__ void load(const char* scales, const char* shifts, int at, float by) {
        Scale s;
        Shift t;
        s.load(scales, at);
        t.load(shifts, at);
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            int raised = Codes<BITS>::at(four) - 9;
            scale[four] = twice(s.get(four) * (by * power_of_two(-raised)));
            less[four] = twice(((SHIFTS == 1 ? t.get(four) : 0.0f) - CENTRE) * power_of_two(raised));
            more[four] = twice(t.get(four) * by);
        }
    }
    // codes as unpack gives them, subnormal halves code * 2^(at - 24); exact up to the last step
    template <int G>
    __device__ __forceinline__ void apply(u32* pairs) const {
        const u32 raise = 0x78007800;
#pragma unroll
        for (int i = 8 * G; i < 8 * G + 8; ++i) {
            int four = i / 8 * 2 + i % 2;
            u32 v = fma2(pairs[i], raise, less[four]);
            pairs[i] = SHIFTS == 2 ? fma2(v, scale[four], more[four]) : mul2(v, scale[four]);
        }
    }
};

// The matrix descriptor of operand B: NT rows of 64 halves, 128 bytes each, whose 16-byte words are exchanged by row % 8
// (mode 1, the 128-byte swizzle); eight rows are 1024 bytes, and the whole begins at a multiple of 1024.
__device__ __forceinline__ u64 described(const char* p) {
    return (u64)((place_of(p) & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// [first or last 16 of a warp's rows][64 rows x NT tokens of the four warps as the matrix unit has them]
typedef float Sums[NT / 2];
// operand A of 32 columns, while those before are still being multiplied
typedef u32 Pairs[2][16];

// This warp needs a stage no longer; whoever fills it for this block hears of it.
__device__ __forceinline__ void release(u64* empty) {
    int lane = threadIdx.x % 32;
    if (MC == 1) {
        if (lane == 0) arrive(empty);
    } else if (lane < MC) {
        arrive_there(empty, lane);
    }
}

// One stage. `before`: the barrier of the stage before it, once its products are done.
template <int G>
__device__ __forceinline__ void add_tile(Sums& sums, Pairs& pairs, const char* stage, const Steps& of_row, int warp,
                                         bool more, u64* before, float by) {
    int lane = threadIdx.x % 32;
    u32 words[4 * BITS];
#pragma unroll
    for (int c = 0; c < BITS; ++c) {
        uint4 v = *(const uint4*)(stage + X_BYTES + warp * CODE_BYTES + c * 512 + lane * 16);
        words[4 * c] = v.x; words[4 * c + 1] = v.y; words[4 * c + 2] = v.z; words[4 * c + 3] = v.w;
    }
    u64 x = described(stage);
    Steps steps = of_row;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        constexpr int span = SPAN ? SPAN : 128;
        if (SPAN && 32 * j % span == 0) {
            int g = 32 * j / span;
            steps.load(stage + SCALES_AT + warp * TILE_SCALES + g * SCALE_BYTES,
                       stage + SHIFTS_AT + warp * TILE_SHIFTS + g * SHIFT_BYTES, lane / 4, by);
        }
        u32* now = pairs[j % 2];
        Codes<BITS>::unpack(words + BITS * j, now);
        steps.apply<G>(now);
        products_begin();
#pragma unroll
        for (int p = 0; p < 2; ++p)

                multiply_async<NT>(sums, now + 8 * G + 4 * p, x + (j / 2 * NT * 128 + j % 2 * 64 + p * 32) / 16,
                                   more || j + p > 0);
        products_end();
        products_wait<1>();
        if (j == 0 && more) release(before);
    }
}

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

struct Writer {
    const Output& o;
    float* room;  // of this warp
    int block, first, tokens;
    float inverse;
    int half;

    // four rows of a token from `row` of the warp's on
    __device__ __forceinline__ void store(int token, int r, float4 v) const {
        int row = 32 * block + r, end = o.rows;
        u64 to = (u64)token * o.stride;
        if (GATED) row = 16 * block + r, end = o.pair;
        else if (o.pair) {
            row = 16 * block + r % 16;
            end = o.pair;
            to += r < 16 ? 0 : o.pair;
        }
        if (row >= end) return;
        to += row;
        float* out = o.out + to;
        const float* add = o.add ? o.add + to : nullptr;
        if (row + 4 <= end && (u64)out % 16 == 0 && (u64)add % 16 == 0) {
            if (add) {
                float4 a = *(const float4*)add;
                v.x += a.x; v.y += a.y; v.z += a.z; v.w += a.w;
            }
            *(float4*)out = v;
            return;
        }
        const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (row + i < end) out[i] = (add ? add[i] : 0.0f) + four[i];
    }

    // tokens 8 n .. 8 n + 8
    __device__ __forceinline__ void eight(const Sums& sums, int n) const {
        int lane = threadIdx.x % 32, start = first + 8 * n;
        if (start >= tokens) return;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int slot = lane % 4 * 2 + e;
            float factor = inverse;
            if (o.token_scales) factor *= o.token_scales[min(start + slot, tokens - 1)];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                room[slot * PITCH + 8 * i + lane / 4] = sums[n * 4 + 2 * i + e] * factor;
            }
        }
        __syncwarp();
        constexpr int lanes = 4;
#pragma unroll
        for (int u = 0; u < lanes / 4; ++u) {
            int slot = u * (32 / lanes) + lane / lanes, r = lane % lanes * 4;
            float4 v = *(const float4*)(room + slot * PITCH + r);
            if (start + slot < tokens) store(start + slot, 16 * half + r, v);
        }
        __syncwarp();
    }
};

template <int G>
__device__ __forceinline__ void use(const Task& task, const Ring& ring, float* rooms, int rank) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4 - 4 * G;
    bool second = G;
    int steps_ahead = SKEW;
    Place at;
    if (SKEW && second && blockIdx.x / CLUSTER < task.count()) meet(1, 256);
    for (int i = blockIdx.x / CLUSTER; i < task.count(); i += gridDim.x / CLUSTER) {
        int first = task.token(i), block = task.block(i, rank, warp);
        Sums sums;
        Pairs pairs;
        Steps of_row;
        if (SPAN == 0) {
            u64 b = (u64)min(block, task.blocks - 1);
            of_row.load(task.weights.scales + b * SCALE_BYTES, task.weights.shifts + b * SHIFT_BYTES, lane / 4, task.by);
        }
        int start = task.tile(rank), stop = task.tile(rank + MC);
        u64* before = ring.empty;
        for (int tile = start; tile < stop; ++tile, at.next()) {
            wait_for(ring.full + at.slot, at.phase);
            add_tile<G>(sums, pairs, ring.stages + at.slot * STAGE_BYTES, of_row, warp, tile > start, before, task.by);
            before = ring.empty + at.slot;
            if (SKEW && !second && --steps_ahead == 0) announce(1, 256);
        }
        products_wait<0>();
        release(before);
#pragma unroll
            for (int v = 0; v < NT / 2; ++v) settled(sums[v]);
        Writer writer{task.output, rooms + (warp + 4 * G) * 8 * PITCH, block, first, task.tokens, 1.0f / task.by, G};
#pragma unroll
        for (int n = 0; n < NT / 8; ++n) writer.eight(sums, n);
    }
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, 1) many(const __grid_constant__ Task task) {
    extern __shared__ __align__(1024) char shared[];
    Ring ring{shared, (u64*)(shared + STAGES * STAGE_BYTES + ROOM_BYTES), nullptr};
    ring.empty = ring.full + STAGES;
    int rank = CLUSTER > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_make(ring.full + s, 1);
            barrier_make(ring.empty + s, WARPS * MC);
        }
        barriers_made();
    }
    __syncthreads();
    if (MC > 1) cluster_meets();
    wait_for_inputs();
    let_next_begin();
    if (threadIdx.x < 128) {
        keep_fewer_registers<56>();
        if (threadIdx.x < 32) bring(task, ring, rank);
    } else {
        take_more_registers<224>();
        if (threadIdx.x < 256) use<0>(task, ring, (float*)(shared + STAGES * STAGE_BYTES), rank);
        else use<1>(task, ring, (float*)(shared + STAGES * STAGE_BYTES), rank);
    }
    // nobody leaves while others may still arrive at its barriers
    if (MC > 1) {
        __syncwarp();
        cluster_meets();
    }
}
