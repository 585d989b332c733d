// Stands in for wgmma_units.cuh, so that wgmma.cu runs on a CPU: blocks of a cluster side by side, a thread for each of
// theirs. Products are made when they are waited for, from what registers and shared memory hold then.
#pragma once
#include "pieces.cuh"
#include <condition_variable>
#include <mutex>

#undef __launch_bounds__
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(x, y, z)
#define __syncthreads here_block_meets
#define __syncwarp here_warp_meets
#define __shfl_sync(mask, value, lane) here_shuffled(value, lane)
#define __shfl_down_sync(mask, value, by) here_shuffled(value, std::min(thread_number() % 32 + by, 31))
#define __shfl_up_sync(mask, value, by) here_shuffled(value, std::max(thread_number() % 32 - by, 0))

struct Cluster;
struct HopperBlock {
    char* shared;
    int rank, threads;
    Cluster* cluster;
    std::barrier<> together{threads}, named{256};
    std::vector<std::unique_ptr<std::barrier<>>> warps, fours;
    u32 a[64][32][4];
    float shuffled[64][32];
    HopperBlock(char* shared, int rank, int threads, Cluster* cluster)
        : shared(shared), rank(rank), threads(threads), cluster(cluster) {
        for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<std::barrier<>>(32));
        for (int i = 0; i < threads / 128; ++i) fours.push_back(std::make_unique<std::barrier<>>(128));
    }
};
struct Cluster {
    std::vector<std::unique_ptr<HopperBlock>> blocks;
    std::barrier<> together;
    explicit Cluster(int threads) : together(threads) {}
};
inline thread_local HopperBlock* here;
inline int thread_number() { return threadIdx.x; }
inline void here_block_meets() { here->together.arrive_and_wait(); }
inline void here_warp_meets() { here->warps[thread_number() / 32]->arrive_and_wait(); }
inline float here_shuffled(float value, int lane) {
    float* all = here->shuffled[thread_number() / 32];
    all[thread_number() % 32] = value;
    here_warp_meets();
    float got = all[lane];
    here_warp_meets();
    return got;
}

inline u32 place_of(const void* p) { return (u32)((const char*)p - here->shared); }

inline u32 half_bits(double v) {
    _Float16 h = (_Float16)v;
    u16 u;
    memcpy(&u, &h, 2);
    return u;
}
inline u32 half2_of(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline u32 fma2(u32 a, u32 b, u32 c) {
    auto one = [](u32 a, u32 b, u32 c) {
        return half_bits((double)float_of_half((u16)a) * float_of_half((u16)b) + float_of_half((u16)c));
    };
    return one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16;
}
inline u32 mul2(u32 a, u32 b) { return fma2(a, b, 0x80008000); }

struct Bar {
    std::mutex m;
    std::condition_variable changed;
    int arrivals, pending, phase = 0;
    long bytes = 0;
    void look() {
        if (pending || bytes) return;
        pending = arrivals;
        phase ^= 1;
        changed.notify_all();
    }
};
inline Bar& bar_of(u64* b) { return *(Bar*)*b; }
inline void barrier_make(u64* b, int arrivals) {
    Bar* made = new Bar;
    made->arrivals = made->pending = arrivals;
    *b = (u64)made;
}
inline void barriers_made() {}
inline void arrive_expecting(u64* b, int bytes) {
    std::lock_guard lock(bar_of(b).m);
    bar_of(b).bytes += bytes;
    --bar_of(b).pending;
    bar_of(b).look();
}
inline void arrive(u64* b) { arrive_expecting(b, 0); }
inline void wait_for(u64* b, int phase) {
    std::unique_lock lock(bar_of(b).m);
    bar_of(b).changed.wait(lock, [&] { return bar_of(b).phase != phase; });
}
inline void copy_bulk(char* to, const char* from, int bytes, u64* b) {
    if (bytes % 16 || (u64)from % 16 || (u64)to % 16) abort();
    memcpy(to, from, bytes);
    std::lock_guard lock(bar_of(b).m);
    bar_of(b).bytes -= bytes;
    bar_of(b).look();
}

template <int> void keep_fewer_registers() {}
template <int> void take_more_registers() {}
inline void meet(int, int) { here->named.arrive_and_wait(); }
inline int cluster_rank() { return here->rank; }
inline void cluster_meets() { here->cluster->together.arrive_and_wait(); }
struct Near {
    float* at;
    void store(int known, int more, float value) const { at[known + more] = value; }
};
struct Far {
    float* at;
    Far(float* p, int rank) : at((float*)(here->cluster->blocks[rank]->shared + place_of(p))) {}
    void store(int known, int more, float value) const { at[known + more] = value; }
};

struct Product { float* c; const u32* a; u64 b; bool more; int n; };
inline thread_local std::vector<std::vector<Product>> running;
inline thread_local std::vector<Product> begun;
inline void products_begin() {}
inline void products_end() { running.push_back(std::move(begun)); begun.clear(); }
inline void settled(float&) {}
inline void make(const Product& p) {
    int warp = thread_number() / 32, lane = thread_number() % 32;
    std::barrier<>& four = *here->fours[warp / 4];
    memcpy(here->a[warp][lane], p.a, 16);
    four.arrive_and_wait();
    u64 start = (p.b & 0x3FFF) << 4, eights = (p.b >> 32 & 0x3FFF) << 4;
    if (p.b >> 62 != 1) abort();
    float right[16];
    for (int n8 = 0; n8 < p.n / 8; ++n8)
        for (int e = 0; e < 2; ++e) {
            for (int k = 0; k < 16; ++k) {
                u64 at = start + n8 * eights + (lane % 4 * 2 + e) * 128 + k * 2;
                at ^= (at >> 7 & 7) << 4;
                u16 h;
                memcpy(&h, here->shared + at, 2);
                right[k] = float_of_half(h);
            }
            for (int i = 0; i < 2; ++i) {
                float sum = p.more ? p.c[n8 * 4 + 2 * i + e] : 0.0f;
                for (int k = 0; k < 16; ++k) {
                    u32 left = here->a[warp][lane / 4 * 4 + k % 8 / 2][i + 2 * (k / 8)];
                    sum += float_of_half((u16)(left >> (k % 2 * 16))) * right[k];
                }
                p.c[n8 * 4 + 2 * i + e] = sum;
            }
        }
    four.arrive_and_wait();
}
template <int LEFT>
void products_wait() {
    while (running.size() > LEFT) {
        for (const Product& p : running.front()) make(p);
        running.erase(running.begin());
    }
}
template <int N>
void multiply_async(float* c, const u32* a, u64 b, int more) { begun.push_back({c, a, b, more != 0, N}); }
