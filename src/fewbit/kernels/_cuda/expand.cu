// Packed weights written out: as halves for a dense product, or single rows as floats.
#include "tiles.cuh"

// One of a thread's four rows in 32 columns of a tile: eight neighbours, scaled.
__device__ __forceinline__ void values(float* v, const u32* pairs, int four, float scale, float shift) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 pair = pairs[four / 2 * 8 + i / 2 * 4 + i % 2 * 2 + four % 2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float code = float_of_half((u16)(pair >> (16 * half)));
            v[2 * i + half] = SHIFTS == 1 ? scale * (code + shift) : SHIFTS == 2 ? scale * code + shift : scale * code;
        }
    }
}

struct Scaling {
    Four<SCALES> scales;
    Shift shifts;
    __device__ __forceinline__ Scaling(const Tile& tile, const Weights& w, int j, int block, int lane) {
        constexpr int span = SPAN ? SPAN : 128;
        if (SPAN) {
            scales = tile.scales[32 * j / span];
            shifts = tile.shifts[32 * j / span];
        } else {
            scales.load(w.scales, block * 8 + lane / 4);
            shifts.load(w.shifts, block * 8 + lane / 4);
        }
    }
};

// Blocks first .. first + count of rows -> halves [rows][tiles * 128], times `factor`. A matrix of pairs gives the rows
// of its first half and behind them, 16 * count rows on, those of its second.
extern "C" __global__ void __launch_bounds__(128)
expand(Weights weights, u16* out, int first, int count, int tiles, int pair, float factor) {
    int lane = threadIdx.x % 32, at = blockIdx.y * 4 + threadIdx.x / 32, block = first + blockIdx.x;
    if (at >= tiles) return;
    Tile tile;
    load(tile, weights, (u64)block * tiles + at, lane);
    const u32* words = (const u32*)tile.words;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        Scaling s(tile, weights, j, block, lane);
        u32 pairs[16];
        Codes<BITS>::unpack(words + BITS * j, pairs);
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            float v[8];
            values(v, pairs, four, s.scales.get(four) * factor, SHIFTS == 2 ? s.shifts.get(four) * factor : s.shifts.get(four));
            int r = four * 8 + lane / 4;
            u64 row = pair ? (u64)(r / 16) * 16 * count + blockIdx.x * 16 + r % 16 : (u64)blockIdx.x * 32 + r;
            u16* to = out + (row * tiles + at) * 128 + 32 * j + lane % 4 * 8;
            *(uint4*)to = make_uint4(half2_of(v[0], v[1]), half2_of(v[2], v[3]), half2_of(v[4], v[5]), half2_of(v[6], v[7]));
        }
    }
}

// Rows `ids` less first_row -> floats [ids][columns]; what lies beyond the matrix is left as it is.
extern "C" __global__ void __launch_bounds__(128)
gather(Weights weights, const long long* ids, float* out, int rows, int columns, int tiles, int pair, int first_row) {
    int at = blockIdx.y * 32 + threadIdx.x / 4, t = threadIdx.x % 4;
    long long id = ids[blockIdx.x] - first_row;
    if (at >= tiles || id < 0 || id >= rows) return;
    int block = (int)id / 32, r = (int)id % 32;
    if (pair) {
        int of_pair = (int)id % pair;
        block = of_pair / 16;
        r = of_pair % 16 + ((int)id >= pair ? 16 : 0);
    }
    int lane = r % 8 * 4 + t;
    Tile tile;
    load(tile, weights, (u64)block * tiles + at, lane);
    const u32* words = (const u32*)tile.words;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        Scaling s(tile, weights, j, block, lane);
        u32 pairs[16];
        Codes<BITS>::unpack(words + BITS * j, pairs);
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            if (four != r / 8) continue;
            float v[8];
            values(v, pairs, four, s.scales.get(four), s.shifts.get(four));
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                int column = at * 128 + 32 * j + t * 8 + i;
                if (column < columns) out[(u64)blockIdx.x * columns + column] = v[i];
            }
        }
    }
}
