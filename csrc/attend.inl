// Paged attention of some new tokens over a chunk of cached rows, on the vectors of ops.inl. A token's result depends on
// the rows it sees and on nothing else of the batch.

namespace fewbit {
namespace {

// Query heads that share a pass over the cached rows; more would not fit the registers.
constexpr int kHeadsAtOnce = 4;
// From so many new tokens on, the chunk's rows are widened to floats once and not once a token.
constexpr int kCopyFrom = 3;

template <int... L>
struct Lanes {};
template <int N, int... L>
struct CountLanes : CountLanes<N - 1, N - 1, L...> {};
template <int... L>
struct CountLanes<0, L...> {
    using Type = Lanes<L...>;
};

// Adds the lanes of a, and those of b, that are S apart: lanes without bit S hold a's sums, the others b's.
template <int S, int... L>
inline Vec fold(Vec a, Vec b, Lanes<L...>) {
    return __builtin_shufflevector(a, b, ((L & S) ? kLanes + L : L)...) +
           __builtin_shufflevector(a, b, ((L & S) ? kLanes + (L ^ S) : (L ^ S))...);
}

// One vector for each of H heads.
template <int H>
struct PerHead {
    Vec v[H];
};

// Lane l: what has to be added up, over the lanes that equal l modulo N, to the product of q and cached row l mod N.
template <class Row, int H, int N>
inline PerHead<H> dots(const uint8_t *keys, const int64_t *rows, const float *q, int width) {
    if constexpr (N == 1) {
        PerHead<H> sums{};
        const Row row(keys + rows[0], width);
        for (int d = 0; d < width; d += kLanes) {
            const Vec k = row.load(d);
            for (int h = 0; h < H; ++h) sums.v[h] += load_vec(q + h * width + d) * k;
        }
        return sums;
    } else {
        PerHead<H> sums = dots<Row, H, N / 2>(keys, rows, q, width);
        const PerHead<H> others = dots<Row, H, N / 2>(keys, rows + N / 2, q, width);
        for (int h = 0; h < H; ++h) {
            sums.v[h] = fold<N / 2>(sums.v[h], others.v[h], typename CountLanes<kLanes>::Type());
        }
        return sums;
    }
}

// Scores to weights e^(score - largest); their sum and the largest to out[0] and out[1].
inline void weigh(float *score, int64_t count, float *out) {
    Vec most = splat_vec(-__builtin_inff());
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vec v = load_vec(score + i);
        most = v > most ? v : most;
    }
    float largest = -__builtin_inff();
    for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
    for (; i < count; ++i) largest = score[i] > largest ? score[i] : largest;

    Vec total = {};
    for (i = 0; i + kLanes <= count; i += kLanes) {
        const Vec weight = exp_vec(load_vec(score + i) - largest);
        store_vec(score + i, weight);
        total += weight;
    }
    float sum = add_lanes(total);
    if (i < count) {
        const Vec weight = exp_vec(load_part(score + i, count - i) - largest);
        store_part(score + i, weight, count - i);
        for (int64_t l = 0; l < count - i; ++l) sum += weight[l];
    }
    out[0] = sum;
    out[1] = largest;
}

// V vectors, from number d on, of the weighted values of H heads.
template <class Row, int H, int V>
inline void add_values(const AttendTask &a, int d, const int64_t *rows, const float *weights, int64_t count,
                       float *out) {
    Vec sums[H][V] = {};
    for (int64_t p = 0; p < count; ++p) {
        const Row row(a.v_cache + rows[p], a.width);
        Vec value[V];
        for (int j = 0; j < V; ++j) value[j] = row.load(d + j * kLanes);
        for (int h = 0; h < H; ++h) {
            const Vec weight = splat_vec(weights[h * kChunk + p]);
            for (int j = 0; j < V; ++j) sums[h][j] += weight * value[j];
        }
    }
    for (int h = 0; h < H; ++h) {
        for (int j = 0; j < V; ++j) store_vec(out + h * (a.width + 2) + d + j * kLanes, sums[h][j]);
    }
}

// cap * tanh(scores / cap), by tanh(x) = 1 - 2 / (e^(2x) + 1).
inline Vec capped(Vec scores, float cap) { return cap - 2.0f * cap / (exp_vec(scores * (2.0f / cap)) + 1.0f); }

// H query heads of one new token, the first of them number `row` of the task's results, over `count` cached rows but the
// first `hidden` of them, fewer than a vector.
template <class Row, int H>
void attend_heads(const AttendTask &a, const int64_t *rows, const float *q, int64_t row, int64_t count,
                  int64_t hidden) {
    float *scores = a.scores + row * kChunk;
    for (int64_t p = 0; p < count; p += kLanes) {
        const PerHead<H> found = dots<Row, H, kLanes>(a.k_cache, rows + p, q, a.width);
        for (int h = 0; h < H; ++h) {
            const Vec scaled = found.v[h] * a.scale;
            store_vec(scores + h * kChunk + p, a.soft_cap > 0.0f ? capped(scaled, a.soft_cap) : scaled);
        }
    }
    const int64_t entry = a.width + 2;
    float *out = a.sums + row * entry;
    for (int h = 0; h < H; ++h) {
        float *mine = scores + h * kChunk;
        for (int64_t p = 0; p < hidden; ++p) mine[p] = -__builtin_inff();
        weigh(mine, count, out + h * entry + a.width);
        // exp_vec gives a little more than nothing, too little for the sum
        for (int64_t p = 0; p < hidden; ++p) mine[p] = 0.0f;
    }
    int d = 0;
    for (; d + 4 * kLanes <= a.width; d += 4 * kLanes) {
        add_values<Row, H, 4>(a, d, rows, scores, count, out);
    }
    for (; d < a.width; d += kLanes) add_values<Row, H, 1>(a, d, rows, scores, count, out);
}

// Cached rows that new token i sees, counted from `begin`, at most the chunk.
inline int64_t visible(const AttendTask &a, int i) {
    const int64_t seen = a.length - a.fresh + i + 1;
    const int64_t last = seen < a.end ? seen : a.end;
    return last > a.begin ? last - a.begin : 0;
}

// Rows before the window of new token i, counted from `begin`: of no matter to it.
inline int64_t before_window(const AttendTask &a, int i) {
    const int64_t past = a.length - a.fresh + i + 1 - a.window - a.begin;
    return a.window > 0 && past > 0 ? past : 0;
}

// Where the chunk's rows begin in the cache, in bytes; after the last one it stands for those to a whole vector.
inline void locate(const AttendTask &a, int64_t *rows) {
    int64_t page = a.begin / a.page_size, offset = a.begin % a.page_size;
    const int64_t count = a.end - a.begin;
    for (int64_t p = 0; p < count; ++p) {
        rows[p] = (a.pages[page] * a.page_size + offset) * a.row_bytes;
        if (++offset == a.page_size) {
            offset = 0;
            ++page;
        }
    }
    for (int64_t p = count; p % kLanes; ++p) rows[p] = rows[count - 1];
}

template <class Row>
void attend_tokens(const AttendTask &a, const int64_t *rows) {
    for (int i = 0; i < a.fresh; ++i) {
        const int64_t past = before_window(a, i), seen = visible(a, i);
        // whole vectors are left out, the rest of a vector is hidden
        const int64_t skipped = past / kLanes * kLanes, count = past < seen ? seen - skipped : 0;
        for (int h = 0; h < a.group; h += kHeadsAtOnce) {
            const float *q = a.q + i * a.q_stride + h * a.width;
            const int64_t row = i * a.group + h, hidden = count > 0 ? past - skipped : 0;
            const int64_t *from = rows + (count > 0 ? skipped : 0);
            switch (a.group - h) {
                case 1: attend_heads<Row, 1>(a, from, q, row, count, hidden); break;
                case 2: attend_heads<Row, 2>(a, from, q, row, count, hidden); break;
                case 3: attend_heads<Row, 3>(a, from, q, row, count, hidden); break;
                default: attend_heads<Row, kHeadsAtOnce>(a, from, q, row, count, hidden);
            }
        }
    }
}

template <class Row>
void attend_rows(const AttendTask &a) {
    int64_t rows[kChunk];
    locate(a, rows);
    if (a.fresh < kCopyFrom) return attend_tokens<Row>(a, rows);
    float *keys = a.copies, *values = a.copies + kChunk * a.width;
    for (int64_t p = 0; p < a.end - a.begin || p % kLanes; ++p) {
        read_head<Row>(a.k_cache + rows[p], a.width, keys + p * a.width);
        read_head<Row>(a.v_cache + rows[p], a.width, values + p * a.width);
        rows[p] = p * head_bytes(CacheType::f32, a.width);
    }
    AttendTask copied = a;
    copied.k_cache = reinterpret_cast<const uint8_t *>(keys);
    copied.v_cache = reinterpret_cast<const uint8_t *>(values);
    attend_tokens<FloatRow>(copied, rows);
}

void attend(const AttendTask &a) {
    with_rows(a.type, [&]<class Row>() { attend_rows<Row>(a); });
}

}  // namespace
}  // namespace fewbit
