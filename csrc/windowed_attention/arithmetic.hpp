// The two ways of multiplying matrices, behind one interface, and the one loop that does it.
//
// Operands are packed into items of four bytes: a float, or two neighbours along the summed dimension in bf16. So the
// same loop serves both: it broadcasts an item of one matrix and multiplies it with vectors of items of the other.

#pragma once

#include "vector.hpp"

namespace windowed_attention::ISA {

struct Fp32 {
    static constexpr int PACKED = 1;      // numbers in an item
    static constexpr int EXP2_DEGREE = 4;

    static ALWAYS_INLINE Floats accumulate(Floats sum, Floats a, Floats b) { return multiply_add(a, b, sum); }
    static ALWAYS_INLINE Floats ones() { return broadcast(1.0f); }
};

#if defined(ISA_BF16)
// bf16 products summed in float32, two at a time.
struct Bf16Pairs {
    static constexpr int PACKED = 2;
    static constexpr int EXP2_DEGREE = 2;  // the result is rounded to bf16

    static ALWAYS_INLINE Floats accumulate(Floats sum, Floats a, Floats b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static ALWAYS_INLINE Floats ones() { return from_bits(broadcast(0x3f803f80)); }
};
#endif

// sums[r][v] = sum of a[r * row_step + i * item_step] * b[i * b_step + v * LANES ...] over i < items.
//
// Sums start at zero in registers; callers add them to memory: short sums of sums round less than one long sum.
template <class Arithmetic, int ROWS, int VECTORS>
ALWAYS_INLINE void multiply(const float* a, int64_t row_step, int64_t item_step, const float* b, int64_t b_step,
                            int64_t items, Floats (&sums)[ROWS][VECTORS]) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = Floats{};
    }
    for (int64_t i = 0; i < items; ++i) {
        Floats columns[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; ++v) columns[v] = load(b + i * b_step + v * LANES);
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const Floats item = broadcast(a[r * row_step + i * item_step]);
            UNROLL
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = Arithmetic::accumulate(sums[r][v], item, columns[v]);
        }
    }
}

ALWAYS_INLINE void add_to(float* to, Floats x) { store(to, load(to) + x); }

template <int ROWS, int VECTORS>
ALWAYS_INLINE void add_to(float* to, int64_t row_step, const Floats (&sums)[ROWS][VECTORS]) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            add_to(to + r * row_step + v * LANES, sums[r][v]);
        }
    }
}

// x = function(x) for every vector of a tile.
template <int ROWS, int VECTORS, class Function>
ALWAYS_INLINE void transform(Floats (&tile)[ROWS][VECTORS], Function function) {
    UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) tile[r][v] = function(tile[r][v], v);
    }
}

// Calls visit(std::integral_constant<int, n>) for the n in 1..LARGEST that it is given.
template <int LARGEST, class Visit>
ALWAYS_INLINE void with_constant(int n, Visit visit) {
    if constexpr (LARGEST > 1) {
        if (n < LARGEST) return with_constant<LARGEST - 1>(n, visit);
    }
    visit(std::integral_constant<int, LARGEST>());
}

}  // namespace windowed_attention::ISA
