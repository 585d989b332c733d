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

// y [rows][n] += bias [n]
void add_bias(float *y, const float *bias, int64_t rows, int64_t n) {
    if (!bias) return;
    parallel_for((rows + 63) / 64, [&](int64_t piece) {
        for (int64_t r = piece * 64; r < std::min(rows, (piece + 1) * 64); ++r) {
            for (int64_t i = 0; i < n; ++i) y[r * n + i] += bias[i];
        }
    });
}

// The norm of x [tokens][d], in `room`; x itself where there is no norm.
const float *normed(const float *x, const float *weight, float *room, int64_t tokens, int64_t d, float eps) {
    if (!weight) return x;
    rms_norm_rows(x, weight, room, tokens, d, eps);
    return room;
}

// The norm of heads that lie `stride` apart for each token, to `to` [tokens][heads][width]: of each, or of all together.
Heads norm_heads(const Heads &h, const float *weight, bool whole, int64_t tokens, int64_t width, float eps, float *to) {
    if (!weight) return h;
    const int64_t row = h.heads * width;
    for (int64_t t = 0; t < tokens; ++t) std::memcpy(to + t * row, h.data + t * h.stride, sizeof(float) * static_cast<size_t>(row));
    if (whole) {
        rms_norm_rows(to, weight, to, tokens, row, eps);
    } else {
        rms_norm_rows(to, weight, to, tokens * h.heads, width, eps);
    }
    return {to, row, h.heads};
}

// y += a branch's outputs [tokens][d], or their norm.
void add_branch(float *out, const float *bias, const float *after, int64_t tokens, int64_t d, float eps, float *y) {
    add_bias(out, bias, tokens, d);
    if (after) rms_norm_rows(out, after, out, tokens, d, eps);
    add_to(y, out, tokens * d);
}

// y += o(attention(qkv(norm(y))))
void attention(const Layer &l, const Step &step, Scratch &scratch, float *y) {
    const Extras &e = l.extras;
    const int64_t d = l.qkv->column_count(), stride = l.qkv->row_count(), tokens = step.tokens;
    const int64_t inner = l.heads * l.width;
    const float *x = normed(y, l.attention_norm, room(scratch.normed, tokens * d), tokens, d, l.eps);
    float *qkv = room(scratch.wide, tokens * stride);
    multiply(*l.qkv, x, tokens, qkv);
    add_bias(qkv, e.qkv_bias, tokens, stride);

    float *narrow = room(scratch.narrow, tokens * (inner + l.kv_heads * l.width));
    const Heads q = norm_heads({qkv, stride, l.heads}, e.q_norm, e.norms_whole, tokens, l.width, l.eps, narrow);
    const Heads k = norm_heads({qkv + inner, stride, l.kv_heads}, e.k_norm, e.norms_whole, tokens, l.width, l.eps,
                               narrow + tokens * inner);
    const Heads v{qkv + inner + l.kv_heads * l.width, stride, l.kv_heads};
    float *queries = room(scratch.queries, tokens * inner);
    const int64_t angles = e.rotation * tokens * (l.width / 2);
    rotate_append(q, k, v, step.cos + angles, step.sin + angles, step.slots, l.cache, tokens, l.width, queries);
    const float root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(l.width)));
    const Scores scores{e.scale > 0.0f ? e.scale : root, e.window, e.soft_cap};
    attend_paged(queries, l.cache, step.sequences, tokens, l.heads, l.width, scores, narrow);

    float *out = room(scratch.normed, tokens * d);
    multiply(*l.o, narrow, tokens, out);
    add_branch(out, e.o_bias, e.attention_after, tokens, d, l.eps, y);
}

// y += down(activation(gate(norm(y))) * up(norm(y)))
void feed_forward(const Layer &l, int64_t tokens, Scratch &scratch, float *y) {
    const Extras &e = l.extras;
    const int64_t d = l.gate_up->column_count(), inner = l.down->column_count();
    const float *x = normed(y, l.mlp_norm, room(scratch.normed, tokens * d), tokens, d, l.eps);
    float *gate_up = room(scratch.wide, tokens * 2 * inner);
    multiply(*l.gate_up, x, tokens, gate_up);
    add_bias(gate_up, e.gate_up_bias, tokens, 2 * inner);
    float *gated = room(scratch.narrow, tokens * inner);
    gated_rows(e.activation, gate_up, gated, tokens, inner);
    float *out = room(scratch.normed, tokens * d);
    multiply(*l.down, gated, tokens, out);
    add_branch(out, e.down_bias, e.mlp_after, tokens, d, l.eps, y);
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
