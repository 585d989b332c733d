// What only a card's own instructions do. A test replaces this file to run the kernels on a CPU.
#pragma once
#include "pieces.cuh"

struct Words { u32 x, y, z, w; };

// 16 bytes into shared memory, later. Weights are read once: they pass by L1, and L2 is asked for their neighbours.
__device__ __forceinline__ void copy(char* to, const char* from) {
    u32 place = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}
// The same for what lies in L2 and is read by many: alongside the copies above, or at once.
struct CopyLater {
    __device__ __forceinline__ void operator()(char* to, const char* from) const {
        u32 place = (u32)__cvta_generic_to_shared(to);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
    }
};
struct CopyNow {
    __device__ __forceinline__ void operator()(char* to, const char* from) const {
        uint4 v;
        asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
        *(uint4*)to = v;
    }
};
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Not to be read before wait_for_inputs, which is why the compiler may not move it.
__device__ __forceinline__ Words shared_by_all(const void* p) {
    Words v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// What other blocks of the same launch wrote.
__device__ __forceinline__ float4 from_others(const float4* p) { return __ldcg(p); }

// Two halves each; subnormal ones as well.
__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// c += a b; a 16 x 16, b 16 x 8
__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
