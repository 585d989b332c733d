// What the native tests share: a seeded generator, conversions of their own, and an end with the shape at fault.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace test {

[[noreturn]] inline void fail(const std::string &what) {
    std::fprintf(stderr, "FAILED  %s\n", what.c_str());
    std::fflush(stderr);
    std::_Exit(1);
}

template <class... Args>
std::string say(const char *format, Args... args) {
    char text[512];
    std::snprintf(text, sizeof text, format, args...);
    return text;
}

// Seeded, and the same numbers with every standard library: of <random> only the engine is defined so far.
class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    int64_t whole(int64_t first, int64_t last) {
        return first + static_cast<int64_t>(engine_() % static_cast<uint64_t>(last - first + 1));
    }
    template <class T>
    T one_of(const std::vector<T> &v) {
        return v[static_cast<size_t>(whole(0, static_cast<int64_t>(v.size()) - 1))];
    }
    float uniform(float from, float to) {
        return from + (to - from) * static_cast<float>(engine_() >> 40) * 0x1p-24f;
    }
    // bell-shaped, and of a magnitude that varies
    float value() {
        const float bell = uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1);
        return whole(0, 30) == 0 ? 30.0f * bell : bell;
    }
    std::vector<float> values(int64_t count) {
        std::vector<float> v(static_cast<size_t>(count));
        for (float &x : v) x = value();
        return v;
    }

  private:
    std::mt19937_64 engine_;
};

inline const float kNan = std::numeric_limits<float>::quiet_NaN();

// By the definition of binary16 and not by moving bits.
inline float half_value(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31 && fraction != 0) return kNan;
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

inline float bfloat_value(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline bool same_bits(const float *a, const float *b, int64_t count) {
    return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

// Each returns what it covered, in words. They run on the instruction set in use, and on each `every`th random shape.
std::string test_products(int every);
std::string test_ggml_products(int every);
std::string test_extremes(int every);
std::string test_long_rows(int every);
std::string test_ops(int every);
std::string test_attention(int every);
std::string test_layers(int every);
std::string test_mapped(int every);
std::string test_checksum(int every);
std::string test_threads(int every);
std::string test_switches(int every);
std::string test_fork(int every);

}  // namespace test
