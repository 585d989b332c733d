#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"
#include "product.h"

namespace fewbit {
namespace {

// Activations inside a layer, kept by the calling thread from step to step, but for those of more tokens than this.
constexpr int64_t kKeptTokens = 512;
struct Scratch {
    std::vector<float> normed, wide, queries, narrow;
};

float *room(std::vector<float> &v, int64_t count) {
    if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
    return v.data();
}

void add_to(float *y, const float *x, int64_t count) {
    constexpr int64_t kPiece = 1 << 15;
    parallel_for((count + kPiece - 1) / kPiece, [&](int64_t piece) {
        const int64_t end = std::min(count, (piece + 1) * kPiece);
        for (int64_t i = piece * kPiece; i < end; ++i) y[i] += x[i];
    });
}

// y += o(attention(qkv(norm(y))))
void attention(const Layer &l, const Step &step, Scratch &scratch, float *y) {
    const int64_t d = l.qkv->column_count(), stride = l.qkv->row_count(), tokens = step.tokens;
    const int64_t inner = l.heads * l.width;
    float *normed = room(scratch.normed, tokens * d);
    rms_norm_rows(y, l.attention_norm, normed, tokens, d, l.eps);
    float *qkv = room(scratch.wide, tokens * stride);
    multiply(*l.qkv, normed, tokens, qkv);

    const Heads q{qkv, stride, l.heads};
    const Heads k{qkv + inner, stride, l.kv_heads};
    const Heads v{k.data + l.kv_heads * l.width, stride, l.kv_heads};
    float *queries = room(scratch.queries, tokens * inner);
    rotate_append(q, k, v, step.cos, step.sin, step.slots, l.cache, tokens, l.width, queries);
    float *attended = room(scratch.narrow, tokens * inner);
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(l.width)));
    attend_paged(queries, l.cache, step.sequences, tokens, l.heads, l.width, scale, attended);

    float *out = room(scratch.normed, tokens * d);
    multiply(*l.o, attended, tokens, out);
    add_to(y, out, tokens * d);
}

// y += down(silu(gate(norm(y))) * up(norm(y)))
void feed_forward(const Layer &l, int64_t tokens, Scratch &scratch, float *y) {
    const int64_t d = l.gate_up->column_count(), inner = l.down->column_count();
    float *normed = room(scratch.normed, tokens * d);
    rms_norm_rows(y, l.mlp_norm, normed, tokens, d, l.eps);
    float *gate_up = room(scratch.wide, tokens * 2 * inner);
    multiply(*l.gate_up, normed, tokens, gate_up);
    float *gated = room(scratch.narrow, tokens * inner);
    gated_silu_rows(gate_up, gated, tokens, inner);
    float *out = room(scratch.normed, tokens * d);
    multiply(*l.down, gated, tokens, out);
    add_to(y, out, tokens * d);
}

}  // namespace

void Stack::set_cache(size_t index, uint8_t *keys, uint8_t *values, CacheType type, int64_t rows) {
    Layer &l = layers_.at(index);
    l.cache = {keys, values, type, rows, l.kv_heads};
}

bool Stack::run(size_t first, size_t last, const float *x, const Step &step, float *y) const {
    if (first >= last || last > layers_.size()) return false;
    // all layers are looked at before the first one writes
    for (size_t i = first; i < last; ++i) {
        const Cache &cache = layers_[i].cache;
        if (!are_places(step.sequences, step.tokens, cache.rows)) return false;
        if (!are_slots(step.slots, step.tokens, cache.rows)) return false;
    }
    thread_local Scratch scratch;
    const int64_t d = layers_.front().qkv->column_count();
    std::memcpy(y, x, static_cast<size_t>(step.tokens * d) * sizeof(float));
    for (size_t i = first; i < last; ++i) {
        attention(layers_[i], step, scratch, y);
        feed_forward(layers_[i], step.tokens, scratch, y);
    }
    if (step.tokens > kKeptTokens) scratch = {};
    return true;
}

}  // namespace fewbit
