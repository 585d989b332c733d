// Codes as a format of integers stores them, a stream of WIDTH bits along each row, laid out for the products in BITS
// (see fewbit/kernels/_cuda_layout.py, which also makes FIELDS).
#include "pieces.cuh"

struct Field { int pair, word, at, first, count; };
__device__ constexpr Field fields[] = FIELDS;
constexpr int COUNT = sizeof(fields) / sizeof(Field);

// `first` and `second` [rows][stride bytes]: 16 rows of each in turn, or rows of `first` alone where there is no other.
// A block of 128 threads writes one tile; eight neighbours of a row begin on a byte.
extern "C" __global__ void __launch_bounds__(128)
pack(const u8* first, const u8* second, u64 stride, int rows, int columns, int tiles, u32* out) {
    int lane = threadIdx.x % 32, quarter = threadIdx.x / 32, block = blockIdx.x, tile = blockIdx.y;
    int column = tile * 128 + quarter * 32 + lane % 4 * 8;
    u32 codes[4][8];
#pragma unroll
    for (int four = 0; four < 4; ++four) {
        int r = four * 8 + lane / 4, row = second ? block * 16 + r % 16 : block * 32 + r;
        u64 stream = 0;
        if (row < rows && column < columns) {
            u64 start = (u64)column / 8 * WIDTH;
            const u8* from = (second && r >= 16 ? second : first) + row * stride;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                if (start + i < stride) stream |= (u64)from[start + i] << 8 * i;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
            codes[four][i] = column + i < columns ? (u32)(stream >> WIDTH * i) & ((1u << WIDTH) - 1) : 0;
    }
    u32 words[BITS] = {};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const Field f = fields[i];
        const u32* two = codes[f.pair / 8 * 2 + f.pair % 2] + f.pair % 8 / 2 * 2;
        u32 mask = (1u << f.count) - 1;
        words[f.word] |= (two[0] >> f.first & mask) << f.at | (two[1] >> f.first & mask) << (f.at + 16);
    }
    u32* to = out + ((u64)block * tiles + tile) * BITS * 128 + lane * 4;
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
        int place = quarter * BITS + i;
        to[place / 4 * 128 + place % 4] = words[i];
    }
}
