// The Python face of the kernels. Tensors come as addresses: converting one through DLPack takes longer than the
// product of a small layer. kernels/cpu.py and _cpu_ops.py check shapes, types and contiguity before they call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "ceilings.h"
#include "checksum.h"
#include "dispatch.h"
#include "layer.h"
#include "ops.h"
#include "pack.h"
#include "pool.h"
#include "product.h"

namespace nb = nanobind;
using namespace nb::literals;
using fewbit::Matrix;
using Address = uintptr_t;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

namespace {

template <class T>
T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

fewbit::CacheType cache_type(int type) {
    if (type < 0 || type > 3) throw std::invalid_argument("no such type of cache");
    return static_cast<fewbit::CacheType>(type);
}

fewbit::Activation activation_of(int activation) {
    if (activation < 0 || activation > 1) throw std::invalid_argument("no such activation");
    return static_cast<fewbit::Activation>(activation);
}

fewbit::Cache cache_at(Address keys, Address values, int type, int64_t rows, int64_t heads) {
    return {at<uint8_t>(keys), at<uint8_t>(values), cache_type(type), rows, heads};
}

// A buffer of bytes (a mapping of a file, say) that stays as it is while it is held.
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ReadOnlyBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Where [offset, offset + count) of a buffer begins.
template <class Buffer>
auto *range(const Buffer &buffer, int64_t offset, int64_t count) {
    const auto size = static_cast<int64_t>(buffer.size());
    if (offset < 0 || count < 0 || offset > size || count > size - offset) {
        throw std::invalid_argument("the range leaves the buffer");
    }
    return buffer.data() + offset;
}

template <class Buffer>
void place(Matrix &self, Buffer buffer, int64_t offset, int64_t count, bool writable) {
    auto *memory = const_cast<uint8_t *>(range(buffer, offset, count));
    self.place(memory, static_cast<size_t>(count), writable, std::make_shared<Buffer>(std::move(buffer)));
}

void bind_layouts(nb::module_ &m, nb::class_<Matrix> &matrix) {
    matrix.def("allocate", &Matrix::allocate, Unlocked())
        .def(
            "place_new",
            [](Matrix &self, Bytes buffer, int64_t offset, int64_t count) {
                place(self, std::move(buffer), offset, count, true);
            },
            "buffer"_a, "offset"_a, "count"_a)
        .def(
            "place",
            [](Matrix &self, ReadOnlyBytes buffer, int64_t offset, int64_t count) {
                place(self, std::move(buffer), offset, count, false);
            },
            "buffer"_a, "offset"_a, "count"_a)
        .def("blocks", [](const Matrix &self) {
            std::vector<std::tuple<int64_t, int64_t, int, int, int32_t, int, int64_t, int, std::vector<int>>> found;
            for (const fewbit::Block &b : self.blocks()) {
                const fewbit::BlockView &v = b.view;
                std::vector<int> levels;
                for (int i = 0; v.tabled && i < 1 << v.packed_bits; ++i) levels.push_back(v.table[i] - v.zero);
                found.emplace_back(v.rows, b.span, v.packed_bits, static_cast<int>(v.scale_type), v.tabled ? 0 : v.zero,
                                   static_cast<int>(v.offset_type), b.super_span, static_cast<int>(v.super_type), levels);
            }
            return found;
        });
    m.attr("layout") = fewbit::kLayout;
    m.def(
        "checksum",
        [](const ReadOnlyBytes &buffer, int64_t offset, int64_t count) {
            const uint8_t *from = range(buffer, offset, count);
            nb::gil_scoped_release unlocked;
            return fewbit::checksum(from, static_cast<size_t>(count));
        },
        "buffer"_a, "offset"_a, "count"_a);
}

void bind_ops(nb::module_ &m) {
    m.def(
        "rms_norm",
        [](Address x, Address weight, Address y, int64_t tokens, int64_t n, float eps) {
            fewbit::rms_norm_rows(at<const float>(x), at<const float>(weight), at<float>(y), tokens, n, eps);
        },
        Unlocked());
    m.def(
        "gated",
        [](int activation, Address gate_up, Address y, int64_t tokens, int64_t n) {
            fewbit::gated_rows(activation_of(activation), at<const float>(gate_up), at<float>(y), tokens, n);
        },
        Unlocked());
    m.def(
        "rotate_append",
        [](Address q, int64_t q_stride, int64_t heads, Address k, int64_t k_stride, Address v, int64_t v_stride,
           int64_t kv_heads, Address cos, Address sin, Address slots, Address keys, Address values, int type,
           int64_t cache_rows, int64_t tokens, int64_t width, Address out) {
            const fewbit::Cache cache = cache_at(keys, values, type, cache_rows, kv_heads);
            const fewbit::Heads queries{at<const float>(q), q_stride, heads};
            const fewbit::Heads new_keys{at<const float>(k), k_stride, kv_heads};
            const fewbit::Heads new_values{at<const float>(v), v_stride, kv_heads};
            return fewbit::rotate_append(queries, new_keys, new_values, at<const float>(cos), at<const float>(sin),
                                         at<const int64_t>(slots), cache, tokens, width, at<float>(out));
        },
        Unlocked());
    m.def(
        "attend",
        [](Address q, Address keys, Address values, int type, int64_t cache_rows, int64_t kv_heads, Address pages,
           int64_t pages_per_sequence, int64_t page_size, Address lengths, Address starts, int64_t sequences,
           int64_t tokens, int64_t heads, int64_t width, float scale, int64_t window, float soft_cap, Address out) {
            const fewbit::Cache cache = cache_at(keys, values, type, cache_rows, kv_heads);
            const fewbit::Sequences s{at<const int64_t>(pages), at<const int64_t>(lengths), at<const int64_t>(starts),
                                      sequences, pages_per_sequence, page_size};
            const fewbit::Scores scores{scale, window, soft_cap};
            return fewbit::attend_paged(at<const float>(q), cache, s, tokens, heads, width, scores, at<float>(out));
        },
        Unlocked());
}

void bind_ceilings(nb::module_ &m) {
    m.def(
        "read_all",
        [](Address data, int64_t bytes) { return fewbit::read_all(at<const uint8_t>(data), bytes); }, Unlocked());
    m.def(
        "dot_all",
        [](int64_t rounds, Address w, Address x) {
            uint32_t total = 0;
            const int64_t done = fewbit::dot_all(rounds, at<const uint8_t>(w), at<const int8_t>(x), &total);
            return std::pair<int64_t, uint32_t>{done, total};
        },
        Unlocked());
}

void bind_layers(nb::module_ &m) {
    using fewbit::Stack;
    nb::class_<Stack>(m, "Stack")
        .def(nb::init<>())
        .def(
            "add",
            [](Stack &self, Address attention_norm, Address mlp_norm, float eps, const Matrix *qkv, const Matrix *o,
               const Matrix *gate_up, const Matrix *down, int64_t heads, int64_t kv_heads, int64_t width) {
                for (const Matrix *m : {qkv, o, gate_up, down}) m->expect_memory();
                self.add({at<const float>(attention_norm), at<const float>(mlp_norm), eps, qkv, o, gate_up, down,
                          heads, kv_heads, width, {}, {}});
            },
            nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>())
        .def("set_extras",
             [](Stack &self, size_t index, Address attention_after, Address mlp_after, Address q_norm, Address k_norm,
                bool norms_whole, Address qkv_bias, Address o_bias, Address gate_up_bias, Address down_bias, float scale,
                float soft_cap, int64_t window, int64_t rotation, int activation) {
                 self.set_extras(index, {at<const float>(attention_after), at<const float>(mlp_after),
                                         at<const float>(q_norm), at<const float>(k_norm), norms_whole,
                                         at<const float>(qkv_bias), at<const float>(o_bias),
                                         at<const float>(gate_up_bias), at<const float>(down_bias), scale, soft_cap,
                                         window, rotation, activation_of(activation)});
             })
        .def("set_cache",
             [](Stack &self, size_t index, Address keys, Address values, int type, int64_t rows) {
                 self.set_cache(index, at<uint8_t>(keys), at<uint8_t>(values), cache_type(type), rows);
             })
        .def(
            "run",
            [](const Stack &self, size_t first, size_t last, Address x, int64_t tokens, Address cos, Address sin, Address slots, Address pages,
               int64_t pages_per_sequence, int64_t page_size, Address lengths, Address starts, int64_t sequences,
               Address y) {
                const fewbit::Step step{
                    tokens,
                    at<const float>(cos),
                    at<const float>(sin),
                    at<const int64_t>(slots),
                    {at<const int64_t>(pages), at<const int64_t>(lengths), at<const int64_t>(starts), sequences,
                     pages_per_sequence, page_size}};
                return self.run(first, last, at<const float>(x), step, at<float>(y));
            },
            Unlocked());
}

}  // namespace

NB_MODULE(_cpu, m) {
    nb::class_<Matrix> matrix(m, "Matrix");
    matrix.def(nb::init<int64_t>(), "columns"_a)
        .def("add_block", &Matrix::add_block, "rows"_a, "span"_a, "code_bits"_a, "scale_type"_a, "zero"_a, "offset_type"_a,
             "super_span"_a, "super_type"_a, "levels"_a)
        .def(
            "fill",
            [](Matrix &self, int64_t block, int64_t first, int64_t count, Address codes, Address scales, Address offsets,
               Address scale_supers, Address offset_supers) {
                self.fill(block, first, count, at<const uint8_t>(codes), at<const void>(scales), at<const void>(offsets),
                          at<const void>(scale_supers), at<const void>(offset_supers));
            },
            Unlocked())
        .def(
            "multiply",
            [](const Matrix &self, Address x, int64_t tokens, Address y) {
                self.expect_memory();
                fewbit::multiply(self, at<const float>(x), tokens, at<float>(y));
            },
            Unlocked())
        .def(
            "rows",
            [](const Matrix &self, Address ids, int64_t count, Address y) {
                return self.rows(at<const int64_t>(ids), count, at<float>(y));
            },
            Unlocked())
        .def_prop_ro("row_count", &Matrix::row_count)
        .def_prop_ro("column_count", &Matrix::column_count)
        .def_prop_ro("nbytes", &Matrix::nbytes);
    bind_layouts(m, matrix);
    bind_ops(m);
    bind_ceilings(m);
    bind_layers(m);
    m.def("set_threads", &fewbit::set_threads, "n"_a, Unlocked());
    m.def("threads", &fewbit::threads);
    m.def("instruction_sets", &fewbit::instruction_sets);
    m.def("isa", [] { return std::string(fewbit::kernels().name); });
    m.def("set_isa", &fewbit::select, "name"_a);
}
