// Which keys a block of query rows sees, and how they are cut into pieces of which all or nothing is computed.
//
// A row is a query of one of the R heads that share a key/value head: row n of a chunk is query n / R, head n % R.
// So the rows of a block are few queries when heads share keys, and the band has narrow edges.

#pragma once

#include "vector.hpp"

namespace windowed_attention::ISA {

// Keys [first, last] of the query at a row of the batch.
struct Seen {
    int64_t first, last;
};

ALWAYS_INLINE Seen seen_keys(const Sizes& sizes, int64_t b, int64_t query) {
    const int64_t own = query + sizes.T - sizes.S;
    const int64_t window_start = std::max<int64_t>(0, own - sizes.window + 1);
    const int64_t document_start = sizes.document_start ? sizes.document_start[b * sizes.S + query] : 0;
    return {std::max(window_start, document_start), own};
}

// Counts through the rows of a chunk: dividing by R each time would cost as much as a key.
struct Row {
    int64_t query, head;  // head of the group, in [0, R)

    static Row of(int64_t first_query, int64_t row, int64_t R) { return {first_query + row / R, row % R}; }

    ALWAYS_INLINE void next(int64_t R) {
        if (++head == R) head = 0, ++query;
    }
};

// Keys of a panel [0, panel_keys) that a block of up to ROWS rows sees. Both ends rise with the row.
template <int ROWS>
struct RowBlock {
    int vectors;
    alignas(64) int32_t first[ROWS], last[ROWS];

    // Rows of the chunk that begins with query first_query; the panel begins with key first_key.
    RowBlock(const Sizes& sizes, int64_t b, int64_t first_query, int64_t first_row, int rows, int64_t first_key,
             int64_t panel_keys)
        : vectors((rows + LANES - 1) / LANES) {
        const int64_t R = sizes.H / sizes.G;
        Row row = Row::of(first_query, first_row, R);
        for (int i = 0; i < rows; ++i, row.next(R)) {
            const Seen seen = seen_keys(sizes, b, row.query);
            first[i] = static_cast<int32_t>(std::min(std::max<int64_t>(seen.first - first_key, 0), panel_keys));
            last[i] = static_cast<int32_t>(std::min(seen.last - first_key, panel_keys - 1));
        }
        // Rows beyond the end hold zeros and see what the last one sees.
        std::fill(first + rows, first + vectors * LANES, first[rows - 1]);
        std::fill(last + rows, last + vectors * LANES, last[rows - 1]);
    }

    // Whether rows [from, end) see all the keys of the tile at `key`.
    ALWAYS_INLINE bool all_see(int from, int end, int key) const {
        return first[end - 1] <= key && key + TILE_KEYS - 1 <= last[from];
    }
};

// Keys [first, end) against vectors [first_vector, end_vector) of a block's rows; end - first is a multiple of
// TILE_KEYS, so that keys beyond the panel can be among them, which no row sees.
struct Piece {
    int first, end, first_vector, end_vector;
    bool whole;  // every row sees every key
};

// `hidden` in place of the logits of keys from `key` on that the rows from `offset` on don't see.
template <int BLOCK_ROWS, int VECTORS>
ALWAYS_INLINE void hide(const RowBlock<BLOCK_ROWS>& block, int offset, int key, float hidden,
                        Floats (&logits)[TILE_KEYS][VECTORS]) {
    UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const Ints first = load(block.first + offset + v * LANES), last = load(block.last + offset + v * LANES);
        UNROLL
        for (int j = 0; j < TILE_KEYS; ++j) {
            const Ints now = broadcast(key + j);
            logits[j][v] = (first <= now) & (now <= last) ? logits[j][v] : broadcast(hidden);
        }
    }
}

constexpr int PIECE_KEYS = 64;

// The largest pieces of one kind, in order. Cells of TILE_KEYS keys and LANES rows that no row sees are in none.
template <int ROWS, class Visit>
ALWAYS_INLINE void for_each_piece(const RowBlock<ROWS>& block, Visit visit) {
    const int end = block.last[block.vectors * LANES - 1] + 1;
    int first_vector = 0, end_vector = 0;
    // Even, since keys are packed in pairs.
    int first = block.first[0] & ~1;
    while (first < end) {
        const auto kind_at = [&](int key) {
            Piece piece{key, key, first_vector, end_vector, false};
            while (piece.first_vector < block.vectors && block.last[piece.first_vector * LANES + LANES - 1] < key)
                ++piece.first_vector;
            while (piece.end_vector < block.vectors && block.first[piece.end_vector * LANES] < key + TILE_KEYS)
                ++piece.end_vector;
            piece.whole = piece.first_vector < piece.end_vector &&
                          block.all_see(piece.first_vector * LANES, piece.end_vector * LANES, key);
            return piece;
        };
        Piece piece = kind_at(first);
        first_vector = piece.first_vector, end_vector = piece.end_vector;
        for (piece.end += TILE_KEYS; piece.end < end && piece.end - first < PIECE_KEYS; piece.end += TILE_KEYS) {
            const Piece next = kind_at(piece.end);
            if (next.first_vector != first_vector || next.end_vector != end_vector || next.whole != piece.whole) break;
        }
        first = piece.end;
        if (first_vector < end_vector) visit(piece);
    }
}

}  // namespace windowed_attention::ISA
