// The backward pass in one sweep of five matrix products: P' = exp(K Q'), dP' = V dO', dV += P' dO, dK += dS' Q,
// dQ' += K' dS' (FlashAttention's algorithm 4, Dao et al. 2022), transposed as the forward pass is.
//
// Queries and keys are cut into chunks that end together; a task is a pair of chunks of one key/value head. All tasks
// with one distance between the chunks touch different parts of dq, dk and dv, so they run at once, and distances come
// one after the other: sums have a fixed order whatever the number of threads, and need no atomics.

#pragma once

#include "band.hpp"
#include "exponential.hpp"
#include "packing.hpp"
#include "workspace.hpp"

namespace windowed_attention::ISA {

// A multiple of every BLOCK_ROWS, so that only the last block of all is ragged. At the usual windows, up to this, a
// chunk sees keys of itself and of one more.
constexpr int64_t CHUNK_QUERIES = 1536;

// Where the gradients of one key/value head and of its R query heads are summed, in float32, between the tasks that
// add to them. [position, head of the group or 0, D]; the batch's stride is not used. Float32 gradients are summed
// where they are returned.
struct HeadSums {
    Tensor<float> dq, dk, dv;
};

// Queries of one chunk against keys [first_key, end_key) of one chunk.
struct ChunkPair {
    int64_t b, g, first_query, end_query, first_key, end_key;
    bool same_place;       // the keys are the queries' own: nothing was summed for these rows before
    int64_t complete_dq;   // queries whose first key is at or after this one see no earlier chunk of keys
    int64_t complete_dk;   // keys before this one are seen by no later chunk of queries
};

template <class Arithmetic, class Element>
class BackwardTask {
    // Rows computed together. Twice the columns of a register tile, since each block adds to the gradients of all the
    // keys that it sees: reading and writing those costs as much as a tenth of its products.
    static constexpr int BLOCK_ROWS = 2 * TILE_VECTORS * LANES;

public:
    BackwardTask(const Backward<Element>& problem, const HeadSums& sums, const ChunkPair& pair)
        : problem_(problem), sizes_(problem.sizes), sums_(sums), pair_(pair), R_(sizes_.H / sizes_.G),
          keys_(pair.end_key - pair.first_key), capped_(sizes_.softcap > 0),
          logit_factor_(capped_ ? sizes_.scale / sizes_.softcap : sizes_.scale * LOG2_E) {}

    static size_t workspace_floats(const Sizes& sizes) {
        const int64_t row = sizes.D + ROW_PADDING;
        return 6 * (CHUNK_QUERIES + PANEL_PADDING) * row + 5 * row * BLOCK_ROWS + 3 * PIECE_KEYS * BLOCK_ROWS +
               16 * ROW_PADDING;
    }

    void run(Workspace workspace) {
        const int64_t D = sizes_.D, padded_keys = keys_ + PANEL_PADDING;
        items_step_ = D / Arithmetic::PACKED + ROW_PADDING, rows_step_ = D + ROW_PADDING;
        key_items_ = workspace.take(padded_keys * items_step_);
        value_items_ = workspace.take(padded_keys * items_step_);
        key_rows_ = Arithmetic::PACKED == 1 ? key_items_ : workspace.take(padded_keys * rows_step_ / 2);
        dk_ = workspace.take(padded_keys * rows_step_);
        dv_ = workspace.take(padded_keys * rows_step_);
        queries_ = workspace.take(D * BLOCK_ROWS);
        douts_ = workspace.take(D * BLOCK_ROWS);
        query_rows_ = workspace.take(BLOCK_ROWS * rows_step_);
        dout_rows_ = workspace.take(BLOCK_ROWS * rows_step_);
        dq_ = workspace.take(D * BLOCK_ROWS);
        weights_ = workspace.take(PIECE_KEYS * BLOCK_ROWS);
        dlogits_ = workspace.take(PIECE_KEYS * BLOCK_ROWS);
        dlogit_items_ = Arithmetic::PACKED == 1 ? dlogits_ : workspace.take(PIECE_KEYS * BLOCK_ROWS);

        clear_beyond_panel();
        const int64_t rows = (pair_.end_query - pair_.first_query) * R_;
        for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
            const int count = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, rows - row));
            const RowBlock<BLOCK_ROWS> block(sizes_, pair_.b, pair_.first_query, row, count, pair_.first_key, keys_);
            add_key_gradients(block.first[0]);  // no later row sees the keys before
            pack_keys(block.last[block.vectors * LANES - 1] + TILE_KEYS);
            load_rows(row, count, block.vectors);
            std::fill_n(dq_, D * BLOCK_ROWS, 0.0f);
            Turns turns(count, sizes_.window, BLOCK_ROWS / 2);  // a tile has half the rows
            const auto prefetch = [&] { turns.next([&](int i) { prefetch_row(row, i); }); };
            for_each_piece(block, [&](const Piece& piece) { differentiate(block, piece, prefetch); });
            add_dq(row, count);
        }
        add_key_gradients(keys_);
    }

private:
    // The last tile may reach beyond the panel: keys that nobody sees, but which must be numbers.
    void clear_beyond_panel() {
        std::fill_n(key_items_ + keys_ * items_step_, TILE_KEYS * items_step_, 0.0f);
        std::fill_n(value_items_ + keys_ * items_step_, TILE_KEYS * items_step_, 0.0f);
        if constexpr (Arithmetic::PACKED == 2)
            std::fill_n(key_rows_ + (keys_ + 1) / 2 * rows_step_, TILE_KEYS / 2 * rows_step_, 0.0f);
        std::fill_n(dk_ + keys_ * rows_step_, TILE_KEYS * rows_step_, 0.0f);
        std::fill_n(dv_ + keys_ * rows_step_, TILE_KEYS * rows_step_, 0.0f);
    }

    // Keys before `end`, as far as they aren't packed yet.
    void pack_keys(int64_t end) {
        end = std::min((end + 1) & ~1, keys_);
        const int64_t first = packed_, count = end - first;
        if (count <= 0) return;
        packed_ = end;
        const auto rows_of = [&](const Tensor<const Element>& x) {
            return EvenRows<const Element>{at(x, pair_.b, pair_.first_key + first, pair_.g), x.strides.position};
        };
        const int64_t D = sizes_.D;
        pack_along_columns<Arithmetic>(rows_of(problem_.k), count, D, key_items_ + first * items_step_, items_step_);
        pack_along_columns<Arithmetic>(rows_of(problem_.v), count, D, value_items_ + first * items_step_, items_step_);
        if constexpr (Arithmetic::PACKED == 2)
            pack_along_rows<Arithmetic>(rows_of(problem_.k), count, D, key_rows_ + first / 2 * rows_step_, rows_step_);
        std::fill_n(dk_ + first * rows_step_, count * rows_step_, 0.0f);
        std::fill_n(dv_ + first * rows_step_, count * rows_step_, 0.0f);
    }

    // Row i of what the next block reads, and of what the block at `row` and the step to the next one write.
    ALWAYS_INLINE void prefetch_row(int64_t row, int i) const {
        const int64_t D = sizes_.D;
        const Row next = Row::of(pair_.first_query, row + BLOCK_ROWS + i, R_);
        const int64_t head = pair_.g * R_ + next.head;
        prefetch(at(problem_.q, pair_.b, next.query, head), D);
        prefetch(at(problem_.dout, pair_.b, next.query, head), D);
        if (pair_.same_place) prefetch(at(problem_.out, pair_.b, next.query, head), D);
        const Row now = Row::of(pair_.first_query, row + i, R_);
        prefetch_gradient(query_gradient(now));
        if (i * R_ >= BLOCK_ROWS) return;  // a block has so many keys of its own
        prefetch(at(problem_.k, pair_.b, pair_.first_key + packed_ + i, pair_.g), D);
        prefetch(at(problem_.v, pair_.b, pair_.first_key + packed_ + i, pair_.g), D);
        prefetch_gradient(key_gradient(sums_.dk, problem_.dk, added_ + i));
        prefetch_gradient(key_gradient(sums_.dv, problem_.dv, added_ + i));
    }

    void load_rows(int64_t row, int count, int vectors) {
        const Element *q[BLOCK_ROWS], *dout[BLOCK_ROWS];
        std::fill_n(q, BLOCK_ROWS, reinterpret_cast<const Element*>(zero_row));
        std::fill_n(dout, BLOCK_ROWS, reinterpret_cast<const Element*>(zero_row));
        std::fill_n(lse_, BLOCK_ROWS, 0.0f);
        std::fill_n(delta_, BLOCK_ROWS, 0.0f);
        Row next = Row::of(pair_.first_query, row, R_);
        for (int i = 0; i < count; ++i, next.next(R_)) {
            const int64_t query = next.query, head = pair_.g * R_ + next.head;
            q[i] = at(problem_.q, pair_.b, query, head);
            dout[i] = at(problem_.dout, pair_.b, query, head);
            const int64_t statistic = (pair_.b * sizes_.S + query) * sizes_.H + head;
            lse_[i] = problem_.lse[statistic] * LOG2_E;
            if (pair_.same_place) {
                const Element* const out = at(problem_.out, pair_.b, query, head);
                problem_.delta[statistic] = dot(dout[i], out, sizes_.D);
            }
            delta_[i] = problem_.delta[statistic];
        }
        pack_transposed<Arithmetic, BLOCK_ROWS>(q, vectors, sizes_.D, queries_);
        pack_transposed<Arithmetic, BLOCK_ROWS>(dout, vectors, sizes_.D, douts_);
        pack_along_rows<Arithmetic>(q, vectors * LANES, sizes_.D, query_rows_, rows_step_);
        pack_along_rows<Arithmetic>(dout, vectors * LANES, sizes_.D, dout_rows_, rows_step_);
    }

    // Calls prefetch() with every tile.
    template <class Prefetch>
    void differentiate(const RowBlock<BLOCK_ROWS>& block, const Piece& piece, const Prefetch& prefetch) {
        for (int v = piece.first_vector; v < piece.end_vector; v += TILE_VECTORS) {
            with_constant<TILE_VECTORS>(std::min(piece.end_vector - v, TILE_VECTORS), [&](auto vectors) {
                differentiate_columns<decltype(vectors)::value>(block, piece, v * LANES, prefetch);
            });
        }
        const int offset = piece.first_vector * LANES / Arithmetic::PACKED;
        const int items = (piece.end_vector - piece.first_vector) * LANES / Arithmetic::PACKED;
        add_key_products(weights_ + offset, dout_rows_ + offset * rows_step_, items, piece, dv_);
        add_key_products(dlogits_ + offset, query_rows_ + offset * rows_step_, items, piece, dk_);
    }

    // Weights, gradients of logits and of queries for the rows from `offset` on.
    template <int VECTORS, class Prefetch>
    void differentiate_columns(const RowBlock<BLOCK_ROWS>& block, const Piece& piece, int offset,
                               const Prefetch& prefetch) {
        constexpr int PACKED = Arithmetic::PACKED;
        for (int key = piece.first; key < piece.end; key += TILE_KEYS) {
            prefetch();
            Floats weights[TILE_KEYS][VECTORS], dlogits[TILE_KEYS][VECTORS];
            multiply<Arithmetic>(key_items_ + key * items_step_, items_step_, 1, queries_ + offset, BLOCK_ROWS,
                                 sizes_.D / PACKED, weights);
            const float factor = capped_ ? sizes_.softcap * LOG2_E : logit_factor_;
            if (capped_) {
                transform(weights, [&](Floats x, int) { return tanh(x * logit_factor_); });
                std::memcpy(tanhs_, weights, sizeof(weights));
            }
            if (!block.all_see(offset, offset + VECTORS * LANES, key)) hide(block, offset, key, -INFINITY, weights);
            transform(weights, [&](Floats x, int v) {
                const Floats lse = load(lse_ + offset + v * LANES);
                return vanishing_exp2<Arithmetic::EXP2_DEGREE>(multiply_add(x, broadcast(factor), -lse));
            });
            const int64_t row = (key - piece.first) * ROW_ITEMS + offset / PACKED;
            store_rows<Arithmetic, BLOCK_ROWS>(weights_ + row, weights);

            multiply<Arithmetic>(value_items_ + key * items_step_, items_step_, 1, douts_ + offset, BLOCK_ROWS,
                                 sizes_.D / PACKED, dlogits);
            UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                const Floats delta = load(delta_ + offset + v * LANES);
                UNROLL
                for (int j = 0; j < TILE_KEYS; ++j) dlogits[j][v] = weights[j][v] * (dlogits[j][v] - delta);
            }
            if (capped_) {
                UNROLL
                for (int v = 0; v < VECTORS; ++v) {
                    UNROLL
                    for (int j = 0; j < TILE_KEYS; ++j) {
                        const Floats tanh_now = load(tanhs_ + (j * VECTORS + v) * LANES);
                        dlogits[j][v] *= 1.0f - tanh_now * tanh_now;
                    }
                }
            }
            store_rows<Arithmetic, BLOCK_ROWS>(dlogits_ + row, dlogits);
            if constexpr (PACKED == 2) {
                float* const items = dlogit_items_ + (key - piece.first) / PACKED * BLOCK_ROWS + offset;
                store_items<Arithmetic, BLOCK_ROWS>(items, dlogits);
            }
        }

        const float* const keys = key_rows_ + piece.first / PACKED * rows_step_;
        for (int64_t d = 0; d < sizes_.D; d += TILE_KEYS) {
            Floats sums[TILE_KEYS][VECTORS];
            multiply<Arithmetic>(keys + d, 1, rows_step_, dlogit_items_ + offset, BLOCK_ROWS,
                                 (piece.end - piece.first) / PACKED, sums);
            add_to(dq_ + d * BLOCK_ROWS + offset, BLOCK_ROWS, sums);
        }
    }

    // to [keys of the piece][D] += weights [keys][items] times matrix [items][D].
    void add_key_products(const float* weights, const float* matrix, int items, const Piece& piece, float* to) {
        const int64_t vectors = sizes_.D / LANES;
        for (int key = piece.first; key < piece.end; key += TILE_KEYS) {
            for (int64_t v = 0; v < vectors;) {
                // Three at a time fill the registers; a single one would leave them idle, so four are twice two.
                const int64_t left = vectors - v;
                const int now = left == 4 ? 2 : static_cast<int>(std::min<int64_t>(left, TILE_VECTORS));
                with_constant<TILE_VECTORS>(now, [&](auto constant) {
                    Floats sums[TILE_KEYS][decltype(constant)::value];
                    multiply<Arithmetic>(weights + (key - piece.first) * ROW_ITEMS, ROW_ITEMS, 1, matrix + v * LANES,
                                         rows_step_, items, sums);
                    add_to(to + key * rows_step_ + v * LANES, rows_step_, sums);
                });
                v += now;
            }
        }
    }

    // Where a row of gradients goes, [D]: to its sum until it is complete, then rounded to the result.
    struct Gradient {
        float* sum;
        Element* result;
        bool complete;
    };

    ALWAYS_INLINE Gradient query_gradient(const Row& row) const {
        return {at(sums_.dq, 0, row.query, row.head), at(problem_.dq, pair_.b, row.query, pair_.g * R_ + row.head),
                seen_keys(sizes_, pair_.b, row.query).first >= pair_.complete_dq};
    }

    ALWAYS_INLINE Gradient key_gradient(const Tensor<float>& sums, const Tensor<Element>& results, int64_t i) const {
        const int64_t key = pair_.first_key + i;
        return {at(sums, 0, key, 0), at(results, pair_.b, key, pair_.g), key < pair_.complete_dk};
    }

    ALWAYS_INLINE void prefetch_gradient(const Gradient& gradient) const {
        if (!pair_.same_place || !gradient.complete) prefetch(gradient.sum, sizes_.D);
        if (gradient.complete) prefetch(gradient.result, sizes_.D);
    }

    // x [D] times a factor, and what was summed before.
    ALWAYS_INLINE void add_gradient(const Gradient& gradient, const float* x, float factor) const {
        float* const sum = gradient.sum;
        Element* const result = gradient.result;
        const int64_t D = sizes_.D;
        if (gradient.complete && pair_.same_place) {
            for (int64_t d = 0; d < D; d += LANES) store(result + d, load(x + d) * factor);
        } else if (gradient.complete) {
            for (int64_t d = 0; d < D; d += LANES) store(result + d, load(x + d) * factor + load(sum + d));
        } else if (pair_.same_place) {
            for (int64_t d = 0; d < D; d += LANES) store(sum + d, load(x + d) * factor);
        } else {
            for (int64_t d = 0; d < D; d += LANES) store(sum + d, load(x + d) * factor + load(sum + d));
        }
    }

    void add_dq(int64_t row, int count) {
        float* const rows = query_rows_;  // which this block needs no more
        unpack_transposed<BLOCK_ROWS>(dq_, count, sizes_.D, rows, rows_step_);
        Row next = Row::of(pair_.first_query, row, R_);
        for (int i = 0; i < count; ++i, next.next(R_))
            add_gradient(query_gradient(next), rows + i * rows_step_, sizes_.scale);
    }

    // Gradients of the keys before `end`, as far as they weren't added yet.
    void add_key_gradients(int64_t end) {
        pack_keys(end);  // those that no row sees have gradients too: zeros
        for (; added_ < end; ++added_) {
            add_gradient(key_gradient(sums_.dk, problem_.dk, added_), dk_ + added_ * rows_step_, sizes_.scale);
            add_gradient(key_gradient(sums_.dv, problem_.dv, added_), dv_ + added_ * rows_step_, 1.0f);
        }
    }

    // Distance of the rows of weights_ and dlogits_: one key's numbers for all rows, as items along the rows.
    static constexpr int64_t ROW_ITEMS = BLOCK_ROWS / Arithmetic::PACKED;

    const Backward<Element>& problem_;
    const Sizes& sizes_;
    const HeadSums& sums_;
    const ChunkPair& pair_;
    int64_t R_, keys_;
    bool capped_;
    float logit_factor_;
    int64_t items_step_, rows_step_;
    int64_t packed_ = 0, added_ = 0;  // keys packed so far, and those whose gradients were added to the sums
    // The panel: keys and values with items along D, keys with items along the keys, and their gradients so far.
    float *key_items_, *value_items_, *key_rows_, *dk_, *dv_;
    // The block: queries and output gradients transposed, the same with items along the rows, dq transposed.
    float *queries_, *douts_, *query_rows_, *dout_rows_, *dq_;
    alignas(64) float lse_[BLOCK_ROWS], delta_[BLOCK_ROWS];
    // The tile: tanh(logit / softcap), where there is one.
    alignas(64) float tanhs_[TILE_KEYS * BLOCK_ROWS];
    // The piece: weights and gradients of logits with items along the rows, the latter also with items along the keys.
    float *weights_, *dlogits_, *dlogit_items_;
};

}  // namespace windowed_attention::ISA
