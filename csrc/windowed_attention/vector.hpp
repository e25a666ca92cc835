// A vector of floats, in the widest registers of the instruction set that this file is compiled for.
//
// Most of it is the vector extension of GCC and Clang; intrinsics stand only where that has no word.

#pragma once

#include "problem.hpp"

namespace windowed_attention::ISA {

#if defined(ISA_AVX512)
constexpr int LANES = 16;
// Register tiles are TILE_KEYS rows of up to TILE_VECTORS vectors: 24 of 32 registers hold sums.
constexpr int TILE_KEYS = 8, TILE_VECTORS = 3;
#elif defined(ISA_AVX2)
constexpr int LANES = 8;
constexpr int TILE_KEYS = 4, TILE_VECTORS = 3;  // 12 of 16 registers
#else
constexpr int LANES = 4;
constexpr int TILE_KEYS = 4, TILE_VECTORS = 2;
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
// Arrays of vectors are registers only where every index is a constant.
#define UNROLL _Pragma("GCC unroll 16")

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
// Aligned as what is read through it: floats, or pairs of bf16.
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t UnalignedInts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

ALWAYS_INLINE Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
ALWAYS_INLINE void store(float* to, Floats x) { *reinterpret_cast<UnalignedFloats*>(to) = x; }
ALWAYS_INLINE Ints load(const int32_t* from) { return *reinterpret_cast<const UnalignedInts*>(from); }
ALWAYS_INLINE Ints bits(Floats x) { return reinterpret_cast<Ints>(x); }
ALWAYS_INLINE Floats from_bits(Ints x) { return reinterpret_cast<Floats>(x); }

ALWAYS_INLINE Floats broadcast(float x) {
#if defined(ISA_AVX512)
    return _mm512_set1_ps(x);
#elif defined(ISA_AVX2)
    return _mm256_set1_ps(x);
#else
    return x - Floats{};
#endif
}

ALWAYS_INLINE Ints broadcast(int32_t x) { return x - Ints{}; }

// a * b + c
ALWAYS_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(ISA_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(ISA_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// The second where one is not a number.
ALWAYS_INLINE Floats maximum(Floats a, Floats b) {
#if defined(ISA_AVX512)
    return _mm512_max_ps(a, b);
#elif defined(ISA_AVX2)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

ALWAYS_INLINE bool any_greater(Floats a, Floats b) {
#if defined(ISA_AVX512)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(ISA_AVX2)
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
    const Ints greater = a > b;
    int32_t any = 0;
    for (int i = 0; i < LANES; ++i) any |= greater[i];
    return any != 0;
#endif
}

ALWAYS_INLINE Floats load(const Bf16* from) {
    const Halves x = *reinterpret_cast<const UnalignedHalves*>(from);
    return from_bits(__builtin_convertvector(x, Ints) << 16);
}

// Rounded to the nearest, ties to even; not-a-number stays so.
ALWAYS_INLINE void store(Bf16* to, Floats x) {
#if defined(ISA_BF16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
    const Ints odd = (bits(x) >> 16) & 1;
    const Ints rounded = (bits(x) + 0x7fff + odd) >> 16;
    const Ints quiet = (bits(x) >> 16) | 0x40;
    const Ints kept = x == x ? rounded : quiet;
    *reinterpret_cast<UnalignedHalves*>(to) = __builtin_convertvector(kept, Halves);
#endif
}

#if defined(ISA_BF16)
// Two rows of numbers rounded to bf16: the first row in the low half.
ALWAYS_INLINE __m512i round_rows(Floats first, Floats second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// ... and the two numbers of each lane beside each other, the first row's in the low bits.
ALWAYS_INLINE Ints interleave(__m512i rows) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<Ints>(_mm512_permutexvar_epi16(_mm512_load_si512(order), rows));
}

ALWAYS_INLINE void store_low_half(float* to, __m512i rows) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(rows));
}

ALWAYS_INLINE void store_high_half(float* to, __m512i rows) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_extracti64x4_epi64(rows, 1));
}
#endif

template <int... INDEX>
ALWAYS_INLINE Floats shuffle(Floats a, Floats b, std::integer_sequence<int, INDEX...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, INDEX...);
#else
    return __builtin_shuffle(a, b, Ints{INDEX...});
#endif
}

template <int ROTATE, int... INDEX>
ALWAYS_INLINE Floats rotate(Floats x, std::integer_sequence<int, INDEX...>) {
    return shuffle(x, x, std::integer_sequence<int, ((INDEX + ROTATE) % LANES)...>());
}

template <int WIDTH = LANES / 2>
ALWAYS_INLINE float sum_of_lanes(Floats x) {
    if constexpr (WIDTH == 0) {
        return x[0];
    } else {
        return sum_of_lanes<WIDTH / 2>(x + rotate<WIDTH>(x, std::make_integer_sequence<int, LANES>()));
    }
}

// a0 b0 a1 b1 ... of the first halves, or of the second ones.
template <int OFFSET, int... INDEX>
ALWAYS_INLINE Floats interleave_halves(Floats a, Floats b, std::integer_sequence<int, INDEX...>) {
    return shuffle(a, b, std::integer_sequence<int, (OFFSET + INDEX / 2 + (INDEX % 2) * LANES)...>());
}

// In place: LANES vectors as the rows of a square matrix become its columns.
ALWAYS_INLINE void transpose(Floats (&rows)[LANES]) {
    // Each round interleaves rows i and i + LANES / 2: after log2(LANES) rounds rows and columns have changed places.
    using Lanes = std::make_integer_sequence<int, LANES>;
    Floats next[LANES];
    UNROLL
    for (int round = 1; round < LANES; round *= 2) {
        UNROLL
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = interleave_halves<0>(rows[i], rows[i + LANES / 2], Lanes());
            next[2 * i + 1] = interleave_halves<LANES / 2>(rows[i], rows[i + LANES / 2], Lanes());
        }
        UNROLL
        for (int i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}

}  // namespace windowed_attention::ISA
