// Whole decoder layers in one call: what lies between the products is then as cheap as it can be. Made of the functions of ops.h and product.h, in the order and with the results of Ops.layer in kernels/ops.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "pack.h"

namespace fewbit {

// What other decoders than Llama have; null and 0: not this one.
struct Extras {
    const float *attention_after = nullptr, *mlp_after = nullptr;  // [d], norms of what a branch gives
    const float *q_norm = nullptr, *k_norm = nullptr;              // [width] of each head; `norms_whole`: of all together
    bool norms_whole = false;
    const float *qkv_bias = nullptr, *o_bias = nullptr, *gate_up_bias = nullptr, *down_bias = nullptr;
    float scale = 0.0f;    // of scores; 0: 1 / sqrt(width)
    float soft_cap = 0.0f;
    int64_t window = 0;
    int64_t rotation = 0;  // which of a step's rotations
    Activation activation = Activation::silu;
};

// Addresses of a layer's parts; whoever adds a layer keeps them alive. With d columns of the hidden state, H heads over
// KV key-value heads of `width`: qkv [(H + 2 KV) * width, d], o [d, H * width], gate_up [2 n, d], down [d, n].
struct Layer {
    const float *attention_norm;  // [d], or null
    const float *mlp_norm;        // [d], or null
    float eps;
    const Matrix *qkv, *o, *gate_up, *down;
    int64_t heads, kv_heads, width;
    Cache cache;
    Extras extras{};
};

// Where the tokens of a step stand and go; the same for all layers.
struct Step {
    int64_t tokens;
    const float *cos, *sin;  // [rotations][tokens][width / 2]
    const int64_t *slots;    // [tokens], cache rows
    Sequences sequences;
};

// Layers that run one after the other, each with its part of the cache.
class Stack {
  public:
    void add(const Layer &layer) { layers_.push_back(layer); }

    // What layer `index` has besides.
    void set_extras(size_t index, const Extras &extras) { layers_.at(index).extras = extras; }

    // Memory of layer `index` for keys and for values, [rows][kv_heads][head_bytes] each.
    void set_cache(size_t index, uint8_t *keys, uint8_t *values, CacheType type, int64_t rows);

    // x [tokens][d] through the layers [first, last) to y [tokens][d]. False, with nothing written to y or to a cache,
    // where there are no such layers, or a slot, a page or a length leaves a cache.
    bool run(size_t first, size_t last, const float *x, const Step &step, float *y) const;

  private:
    std::vector<Layer> layers_;
};

}  // namespace fewbit
