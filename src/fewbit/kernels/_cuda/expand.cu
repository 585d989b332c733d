// Packed weights written out: as halves for a dense product, or single rows as floats.
#include "tiles.cuh"

struct Tile {
    u32 words[4 * BITS];
    Scale scales[GROUPS];
    Shift shifts[GROUPS];

    __device__ __forceinline__ void load(const Weights& w, int block, int tiles, int at, int lane) {
        u64 tile = (u64)block * tiles + at;
#pragma unroll
        for (int c = 0; c < BITS; ++c) {
            uint4 v = __ldcs((const uint4*)(w.codes + tile * CODE_BYTES + c * 512 + lane * 16));
            words[4 * c] = v.x; words[4 * c + 1] = v.y; words[4 * c + 2] = v.z; words[4 * c + 3] = v.w;
        }
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            u64 group = SPAN ? tile * GROUPS + g : block;
            scales[g].load(w.scales + group * SCALE_BYTES, lane / 4);
            shifts[g].load(w.shifts + group * SHIFT_BYTES, lane / 4);
        }
    }

    // Eight neighbours of row `four` in 32 of the columns, times `by`.
    __device__ __forceinline__ void values(float* v, const u32* pairs, int j, int four, float by) const {
        int g = SPAN ? 32 * j / (SPAN ? SPAN : 1) : 0;
        float scale = scales[g].get(four) * by, less = SHIFTS == 1 ? shifts[g].get(four) - CENTRE : -CENTRE;
        float shift = SHIFTS == 2 ? shifts[g].get(four) * by : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float code = float_of_half((u16)(pairs[pair_of(four, i / 2)] >> (16 * (i % 2)))) * factor<BITS>(four);
            v[i] = scale * (code + less) + shift;
        }
    }
};

// Blocks first .. first + count of rows -> halves [rows][tiles * 128], times `by`. A matrix of pairs gives the rows of
// its first half and behind them, 16 * count rows on, those of its second.
extern "C" __global__ void __launch_bounds__(128)
expand(Weights weights, u16* out, int first, int count, int tiles, int pair, float by) {
    int lane = threadIdx.x % 32, at = blockIdx.y * 4 + threadIdx.x / 32;
    if (at >= tiles) return;
    Tile tile;
    tile.load(weights, first + blockIdx.x, tiles, at, lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        u32 pairs[16];
        Codes<BITS>::unpack(tile.words + BITS * j, pairs);
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            float v[8];
            tile.values(v, pairs, j, four, by);
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
    Tile tile;
    tile.load(weights, block, tiles, at, r % 8 * 4 + t);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        u32 pairs[16];
        Codes<BITS>::unpack(tile.words + BITS * j, pairs);
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            if (four != r / 8) continue;
            float v[8];
            tile.values(v, pairs, j, four, 1.0f);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                int column = at * 128 + 32 * j + t * 8 + i;
                if (column < columns) out[(u64)blockIdx.x * columns + column] = v[i];
            }
        }
    }
}
