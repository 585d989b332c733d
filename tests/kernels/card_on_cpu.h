// Stands in for pieces.cuh and units.cuh under product.cu, many.cu and pack.cu.
#pragma once
#include "threads_on_cpu.h"
#include <memory>

#define __shared__
#define __align__(n)

struct Words { u32 x, y, z, w; };

// a block's shared memory
alignas(16) inline char poisoned[1 << 20];

inline u32 add_halves(u32 a, u32 b) {
    u32 low = half_of(float_of_half((u16)a) + float_of_half((u16)b));
    return low | (u32)half_of(float_of_half((u16)(a >> 16)) + float_of_half((u16)(b >> 16))) << 16;
}
inline float4 from_others(const float4* p) { return *p; }

// Copies land when they are waited for, not before.
struct Copy { char* to; const char* from; };
inline thread_local std::vector<std::vector<Copy>> groups;
inline thread_local std::vector<Copy> open_group;
// where copies may read, and whether one read elsewhere
struct Range { const char* from; u64 size; };
inline std::vector<Range> readable;
inline bool strayed;
inline void check(const char* from) {
    for (const Range& r : readable)
        if (from >= r.from && from + 16 <= r.from + r.size) return;
    strayed = true;
}
inline void copy(char* to, const char* from) { check(from); open_group.push_back({to, from}); }
struct CopyLater { void operator()(char* to, const char* from) const { copy(to, from); } };
struct CopyNow { void operator()(char* to, const char* from) const { check(from); memcpy(to, from, 16); } };
inline void copies_end() { groups.push_back(std::move(open_group)); open_group.clear(); }
template <int LEFT>
void wait_for_copies() {
    while (groups.size() > LEFT) {
        for (const Copy& c : groups.front()) memcpy(c.to, c.from, 16);
        groups.erase(groups.begin());
    }
}

inline Words shared_by_all(const void* p) { Words v; memcpy(&v, p, 16); return v; }
