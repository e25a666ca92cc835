// From tensors to the layouts that `multiply` reads, and back.

#pragma once

#include "arithmetic.hpp"

namespace windowed_attention::ISA {

// Rows of packed matrices lie a cache line further apart than they are long: at a power of two, rows would fall into
// few sets of the cache.
constexpr int64_t ROW_PADDING = 16;

// Rows that the last tile of a panel may read beyond it, and half a pair.
constexpr int64_t PANEL_PADDING = TILE_KEYS + 1;

constexpr int64_t LONGEST_ROW = 256;
alignas(64) static const float zero_row[LONGEST_ROW] = {};

template <class Element>
ALWAYS_INLINE Element* at(const Tensor<Element>& x, int64_t b, int64_t position, int64_t head) {
    return x.data + b * x.strides.batch + position * x.strides.position + head * x.strides.head;
}

// Rows of a tensor at a constant distance: those of a key/value head.
template <class Element>
struct EvenRows {
    Element* first;
    int64_t step;

    ALWAYS_INLINE Element* operator[](int64_t i) const { return first + i * step; }
};

template <class Element>
ALWAYS_INLINE float dot(const Element* a, const Element* b, int64_t D) {
    Floats sums{};
    for (int64_t d = 0; d < D; d += LANES) sums = multiply_add(load(a + d), load(b + d), sums);
    return sum_of_lanes(sums);
}

// A row that is needed soon: rows lie too far apart for the processor to guess. Reaching beyond a tensor is harmless.
template <class Element>
ALWAYS_INLINE void prefetch(const Element* row, int64_t D) {
    constexpr int64_t CACHE_LINE = 64 / sizeof(Element);
    for (int64_t d = 0; d < D; d += CACHE_LINE) __builtin_prefetch(row + d);
    // An effect, for the compiler: GCC leaves out calls of functions that do nothing but prefetch.
    asm volatile("");
}

// While row i of `count` is packed.
template <class Element>
ALWAYS_INLINE void prefetch(const EvenRows<Element>& rows, int64_t i, int64_t count, int64_t D) {
    constexpr int64_t AHEAD = 32;
    if (i + AHEAD < count) prefetch(rows[i + AHEAD], D);
}

// Rows of a block, which were asked for while the block before was computed.
template <class Element>
ALWAYS_INLINE void prefetch(const Element* const*, int64_t, int64_t, int64_t) {}

// Counts the rows of a block while it is computed. With every tile it is the turn of a few of them, for which what is
// written next and what the next block reads is asked for: asked for all at once, the processor would stop and wait.
class Turns {
public:
    Turns(int rows, int64_t window, int block_rows)
        : rows_(rows), at_once_(static_cast<int>((block_rows * TILE_KEYS + window - 1) / window)) {}

    template <class Visit>
    ALWAYS_INLINE void next(Visit visit) {
        for (const int end = std::min(next_ + at_once_, rows_); next_ < end; ++next_) visit(next_);
    }

private:
    int rows_, at_once_, next_ = 0;
};

// Rows [i] as items along D: [rows][D / PACKED].
template <class Arithmetic, class Rows>
void pack_along_columns(const Rows& rows, int64_t count, int64_t D, float* to, int64_t step) {
    for (int64_t i = 0; i < count; ++i) {
        const auto* const from = rows[i];
        prefetch(rows, i, count, D);
        if constexpr (Arithmetic::PACKED == 2) {
            for (int64_t d = 0; d < D; d += 2 * LANES) {
                const auto* const pairs = reinterpret_cast<const float*>(from + std::min(d, D - 2 * LANES));
                store(to + i * step + std::min(d, D - 2 * LANES) / 2, load(pairs));
            }
        } else {
            for (int64_t d = 0; d < D; d += LANES) store(to + i * step + d, load(from + d));
        }
    }
}

// The same as items along the rows: [count / PACKED][D]; an odd last row is paired with zeros.
template <class Arithmetic, class Rows>
void pack_along_rows(const Rows& rows, int64_t count, int64_t D, float* to, int64_t step) {
    if constexpr (Arithmetic::PACKED == 1) {
        pack_along_columns<Arithmetic>(rows, count, D, to, step);
    } else {
        for (int64_t i = 0; i < count; i += 2, to += step) {
            const auto* const low = rows[i];
            prefetch(rows, i, count, D), prefetch(rows, i + 1, count, D);
            const auto* const high = i + 1 < count ? rows[i + 1] : reinterpret_cast<decltype(low)>(zero_row);
            for (int64_t d = 0; d < D; d += LANES) {
                // A bf16 that is loaded as a float has its bits in the high half.
                store(to + d, from_bits(bits(load(high + d)) | ((bits(load(low + d)) >> 16) & 0xffff)));
            }
        }
    }
}

// Two numbers of a tile's column, or one, as an item.
template <class Arithmetic, int VECTORS>
ALWAYS_INLINE Floats item_of(const Floats (&tile)[TILE_KEYS][VECTORS], int row, int v) {
    if constexpr (Arithmetic::PACKED == 2) {
        return from_bits(interleave(round_rows(tile[row][v], tile[row + 1][v])));
    } else {
        return tile[row][v];
    }
}

// A tile as items along its rows: [TILE_KEYS / PACKED][BLOCK_ROWS].
template <class Arithmetic, int BLOCK_ROWS, int VECTORS>
ALWAYS_INLINE void store_items(float* to, const Floats (&tile)[TILE_KEYS][VECTORS]) {
    UNROLL
    for (int j = 0; j < TILE_KEYS; j += Arithmetic::PACKED) {
        UNROLL
        for (int v = 0; v < VECTORS; ++v)
            store(to + j / Arithmetic::PACKED * BLOCK_ROWS + v * LANES, item_of<Arithmetic>(tile, j, v));
    }
}

// The same as items along its columns: [TILE_KEYS][BLOCK_ROWS / PACKED].
template <class Arithmetic, int BLOCK_ROWS, int VECTORS>
ALWAYS_INLINE void store_rows(float* to, const Floats (&tile)[TILE_KEYS][VECTORS]) {
    if constexpr (Arithmetic::PACKED == 1) {
        store_items<Arithmetic, BLOCK_ROWS>(to, tile);
    } else {
        constexpr int STEP = BLOCK_ROWS / Arithmetic::PACKED;
        UNROLL
        for (int j = 0; j < TILE_KEYS; j += 2) {
            UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                const auto rows = round_rows(tile[j][v], tile[j + 1][v]);
                float* const at = to + j * STEP + v * (LANES / 2);
                store_low_half(at, rows);
                store_high_half(at + STEP, rows);
            }
        }
    }
}

// Rows as columns, items along D: [D / PACKED][BLOCK_ROWS], for `vectors` * LANES rows.
template <class Arithmetic, int BLOCK_ROWS, class Element>
void pack_transposed(Element* const* rows, int vectors, int64_t D, float* to) {
    const int64_t items = D / Arithmetic::PACKED;
    for (int v = 0; v < vectors; ++v) {
        for (int64_t next = 0; next < items; next += LANES) {
            const int64_t item = std::min(next, items - LANES);  // the last ones again, where they don't divide
            Floats square[LANES];
            UNROLL
            for (int i = 0; i < LANES; ++i) {
                Element* const row = rows[v * LANES + i] + item * Arithmetic::PACKED;
                if constexpr (Arithmetic::PACKED == 2) {
                    square[i] = load(reinterpret_cast<const float*>(row));
                } else {
                    square[i] = load(row);
                }
            }
            transpose(square);
            UNROLL
            for (int i = 0; i < LANES; ++i) store(to + (item + i) * BLOCK_ROWS + v * LANES, square[i]);
        }
    }
}

// The way back: columns [D][BLOCK_ROWS] as rows [count][D].
template <int BLOCK_ROWS>
void unpack_transposed(const float* from, int count, int64_t D, float* to, int64_t step) {
    for (int first = 0; first < count; first += LANES) {
        for (int64_t d = 0; d < D; d += LANES) {
            Floats square[LANES];
            UNROLL
            for (int i = 0; i < LANES; ++i) square[i] = load(from + (d + i) * BLOCK_ROWS + first);
            transpose(square);
            for (int row = first; row < std::min(first + LANES, count); ++row)
                store(to + row * step + d, square[row - first]);
        }
    }
}

}  // namespace windowed_attention::ISA
