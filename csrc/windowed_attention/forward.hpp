// The forward pass: FlashAttention's online softmax (Dao et al. 2022, algorithm 1) with queries in the vector lanes.
//
// Everything is transposed, S' = K Q', O' += V' P', so that the softmax needs no sum across lanes and keys and values
// are read as scalars, in their natural layout. A task is a chunk of the rows of one key/value head; it takes the keys
// and values that it reads panel by panel, packs them as its blocks come to them, and keeps the state of its blocks
// between panels.

#pragma once

#include "band.hpp"
#include "exponential.hpp"
#include "packing.hpp"
#include "workspace.hpp"

namespace windowed_attention::ISA {

constexpr int64_t CHUNK_ROWS = 1536;
// Keys packed at once. All that a chunk sees where that is little, else as many as stay in the second-level cache.
constexpr int64_t ONE_PANEL = 2560, PANEL_KEYS = 768;

// Logits of at most this size (in units of log 2) need no maximum: sums of their exponentials can neither overflow nor
// vanish.
constexpr float HARMLESS = 60.0f;
// A maximum that no logit has had yet: finite, so that differences are numbers.
constexpr float NO_MAXIMUM = -1e30f;
// Weights are relative to a maximum that may be out of date by this much (in powers of two), which costs no accuracy
// and saves almost every rescaling (Tri Dao's FlashAttention-4 does so).
constexpr float STALE_BY = 6.0f;

template <class Arithmetic, class Element>
class ForwardTask {
    // Rows computed together: as many as a register tile has columns.
    static constexpr int BLOCK_ROWS = TILE_VECTORS * LANES;

public:
    ForwardTask(const Forward<Element>& problem, int64_t b, int64_t g, int64_t first_query, int64_t end_query)
        : problem_(problem), sizes_(problem.sizes), b_(b), g_(g), R_(sizes_.H / sizes_.G), first_query_(first_query),
          rows_((end_query - first_query) * R_), capped_(sizes_.softcap > 0),
          logit_factor_(capped_ ? sizes_.scale / sizes_.softcap : sizes_.scale * LOG2_E) {
        first_key_ = seen_keys(sizes_, b, first_query).first;
        end_key_ = end_query + sizes_.T - sizes_.S;
    }

    static size_t workspace_floats(const Sizes& sizes) {
        // A chunk has at least one query, with all its rows.
        const int64_t blocks = std::max(CHUNK_ROWS, sizes.H / sizes.G) / BLOCK_ROWS + 1;
        return 2 * (ONE_PANEL + PANEL_PADDING) * (sizes.D + ROW_PADDING) +
               (sizes.D + ROW_PADDING + PIECE_KEYS) * BLOCK_ROWS + blocks * state_floats(sizes) + 8 * ROW_PADDING;
    }

    void run(Workspace workspace) {
        const int64_t D = sizes_.D;
        const int64_t keys = end_key_ - first_key_;
        const int64_t panel_keys = keys <= ONE_PANEL ? keys : PANEL_KEYS;
        keys_step_ = D / Arithmetic::PACKED + ROW_PADDING, values_step_ = D + ROW_PADDING;
        keys_ = workspace.take((panel_keys + PANEL_PADDING) * keys_step_);
        values_ = workspace.take((panel_keys + PANEL_PADDING) * values_step_ / Arithmetic::PACKED);
        queries_ = workspace.take(BLOCK_ROWS * values_step_);
        weights_ = workspace.take(PIECE_KEYS * BLOCK_ROWS);
        const bool one_panel = panel_keys == keys;
        float* const states = workspace.take((one_panel ? 1 : rows_ / BLOCK_ROWS + 1) * state_floats(sizes_));

        for (int64_t first = first_key_; first < end_key_; first += panel_keys) {
            const int64_t count = std::min(panel_keys, end_key_ - first);
            begin_panel(first, count);
            for (int64_t row = 0; row < rows_; row += BLOCK_ROWS) {
                sums_ = states + (one_panel ? 0 : row / BLOCK_ROWS * state_floats(sizes_));
                totals_ = sums_ + D * BLOCK_ROWS;
                rounded_totals_ = totals_ + (Arithmetic::PACKED - 1) * BLOCK_ROWS;
                minus_maxima_ = rounded_totals_ + BLOCK_ROWS;
                const int rows = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, rows_ - row));
                const RowBlock<BLOCK_ROWS> block(sizes_, b_, first_query_, row, rows, first, count);
                const int last_key = block.last[block.vectors * LANES - 1];
                const bool sees_keys = block.first[0] <= last_key;
                if (sees_keys) pack_keys(last_key + TILE_KEYS);
                if (sees_keys || first == first_key_) pack_queries(row, rows);
                const bool harmless = logits_are_harmless(block.vectors);
                if (first == first_key_) start_block(row, rows, harmless);
                if (sees_keys) {
                    const bool no_maxima = harmless && std::all_of(minus_maxima_, minus_maxima_ + BLOCK_ROWS,
                                                                   [](float x) { return x == 0.0f; });
                    if (!no_maxima) forget_empty_maxima();
                    Turns turns(rows, sizes_.window, BLOCK_ROWS);
                    const auto prefetch = [&] { turns.next([&](int i) { prefetch_row(row, i); }); };
                    for_each_piece(block, [&](const Piece& piece) {
                        with_constant<TILE_VECTORS>(piece.end_vector - piece.first_vector, [&](auto vectors) {
                            if (no_maxima) {
                                attend<decltype(vectors)::value, true>(block, piece, prefetch);
                            } else {
                                attend<decltype(vectors)::value, false>(block, piece, prefetch);
                            }
                        });
                    });
                }
                if (first + count == end_key_) finish_block(row, rows);
            }
        }
    }

private:
    // What is relative to the maxima, and the maxima.
    static int64_t relative_rows(const Sizes& sizes) { return sizes.D + Arithmetic::PACKED; }
    static int64_t state_floats(const Sizes& sizes) { return (relative_rows(sizes) + 1) * BLOCK_ROWS; }

    void begin_panel(int64_t first, int64_t count) {
        first_of_panel_ = first, packed_ = 0, panel_keys_ = count;
        largest_key_ = 0;
        // The last tile may reach beyond the panel: keys that nobody sees, but which must be numbers.
        const int64_t pairs = (count + Arithmetic::PACKED - 1) / Arithmetic::PACKED;
        std::fill_n(keys_ + count * keys_step_, TILE_KEYS * keys_step_, 0.0f);
        std::fill_n(values_ + pairs * values_step_, TILE_KEYS / Arithmetic::PACKED * values_step_, 0.0f);
    }

    // Keys and values of the panel before `end`, as far as they aren't packed yet.
    void pack_keys(int64_t end) {
        end = std::min((end + 1) & ~1, panel_keys_);
        const int64_t count = end - packed_;
        if (count <= 0) return;
        const auto rows_of = [&](const Tensor<const Element>& x) {
            return EvenRows<const Element>{at(x, b_, first_of_panel_ + packed_, g_), x.strides.position};
        };
        const auto keys = rows_of(problem_.k), values = rows_of(problem_.v);
        float* const to_values = values_ + packed_ / Arithmetic::PACKED * values_step_;
        pack_along_columns<Arithmetic>(keys, count, sizes_.D, keys_ + packed_ * keys_step_, keys_step_);
        pack_along_rows<Arithmetic>(values, count, sizes_.D, to_values, values_step_);
        for (int64_t i = 0; i < count; ++i) largest_key_ = largest(largest_key_, dot(keys[i], keys[i], sizes_.D));
        packed_ = end;
    }

    void pack_queries(int64_t row, int rows) {
        const Element* pointers[BLOCK_ROWS];
        std::fill_n(pointers, BLOCK_ROWS, reinterpret_cast<const Element*>(zero_row));
        Row next = Row::of(first_query_, row, R_);
        for (int i = 0; i < rows; ++i, next.next(R_)) pointers[i] = at(problem_.q, b_, next.query, g_ * R_ + next.head);
        pack_transposed<Arithmetic, BLOCK_ROWS>(pointers, (rows + LANES - 1) / LANES, sizes_.D, queries_);
    }

    // Row i of what the block at `row` writes, and of what the next one reads.
    ALWAYS_INLINE void prefetch_row(int64_t row, int i) const {
        const auto at_row = [&](const auto& x, int64_t row) {
            const Row now = Row::of(first_query_, row, R_);
            return at(x, b_, now.query, g_ * R_ + now.head);
        };
        prefetch(at_row(problem_.out, row + i), sizes_.D);
        prefetch(at_row(problem_.q, row + BLOCK_ROWS + i), sizes_.D);
        if (i * R_ >= BLOCK_ROWS) return;  // a block has so many keys of its own
        prefetch(at(problem_.k, b_, first_of_panel_ + packed_ + i, g_), sizes_.D);
        prefetch(at(problem_.v, b_, first_of_panel_ + packed_ + i, g_), sizes_.D);
    }

    // What is not a number is the largest of all.
    static float largest(float a, float b) { return b == b ? std::max(a, b) : INFINITY; }

    // By the inequality of Cauchy and Schwarz: |q k| <= |q| |k|.
    bool logits_are_harmless(int vectors) const {
        float largest_query = 0;
        for (int v = 0; v < vectors; ++v) {
            Floats squares{};
            for (int64_t i = 0; i < sizes_.D / Arithmetic::PACKED; ++i) {
                const Floats x = load(queries_ + i * BLOCK_ROWS + v * LANES);
                squares = Arithmetic::accumulate(squares, x, x);
            }
            for (int i = 0; i < LANES; ++i) largest_query = largest(largest_query, squares[i]);
        }
        const float bound = std::sqrt(largest_query) * std::sqrt(largest_key_) * logit_factor_;
        return (capped_ ? sizes_.softcap * LOG2_E : bound) <= HARMLESS;
    }

    // A row that has seen nothing yet, in panels without maxima, has no maximum of 0 either.
    void forget_empty_maxima() {
        for (int i = 0; i < BLOCK_ROWS; ++i) {
            if (totals_[i] == 0.0f) minus_maxima_[i] = -NO_MAXIMUM;
        }
    }

    // A sink is a key without a value that every row has seen. Where logits are harmless all maxima are 0.
    void start_block(int64_t row, int rows, bool harmless) {
        std::fill_n(sums_, sizes_.D * BLOCK_ROWS, 0.0f);
        std::fill_n(minus_maxima_, BLOCK_ROWS, harmless ? 0.0f : -NO_MAXIMUM);
        std::fill_n(totals_, Arithmetic::PACKED * BLOCK_ROWS, 0.0f);
        if (!sizes_.sinks) return;
        for (int i = 0; i < rows; ++i) {
            const float sink = sizes_.sinks[g_ * R_ + (row + i) % R_] * LOG2_E;
            if (harmless && sink <= HARMLESS) {
                totals_[i] = rounded_totals_[i] = std::exp2(sink);
            } else if (!(sink <= NO_MAXIMUM)) {  // so written for what is not a number
                totals_[i] = rounded_totals_[i] = 1.0f;
                minus_maxima_[i] = -sink;
            }
        }
    }

    // Calls prefetch() with every tile.
    template <int VECTORS, bool HARMLESS_LOGITS, class Prefetch>
    void attend(const RowBlock<BLOCK_ROWS>& block, const Piece& piece, const Prefetch& prefetch) {
        constexpr int PACKED = Arithmetic::PACKED;
        const int offset = piece.first_vector * LANES;
        const float factor = capped_ ? sizes_.softcap * LOG2_E : logit_factor_;
        int first = piece.first;  // of the keys whose weights are not in the sums yet
        for (int key = piece.first; key < piece.end; key += TILE_KEYS) {
            prefetch();
            Floats logits[TILE_KEYS][VECTORS];
            multiply<Arithmetic>(keys_ + key * keys_step_, keys_step_, 1, queries_ + offset, BLOCK_ROWS,
                                 sizes_.D / PACKED, logits);
            if (capped_) {
                transform(logits, [&](Floats x, int) { return tanh(x * logit_factor_); });
            }
            if constexpr (HARMLESS_LOGITS) {
                transform(logits, [&](Floats x, int) { return x * factor; });
                if (!piece.whole) hide(block, offset, key, VANISHING, logits);
            } else {
                if (!piece.whole) hide(block, offset, key, -INFINITY, logits);
                Floats largest[VECTORS];
                if (exceed_maxima(logits, factor, offset, largest)) {
                    add_values<VECTORS>(offset, first, key);
                    first = key;
                    raise_maxima(offset, largest);
                }
                transform(logits, [&](Floats x, int v) {
                    const Floats minus_maximum = load(minus_maxima_ + offset + v * LANES);
                    return maximum(broadcast(VANISHING), multiply_add(x, broadcast(factor), minus_maximum));
                });
            }
            transform(logits, [&](Floats x, int) { return exp2<Arithmetic::EXP2_DEGREE>(x); });
            float* const to = weights_ + (key - first) / PACKED * BLOCK_ROWS + offset;
            store_items<Arithmetic, BLOCK_ROWS>(to, logits);
            UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                Floats total{}, rounded{};
                UNROLL
                for (int j = 0; j < TILE_KEYS; ++j) {
                    total += logits[j][v];
                    if (PACKED == 2 && j % 2 == 0) {
                        const Floats item = item_of<Arithmetic>(logits, j, v);
                        rounded = Arithmetic::accumulate(rounded, item, Arithmetic::ones());
                    }
                }
                add_to(totals_ + offset + v * LANES, total);
                if constexpr (PACKED == 2) add_to(rounded_totals_ + offset + v * LANES, rounded);
            }
        }
        add_values<VECTORS>(offset, first, piece.end);
    }

    // Whether a logit is larger than the maximum of its row allows; the largest of each row in units of log 2.
    template <int VECTORS>
    ALWAYS_INLINE bool exceed_maxima(const Floats (&logits)[TILE_KEYS][VECTORS], float factor, int offset,
                                     Floats (&largest)[VECTORS]) const {
        bool exceeded = false;
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            largest[v] = logits[0][v];
            UNROLL
            for (int j = 1; j < TILE_KEYS; ++j) largest[v] = maximum(largest[v], logits[j][v]);
            largest[v] *= factor;
            exceeded |= any_greater(largest[v] + load(minus_maxima_ + offset + v * LANES), broadcast(STALE_BY));
        }
        return __builtin_expect(exceeded, false);
    }

    // O' += V' P' for keys [first, end), whose weights are the first ones in weights_.
    template <int VECTORS>
    ALWAYS_INLINE void add_values(int offset, int first, int end) {
        if (first == end) return;
        const float* const values = values_ + first / Arithmetic::PACKED * values_step_;
        for (int64_t d = 0; d < sizes_.D; d += TILE_KEYS) {
            Floats sums[TILE_KEYS][VECTORS];
            multiply<Arithmetic>(values + d, 1, values_step_, weights_ + offset, BLOCK_ROWS,
                                 (end - first) / Arithmetic::PACKED, sums);
            add_to(sums_ + d * BLOCK_ROWS + offset, BLOCK_ROWS, sums);
        }
    }

    template <int VECTORS>
    __attribute__((noinline)) void raise_maxima(int offset, const Floats (&largest)[VECTORS]) {
        for (int v = 0; v < VECTORS; ++v) {
            float* const minus_maximum = minus_maxima_ + offset + v * LANES;
            const Floats raised = maximum(-load(minus_maximum), largest[v]);
            const Floats factor = vanishing_exp2<4>(-load(minus_maximum) - raised);
            store(minus_maximum, -raised);
            for (int64_t i = 0; i < relative_rows(sizes_); ++i) {
                float* const at = sums_ + i * BLOCK_ROWS + offset + v * LANES;
                store(at, load(at) * factor);
            }
        }
    }

    void finish_block(int64_t row, int rows) {
        float* const sums_of_rows = queries_;  // which this block needs no more
        unpack_transposed<BLOCK_ROWS>(sums_, rows, sizes_.D, sums_of_rows, values_step_);
        Row next = Row::of(first_query_, row, R_);
        for (int i = 0; i < rows; ++i, next.next(R_)) {
            const int64_t head = g_ * R_ + next.head;
            const float* const sums = sums_of_rows + i * values_step_;
            const float inverse = 1.0f / rounded_totals_[i];
            Element* const out = at(problem_.out, b_, next.query, head);
            for (int64_t d = 0; d < sizes_.D; d += LANES) store(out + d, load(sums + d) * inverse);
            problem_.lse[(b_ * sizes_.S + next.query) * sizes_.H + head] =
                static_cast<float>(std::log(totals_[i]) - minus_maxima_[i] * LN_2);
        }
    }

    const Forward<Element>& problem_;
    const Sizes& sizes_;
    int64_t b_, g_, R_, first_query_, rows_, first_key_, end_key_;
    // The panel, and how many of its keys are packed.
    int64_t first_of_panel_, panel_keys_, packed_;
    bool capped_;
    float logit_factor_;
    int64_t keys_step_, values_step_;
    float largest_key_;  // of the squares of the panel's keys' lengths
    // Packed keys and values of the panel, queries of the block and weights of the piece.
    float *keys_, *values_, *queries_, *weights_;
    // State of the block: [D][BLOCK_ROWS] sums of weight * value; for each row the sum of weights, that of the weights
    // as they were multiplied (a row's weights add up to one whatever they were rounded to), and minus the maximum that
    // all these are relative to, of logits in units of log 2.
    float *sums_, *totals_, *rounded_totals_, *minus_maxima_;
};

}  // namespace windowed_attention::ISA
