#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "numbers.h"
#include "pool.h"

namespace fewbit {
namespace {

// Floats a task should at least touch: below, a second thread costs more than it brings.
constexpr int64_t kTaskFloats = 1 << 14;
// The same in multiply-adds of attention.
constexpr int64_t kAttendAlone = 1 << 16;
// New tokens that pass over a chunk of cached rows together, and floats of chunks' results that are kept before they are
// merged: what attention needs beside the cache does not grow with the new tokens.
constexpr int64_t kSpanTokens = 16, kRoundFloats = 1 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(token) for all tokens, in tasks that are worth a thread.
template <class F>
void for_tokens(int64_t tokens, int64_t floats_per_token, F &&body) {
    const int64_t step = std::max<int64_t>(1, kTaskFloats / std::max<int64_t>(1, floats_per_token));
    parallel_for(std::max<int64_t>(1, ceil_div(tokens, step)), [&](int64_t task) {
        for (int64_t t = task * step; t < std::min(tokens, (task + 1) * step); ++t) body(t);
    });
}

// Magnitudes beyond it are held there, in f16 and int8 alike: an infinity would make all scores NaN.
constexpr float kLargestCached = 65504.0f;
// Added and taken off again, it rounds to whole numbers, ties to even.
constexpr float kToWhole = 12582912.0f;

// The largest magnitude of n numbers; of one that is NaN, NaN.
float largest_magnitude(const float *x, int64_t n) {
    int32_t largest = 0;
    // as integers, magnitudes have the order of the floats, and NaN lies beyond infinity
    for (int64_t i = 0; i < n; ++i) {
        const int32_t bits = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffffu);
        largest = bits > largest ? bits : largest;
    }
    return from_bits(static_cast<uint32_t>(largest));
}

void store_bytes(uint8_t *to, const float *from, int64_t n) {
    const float largest = largest_magnitude(from, n);
    const uint16_t scale = float_to_bf16((largest > kLargestCached ? kLargestCached : largest) / 127.0f);
    std::memcpy(to + n, &scale, sizeof scale);
    const float step = bf16_to_float(scale);
    // NaN is in the scale, so the codes of such a head do not matter
    if (!(step > 0.0f)) {
        std::memset(to, 0, static_cast<size_t>(n));
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        float code = from[i] / step;
        code = code > 127.0f ? 127.0f : code;
        code = code < -127.0f ? -127.0f : code;
        to[i] = static_cast<uint8_t>(static_cast<int32_t>((code + kToWhole) - kToWhole));
    }
}

// A group of n numbers, their scale and least number to numbers[0] and [1]; codes [n], a byte each.
void store_group(uint8_t *codes, uint16_t *numbers, const float *from, int64_t n) {
    float held[kCachedGroup], least = 0.0f, most = 0.0f;
    bool broken = false;
    for (int64_t i = 0; i < n; ++i) {
        const float x = from[i] > kLargestCached ? kLargestCached : from[i] < -kLargestCached ? -kLargestCached : from[i];
        broken |= (to_bits(x) & 0x7fffffffu) > 0x7f800000u;
        least = i == 0 || x < least ? x : least;
        most = i == 0 || x > most ? x : most;
        held[i] = x;
    }
    numbers[0] = broken ? 0x7e00 : float_to_f16((most - least) / 15.0f);
    // of two zeros the positive one
    numbers[1] = broken ? 0x7e00 : float_to_f16(least + 0.0f);
    const float step = f16_to_float(numbers[0]), start = f16_to_float(numbers[1]);
    // of a group that is one number everywhere, or broken, codes do not matter
    const bool has_step = step > 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        float code = has_step ? (held[i] - start) / step : 0.0f;
        code = code > 15.0f ? 15.0f : code;
        code = code < 0.0f ? 0.0f : code;
        codes[i] = static_cast<uint8_t>(static_cast<int32_t>((code + kToWhole) - kToWhole));
    }
}

void store_nibbles(uint8_t *to, const float *from, int64_t n) {
    uint8_t codes[kCachedGroup + 1];
    for (int64_t first = 0; first < n; first += kCachedGroup) {
        const int64_t count = std::min(kCachedGroup, n - first);
        uint16_t numbers[2];
        store_group(codes, numbers, from + first, count);
        for (int64_t i = 0; i < count; i += 2) to[(first + i) / 2] = static_cast<uint8_t>(codes[i] | codes[i + 1] << 4);
        std::memcpy(to + n / 2 + first / kCachedGroup * 4, numbers, sizeof numbers);
    }
}

bool turns_keys(CacheType type) { return type == CacheType::int8 || type == CacheType::int4; }
bool turns_values(CacheType type) { return type == CacheType::int4; }

// A head of n numbers to the cache.
void store(CacheType type, uint8_t *to, const float *from, int64_t n) {
    if (type == CacheType::int4) return store_nibbles(to, from, n);
    if (type == CacheType::int8) return store_bytes(to, from, n);
    if (type == CacheType::f32) {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    auto *halves = reinterpret_cast<uint16_t *>(to);
    for (int64_t i = 0; i < n; ++i) halves[i] = float_to_f16(from[i]);
}

void rotate(const float *x, const float *cos, const float *sin, float *y, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        y[i] = a * cos[i] - b * sin[i];
        y[half + i] = b * cos[i] + a * sin[i];
    }
}

// Numbers a and b that are H apart become a + b and a - b.
template <int H>
void butterflies(float *x, int64_t width) {
    for (int64_t i = 0; i < width; i += 2 * H) {
        float sums[H], differences[H];
        for (int j = 0; j < H; ++j) {
            sums[j] = x[i + j] + x[i + H + j];
            differences[j] = x[i + j] - x[i + H + j];
        }
        std::memcpy(x + i, sums, sizeof sums);
        std::memcpy(x + i + H, differences, sizeof differences);
    }
}

// Times a Hadamard matrix over its root, in blocks of the largest power of two in `width`, as `spread` in
// kernels/ops.py does and with its bits.
void spread(float *x, int64_t width) {
    const int64_t block = width & -width;
    if (block > 1) butterflies<1>(x, width);
    if (block > 2) butterflies<2>(x, width);
    if (block > 4) butterflies<4>(x, width);
    if (block > 8) butterflies<8>(x, width);
    if (block > 16) butterflies<16>(x, width);
    if (block > 32) butterflies<32>(x, width);
    if (block > 64) butterflies<64>(x, width);
    for (int64_t h = 128; h < block; h *= 2) {
        for (int64_t i = 0; i < width; ++i) {
            if (i & h) continue;
            const float a = x[i], b = x[i + h];
            x[i] = a + b;
            x[i + h] = a - b;
        }
    }
    const float root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
    for (int64_t i = 0; i < width; ++i) x[i] *= root;
}

void append_token(const float *k, const float *v, const float *cos, const float *sin, const Cache &cache, int64_t slot,
                  int64_t width, float *scratch) {
    const int64_t bytes = head_bytes(cache.type, width);
    for (int64_t h = 0; h < cache.heads; ++h) {
        const int64_t at = (slot * cache.heads + h) * bytes;
        rotate(k + h * width, cos, sin, scratch, width);
        if (turns_keys(cache.type)) spread(scratch, width);
        store(cache.type, cache.keys + at, scratch, width);
        std::copy(v + h * width, v + (h + 1) * width, scratch);
        if (turns_values(cache.type)) spread(scratch, width);
        store(cache.type, cache.values + at, scratch, width);
    }
}

// New tokens of one sequence that are attended together, in its place among all of them.
struct Span {
    int64_t sequence, first, fresh;
    int64_t length;     // cached rows that the last of them sees
    int64_t first_sum;  // where its results begin, in floats: [heads of the cache][chunks][fresh * group][width + 2]
};

// One key-value head of a span over one chunk of its rows.
struct Work {
    int64_t span, head, begin;
};

// Joins the chunks' results of one query head: each is weighed by e^(its largest score - the largest of all).
void merge(const float *sums, int64_t chunks, int64_t chunk_stride, int64_t width, float *y) {
    float largest = -INFINITY;
    for (int64_t c = 0; c < chunks; ++c) {
        const float *part = sums + c * chunk_stride;
        if (part[width] != 0.0f) largest = std::max(largest, part[width + 1]);
    }
    float total = 0.0f;
    std::fill(y, y + width, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
        const float *part = sums + c * chunk_stride;
        if (part[width] == 0.0f) continue;
        const float weight = std::exp(part[width + 1] - largest);
        total += weight * part[width];
        for (int64_t d = 0; d < width; ++d) y[d] += weight * part[d];
    }
    for (int64_t d = 0; d < width; ++d) y[d] /= total;
}

}  // namespace

void rms_norm_rows(const float *x, const float *weight, float *y, int64_t tokens, int64_t n, float eps) {
    const KernelTable &k = kernels();
    for_tokens(tokens, n, [&](int64_t t) { k.rms_norm(x + t * n, weight, y + t * n, n, eps); });
}

void gated_rows(Activation activation, const float *gate_up, float *y, int64_t tokens, int64_t n) {
    const KernelTable &k = kernels();
    for_tokens(tokens, 3 * n, [&](int64_t t) {
        const float *gate = gate_up + t * 2 * n;
        k.gated(activation, gate, gate + n, y + t * n, n);
    });
}

bool are_slots(const int64_t *slots, int64_t tokens, int64_t cache_rows) {
    return std::all_of(slots, slots + tokens, [&](int64_t slot) { return slot >= 0 && slot < cache_rows; });
}

bool rotate_append(const Heads &q, const Heads &k, const Heads &v, const float *cos, const float *sin,
                   const int64_t *slots, const Cache &cache, int64_t tokens, int64_t width, float *q_out) {
    if (!are_slots(slots, tokens, cache.rows)) return false;
    for_tokens(tokens, (q.heads + 2 * k.heads) * width, [&](int64_t t) {
        const float *c = cos + t * (width / 2), *s = sin + t * (width / 2);
        for (int64_t h = 0; h < q.heads; ++h) {
            float *head = q_out + (t * q.heads + h) * width;
            rotate(q.data + t * q.stride + h * width, c, s, head, width);
            if (turns_keys(cache.type)) spread(head, width);
        }
        thread_local std::vector<float> scratch;
        if (static_cast<int64_t>(scratch.size()) < width) scratch.resize(static_cast<size_t>(width));
        append_token(k.data + t * k.stride, v.data + t * v.stride, c, s, cache, slots[t], width, scratch.data());
    });
    return true;
}

bool are_places(const Sequences &s, int64_t tokens, int64_t cache_rows) {
    if (s.starts[0] != 0 || s.starts[s.count] != tokens) return false;
    for (int64_t i = 0; i < s.count; ++i) {
        const int64_t fresh = s.starts[i + 1] - s.starts[i], length = s.lengths[i];
        if (fresh < 0 || length < fresh || length > s.pages_per_sequence * s.page_size) return false;
        for (int64_t p = 0; p < ceil_div(length, s.page_size); ++p) {
            const int64_t page = s.pages[i * s.pages_per_sequence + p];
            const int64_t used = std::min(s.page_size, length - p * s.page_size);
            if (page < 0 || used > cache_rows) return false;
            if (page > (cache_rows - used) / s.page_size) return false;
        }
    }
    return true;
}

namespace {

// Attention of a step, a round of spans at a time.
class Attention {
  public:
    Attention(const float *q, const Cache &cache, const Sequences &sequences, int64_t heads, int64_t width,
              const Scores &scores, float *y)
        : q_(q), cache_(cache), s_(sequences), heads_(heads), group_(heads / cache.heads), width_(width),
          entry_(width + 2), scores_(scores), y_(y) {}

    void run() {
        for (int64_t i = 0; i < s_.count; ++i) {
            const int64_t first = s_.starts[i], fresh = s_.starts[i + 1] - first;
            for (int64_t begin = 0; begin < fresh; begin += kSpanTokens) {
                const int64_t count = std::min(kSpanTokens, fresh - begin);
                add({i, first + begin, count, s_.lengths[i] - fresh + begin + count, floats_});
            }
        }
        end_round();
    }

  private:
    int64_t rows(const Span &span) const { return span.fresh * group_; }
    // The first row that a token of the span sees, down to a chunk's border.
    int64_t first_row(const Span &span) const {
        const int64_t past = span.length - span.fresh + 1 - scores_.window;
        return scores_.window > 0 && past > 0 ? past / kChunk * kChunk : 0;
    }
    int64_t chunks(const Span &span) const { return ceil_div(span.length - first_row(span), kChunk); }

    void add(Span span) {
        const int64_t floats = cache_.heads * chunks(span) * rows(span) * entry_;
        if (floats_ > 0 && floats_ + floats > kRoundFloats) end_round();
        span.first_sum = floats_;
        floats_ += floats;
        multiplied_ += 2 * span.fresh * (span.length - first_row(span)) * heads_ * width_;
        spans_.push_back(span);
    }

    void end_round() {
        thread_local std::vector<float> sums_scratch;
        thread_local std::vector<Work> work_scratch;
        if (static_cast<int64_t>(sums_scratch.size()) < floats_) sums_scratch.resize(static_cast<size_t>(floats_));
        sums_ = sums_scratch.data();
        std::vector<Work> &work = work_scratch;
        work.clear();
        const auto spans = static_cast<int64_t>(spans_.size());
        // the chunks do not depend on the number of threads, so neither does the result
        for (int64_t i = 0; i < spans; ++i) {
            for (int64_t h = 0; h < cache_.heads; ++h) {
                const Span &span = spans_[static_cast<size_t>(i)];
                for (int64_t b = first_row(span); b < span.length; b += kChunk) work.push_back({i, h, b});
            }
        }
        const auto works = static_cast<int64_t>(work.size());
        if (multiplied_ < kAttendAlone) {
            for (const Work &w : work) attend(w);
            for (int64_t i = 0; i < spans; ++i) merge_span(spans_[i]);
        } else {
            parallel_for(works, [&](int64_t i) { attend(work[static_cast<size_t>(i)]); });
            parallel_for(spans, [&](int64_t i) { merge_span(spans_[static_cast<size_t>(i)]); });
        }
        spans_.clear();
        floats_ = multiplied_ = 0;
    }

    float *sums(const Span &span, int64_t head, int64_t chunk) const {
        return sums_ + span.first_sum + (head * chunks(span) + chunk) * rows(span) * entry_;
    }

    void attend(const Work &w) const {
        const Span &span = spans_[static_cast<size_t>(w.span)];
        thread_local std::vector<float> scores, copies;
        grow(scores, rows(span) * kChunk);
        grow(copies, 2 * kChunk * width_);
        const int64_t bytes = head_bytes(cache_.type, width_);
        AttendTask task{};
        task.q = q_ + (span.first * heads_ + w.head * group_) * width_;
        task.q_stride = heads_ * width_;
        task.k_cache = cache_.keys + w.head * bytes;
        task.v_cache = cache_.values + w.head * bytes;
        task.type = cache_.type;
        task.row_bytes = cache_.heads * bytes;
        task.pages = s_.pages + span.sequence * s_.pages_per_sequence;
        task.page_size = s_.page_size;
        task.begin = w.begin;
        task.end = std::min(span.length, w.begin + kChunk);
        task.length = span.length;
        task.fresh = static_cast<int>(span.fresh);
        task.group = static_cast<int>(group_);
        task.width = static_cast<int>(width_);
        task.scale = scores_.scale;
        task.window = scores_.window;
        task.soft_cap = scores_.soft_cap;
        task.scores = scores.data();
        task.copies = copies.data();
        task.sums = sums(span, w.head, (w.begin - first_row(span)) / kChunk);
        kernels_.attend(task);
    }

    void merge_span(const Span &span) const {
        for (int64_t head = 0; head < cache_.heads; ++head) {
            for (int64_t row = 0; row < rows(span); ++row) {
                const int64_t token = span.first + row / group_;
                float *y = y_ + (token * heads_ + head * group_ + row % group_) * width_;
                merge(sums(span, head, 0) + row * entry_, chunks(span), rows(span) * entry_, width_, y);
                if (turns_values(cache_.type)) spread(y, width_);
            }
        }
    }

    static void grow(std::vector<float> &v, int64_t count) {
        if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
    }

    const KernelTable &kernels_ = kernels();
    const float *q_;
    const Cache &cache_;
    const Sequences &s_;
    int64_t heads_, group_, width_, entry_;
    Scores scores_;
    float *y_;
    float *sums_ = nullptr;
    int64_t floats_ = 0, multiplied_ = 0;
    std::vector<Span> spans_;
};

}  // namespace

bool attend_paged(const float *q, const Cache &cache, const Sequences &s, int64_t tokens, int64_t heads, int64_t width,
                  const Scores &scores, float *y) {
    if (!are_places(s, tokens, cache.rows)) return false;
    Attention(q, cache, s, heads, width, scores, y).run();
    return true;
}

}  // namespace fewbit
