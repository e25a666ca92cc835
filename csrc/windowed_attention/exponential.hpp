// exp2 and tanh of vectors, by one polynomial.

#pragma once

#include "vector.hpp"

namespace windowed_attention::ISA {

constexpr float LOG2_E = 1.442695041f;
constexpr double LN_2 = 0.6931471805599453;

// x = n + f with n whole and |f| <= 1/2: 2^n and (2^f - 1) / f. x is at least -127, where 2^n is taken as 0.
struct PowerOfTwo {
    Floats whole, fraction, slope;

    // The slope is a minimax polynomial of DEGREE: relative error of 2^f is at most 1.8e-4 at degree 2, 2.2e-7 in
    // float32 arithmetic at 4 and 6.5e-8 at 5; at f = 0 it is exact. Not-a-number and infinity give not-a-number.
    template <int DEGREE>
    static ALWAYS_INLINE PowerOfTwo of(Floats x) {
        // Adding 1.5 * 2^23 rounds to a whole number, and 127 makes the low bits the exponent of 2^n.
        const Floats shift = broadcast(12582912.0f + 127.0f);
        const Floats shifted = x + shift;
        const Floats f = x - (shifted - shift);
        constexpr float degree2[] = {6.931783036e-01f, 2.420288597e-01f, 5.550396434e-02f};
        constexpr float degree4[] = {6.931471435e-01f, 2.402235134e-01f, 5.550500201e-02f, 9.666245435e-03f,
                                     1.333354318e-03f};
        constexpr float degree5[] = {6.931471879e-01f, 2.402264980e-01f, 5.550357434e-02f, 9.618237480e-03f,
                                     1.339073543e-03f, 1.540351753e-04f};
        const float* const coefficients = DEGREE == 2 ? degree2 : DEGREE == 4 ? degree4 : degree5;
        Floats slope = broadcast(coefficients[DEGREE]);
        UNROLL
        for (int i = DEGREE - 1; i >= 0; --i) slope = multiply_add(slope, f, broadcast(coefficients[i]));
        return {from_bits(bits(shifted) << 23), f, slope};
    }

    ALWAYS_INLINE Floats value() const { return multiply_add(whole * fraction, slope, whole); }
};

// The least number that exp2 takes: its result is 0.
constexpr float VANISHING = -127.0f;

template <int DEGREE>
ALWAYS_INLINE Floats exp2(Floats x) {
    return PowerOfTwo::of<DEGREE>(x).value();
}

// The same, with 0 for anything less.
template <int DEGREE>
ALWAYS_INLINE Floats vanishing_exp2(Floats x) {
    return exp2<DEGREE>(maximum(broadcast(VANISHING), x));
}

// (e^2x - 1) / (e^2x + 1), where e^2x - 1 is formed without cancellation: a small x keeps its relative accuracy.
ALWAYS_INLINE Floats tanh(Floats x) {
    const Floats magnitude = from_bits(bits(x) & 0x7fffffff);
    // Beyond 10 the result rounds to 1.
    const Floats bounded = magnitude > 10.0f ? broadcast(10.0f) : magnitude;
    const PowerOfTwo power = PowerOfTwo::of<5>(bounded * 2.885390082f);
    const Floats minus_one = multiply_add(power.whole * power.fraction, power.slope, power.whole - 1.0f);
    const Floats result = minus_one / (minus_one + 2.0f);
    return from_bits(bits(result) | (bits(x) & static_cast<int32_t>(0x80000000)));
}

}  // namespace windowed_attention::ISA
