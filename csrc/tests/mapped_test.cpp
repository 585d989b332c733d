// Matrices over memory that others own: mapped files, read-only pages, buffers of just their size. And the sum that
// tells damaged bytes from whole ones, beside a loop over its definition.
#include <algorithm>
#include <bit>
#include <functional>
#include <stdexcept>

#include "checksum.h"
#include "matrices.h"
#include "pool.h"
#include "product.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define FEWBIT_MAPS 1
#endif

namespace test {
namespace {

size_t bytes_of(const fewbit::Matrix &m) { return static_cast<size_t>(m.nbytes()); }
// All blocks lie in one piece, the first one first.
const uint8_t *memory_of(const fewbit::Matrix &m) { return m.blocks().front().view.codes; }

void tell_blocks(fewbit::Matrix &m, const MatrixSpec &spec) {
    for (const BlockSpec &b : spec.blocks) add_block(m, b);
}

MatrixSpec random_spec(int i, Random &random) {
    MatrixSpec spec{random.whole(1, 150), {}, false};
    for (int64_t b = random.whole(1, 3); b > 0; --b) {
        const int bits = kWidths[(i + b) % 6];
        spec.blocks.push_back({random.whole(1, 50), random.one_of<int64_t>({32, 64, spec.columns}), bits,
                               static_cast<int>(random.whole(0, 2)), static_cast<int32_t>(random.whole(0, 1 << bits) / 2),
                               random.whole(0, 1) == 1});
    }
    return spec;
}

void refused(const std::string &what, const std::function<void()> &call) {
    try {
        call();
    } catch (const std::invalid_argument &) {
        return;
    }
    fail("taken: " + what);
}

// Products of one and of many tokens, and rows, are those of the matrix that was filled.
void expect_same(const Made &own, const fewbit::Matrix &other, const std::string &what) {
    const int64_t columns = own.spec.columns, rows = own.rows;
    if (other.row_count() != rows || other.column_count() != columns) fail("another shape: " + what);
    Random random(77);
    for (const int64_t tokens : {1, 3, 30}) {
        const std::vector<float> x = random.values(tokens * columns), expected = product_of(own, x, tokens);
        std::vector<float> y(expected.size(), kNan);
        fewbit::multiply(other, x.data(), tokens, y.data());
        if (!same_bits(y.data(), expected.data(), std::ssize(y))) {
            fail(say("%lld tokens have other products: ", static_cast<long long>(tokens)) + what);
        }
    }
    std::vector<int64_t> ids(static_cast<size_t>(rows));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i);
    std::vector<float> y(static_cast<size_t>(rows * columns), kNan), expected(y.size(), 0.0f);
    if (!other.rows(ids.data(), rows, y.data()) || !own.matrix->rows(ids.data(), rows, expected.data())) {
        fail("rows refused: " + what);
    }
    if (!same_bits(y.data(), expected.data(), std::ssize(y))) fail("other rows: " + what);
}

#if defined(FEWBIT_MAPS)

size_t whole_pages(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page;
}

using Mapped = std::shared_ptr<uint8_t>;

// Unmapped when the last owner goes, which `gone` tells.
Mapped owned(void *memory, size_t bytes, bool &gone) {
    if (memory == MAP_FAILED) fail("mmap");
    gone = false;
    return Mapped(static_cast<uint8_t *>(memory), [bytes, &gone](uint8_t *at) {
        munmap(at, bytes);
        gone = true;
    });
}

Mapped file_with(const uint8_t *from, size_t bytes, bool &gone) {
    std::FILE *file = std::tmpfile();
    if (!file || std::fwrite(from, 1, bytes, file) != bytes || std::fflush(file) != 0) fail("a temporary file");
    Mapped memory = owned(mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fileno(file), 0), bytes, gone);
    // a mapping outlives its file
    std::fclose(file);
    return memory;
}

void check_mapped(const Made &own) {
    const size_t bytes = bytes_of(*own.matrix), pages = whole_pages(bytes);
    bool gone = true;
    {
        fewbit::Matrix over(own.spec.columns);
        tell_blocks(over, own.spec);
        Mapped memory = file_with(memory_of(*own.matrix), bytes, gone);
        uint8_t *at = memory.get();
        over.place(at, bytes, false, std::move(memory));
        if (gone) fail("a mapping ended before its matrix");
        expect_same(own, over, "in a file, " + own.spec.words());
        const std::vector<uint8_t> codes(static_cast<size_t>(own.spec.columns));
        const float zeros[8] = {};
        refused("filling a file that is only read", [&] {
            over.fill(0, 0, 1, codes.data(), zeros, own.spec.blocks[0].offset_type ? zeros : nullptr);
        });
    }
    if (!gone) fail("a mapping outlives its matrix");

    // The last byte is the last of a page, and what follows can't be touched; nor can anything be written.
    Mapped memory = owned(mmap(nullptr, 2 * pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 2 * pages,
                          gone);
    uint8_t *at = memory.get() + pages - bytes;
    std::memcpy(at, memory_of(*own.matrix), bytes);
    if (mprotect(memory.get(), pages, PROT_READ) != 0 || mprotect(memory.get() + pages, pages, PROT_NONE) != 0) {
        fail("mprotect");
    }
    fewbit::Matrix over(own.spec.columns);
    tell_blocks(over, own.spec);
    over.place(at, bytes, false, memory);
    expect_same(own, over, "at a page's end, " + own.spec.words());
    if (fewbit::checksum(at, bytes) != fewbit::checksum(memory_of(*own.matrix), bytes)) fail("a copy has another sum");
}

#else
void check_mapped(const Made &) {}
#endif

// Zeroed memory of just its size, filled in place: the bytes are those of memory of the matrix's own.
void check_written(const MatrixSpec &spec, uint64_t seed) {
    Random first(seed), second(seed);
    const Made own = make_matrix(spec, first);
    const Made over = make_matrix(spec, second, [](fewbit::Matrix &m) {
        auto memory = std::make_shared<fewbit::Buffer>(bytes_of(m));
        uint8_t *at = memory->data();
        m.place(at, bytes_of(m), true, std::move(memory));
    });
    expect_same(own, *over.matrix, "filled in place, " + spec.words());
    if (std::memcmp(memory_of(*own.matrix), memory_of(*over.matrix), bytes_of(*own.matrix)) != 0) {
        fail("other bytes when filled in place: " + spec.words());
    }
}

void check_refusals(const Made &own) {
    const size_t bytes = bytes_of(*own.matrix);
    fewbit::Buffer memory(bytes + 128);
    std::memcpy(memory.data(), memory_of(*own.matrix), bytes);
    fewbit::Matrix m(own.spec.columns);
    refused("memory for no blocks", [&] { m.place(memory.data(), 0, false, nullptr); });
    tell_blocks(m, own.spec);
    refused("no memory", [&] { m.place(nullptr, bytes, false, nullptr); });
    for (const int64_t other : {-64, -1, 1, 64}) {
        refused(say("%lld bytes more", static_cast<long long>(other)),
                [&] { m.place(memory.data(), bytes + static_cast<size_t>(other), false, nullptr); });
    }
    refused("0 bytes", [&] { m.place(memory.data(), 0, false, nullptr); });
    for (const int shift : {1, 4, 16, 32, 63}) {
        refused(say("memory out of line by %d", shift), [&] { m.place(memory.data() + shift, bytes, false, nullptr); });
    }
    refused("a matrix without memory", [&] { m.expect_memory(); });
    // none of these left anything behind; the next line of the cache will do
    std::memmove(memory.data() + 64, memory.data(), bytes);
    m.place(memory.data() + 64, bytes, false, nullptr);
    expect_same(own, m, "after refusals, " + own.spec.words());
    refused("memory twice", [&] { m.place(memory.data(), bytes, false, nullptr); });
    refused("a block behind the memory", [&] { m.add_block(1, 32, 4, 0, 0, false); });
    expect_same(own, m, "after more refusals, " + own.spec.words());
}

}  // namespace

std::string test_mapped(int every) {
    Random random(31);
    const int shapes = 40 / every;
    for (int i = 0; i < shapes; ++i) {
        const MatrixSpec spec = random_spec(i, random);
        const Made own = make_matrix(spec, random);
        check_mapped(own);
        check_refusals(own);
        check_written(spec, 1000 + static_cast<uint64_t>(i));
    }
    return say("%d shapes", shapes);
}

namespace {

// A mebibyte after the other. Within one, word i of 8 bytes goes into chain i mod 8, in rounds of 8 words, as long as
// there are whole rounds. The mebibyte's sum begins as the number of bytes left; then it takes in each chain and a word of
// the rest, filled up with zeros. The whole sum begins as the number of all bytes and takes in those of the mebibytes.
uint64_t slow_step(uint64_t state, uint64_t word) {
    const uint64_t product = (state ^ word) * 0x9e3779b97f4a7c15u;
    return product << 29 | product >> 35;
}

uint64_t slow_word(const std::vector<uint8_t> &bytes, size_t at, size_t end) {
    uint64_t word = 0;
    for (size_t i = 0; i < 8; ++i) {
        const size_t shift = 8 * (std::endian::native == std::endian::little ? i : 7 - i);
        if (at + i < end) word |= static_cast<uint64_t>(bytes[at + i]) << shift;
    }
    return word;
}

uint64_t slow_sum(const std::vector<uint8_t> &bytes) {
    constexpr size_t kPiece = 1024 * 1024;
    uint64_t sum = bytes.size();
    for (size_t begin = 0; begin < bytes.size(); begin += kPiece) {
        const size_t end = std::min(bytes.size(), begin + kPiece), whole = begin + (end - begin) / 64 * 64;
        uint64_t chains[8] = {1, 2, 3, 4, 5, 6, 7, 8};
        for (size_t at = begin; at < whole; at += 8) {
            uint64_t &chain = chains[(at - begin) / 8 % 8];
            chain = slow_step(chain, slow_word(bytes, at, end));
        }
        uint64_t piece = end - whole;
        for (size_t i = 0; i < 8; ++i) {
            piece = slow_step(slow_step(piece, chains[i]), slow_word(bytes, whole + 8 * i, end));
        }
        sum = slow_step(sum, piece);
    }
    return sum;
}

uint64_t sum_of(const std::vector<uint8_t> &bytes) { return fewbit::checksum(bytes.data(), bytes.size()); }

std::vector<uint8_t> random_bytes(size_t count, Random &random) {
    // a vector of just its size: reading on is an error for AddressSanitizer
    std::vector<uint8_t> bytes(count);
    for (uint8_t &b : bytes) b = static_cast<uint8_t>(random.whole(0, 255));
    return bytes;
}

void check_sum(const std::vector<uint8_t> &bytes) {
    const uint64_t expected = slow_sum(bytes);
    for (const int threads : {1, 3}) {
        fewbit::set_threads(threads);
        if (sum_of(bytes) != expected) fail(say("another sum of %zu bytes on %d threads", bytes.size(), threads));
    }
}

void check_flip(std::vector<uint8_t> &bytes, size_t at, uint64_t right, Random &random) {
    const auto change = static_cast<uint8_t>(random.whole(1, 255));
    bytes[at] ^= change;
    if (sum_of(bytes) == right) fail(say("byte %zu of %zu changed and not the sum", at, bytes.size()));
    bytes[at] ^= change;
}

}  // namespace

std::string test_checksum(int) {
    Random random(41);
    constexpr size_t kPiece = size_t{1} << 20;
    int64_t flips = 0;
    for (size_t count = 0; count <= 200; ++count) {
        std::vector<uint8_t> bytes = random_bytes(count, random);
        check_sum(bytes);
        const uint64_t right = sum_of(bytes);
        for (size_t i = 0; i < count; ++i, ++flips) check_flip(bytes, i, right, random);
        // zeros at the end count too
        bytes.push_back(0);
        if (sum_of(bytes) == right) fail(say("a zero more than %zu bytes and the same sum", count));
    }
    for (const size_t count : {kPiece - 1, kPiece, kPiece + 1, 2 * kPiece + 77}) {
        std::vector<uint8_t> bytes = random_bytes(count, random);
        check_sum(bytes);
        const uint64_t right = sum_of(bytes);
        for (const size_t at : {size_t{0}, size_t{63}, kPiece - 2, count / 2, count - 1}) {
            check_flip(bytes, at, right, random);
            ++flips;
        }
        if (count < 2 * kPiece) continue;
        std::swap_ranges(bytes.begin(), bytes.begin() + kPiece, bytes.begin() + kPiece);
        if (sum_of(bytes) == right) fail("two pieces changed places and the sum did not");
    }
    // wherever the bytes lie
    const std::vector<uint8_t> bytes = random_bytes(500, random);
    for (size_t shift = 1; shift < 9; ++shift) {
        const std::vector<uint8_t> rest(bytes.begin() + static_cast<std::ptrdiff_t>(shift), bytes.end());
        if (fewbit::checksum(bytes.data() + shift, rest.size()) != slow_sum(rest)) fail("the sum depends on the place");
    }
    return say("205 sizes, %lld changed bytes", static_cast<long long>(flips));
}

}  // namespace test
