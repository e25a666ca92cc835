// Keyed bijections of [0, size) that store nothing: the twin of megazebra/data/index/permutation.py, explained there.

#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <vector>

constexpr int FEISTEL_ROUNDS = 8;
constexpr int FEISTEL_MIN_BITS = 6;

inline uint64_t splitmix64(uint64_t state) {
    state += 0x9E3779B97F4A7C15;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB;
    return state ^ (state >> 31);
}

inline uint64_t derive_key(std::initializer_list<uint64_t> parts) {
    uint64_t key = 0;
    for (uint64_t part : parts) key = splitmix64(key ^ splitmix64(part));
    return key;
}

class KeyedPermutation {
public:
    KeyedPermutation(uint64_t size, uint64_t key) : size_(size) {
        int bits = FEISTEL_MIN_BITS;
        while (bits < 64 && (size - 1) >> bits) ++bits;
        left_bits_ = bits / 2;
        right_bits_ = bits - left_bits_;
        for (int round = 0; round < FEISTEL_ROUNDS; ++round) {
            round_keys_[round] = derive_key({key, static_cast<uint64_t>(round)});
        }
    }

    // The image of one value.
    uint64_t operator()(uint64_t value) const {
        return walk(value, [this](int round, uint64_t half) { return splitmix64(round_keys_[round] + half); });
    }

    // Calls visit(image) for value = 0, 1, ... until it returns false. The halves take few values, so the round
    // function is tabulated for each: a lookup where the single value pays a hash.
    template <class Visit>
    void for_each(Visit visit) const {
        std::vector<uint32_t> table(FEISTEL_ROUNDS << right_bits_);
        for (int round = 0; round < FEISTEL_ROUNDS; ++round) {
            for (uint64_t half = 0; half < 1ULL << right_bits_; ++half) {
                table[(round << right_bits_) + half] = static_cast<uint32_t>(splitmix64(round_keys_[round] + half));
            }
        }
        for (uint64_t value = 0; value < size_; ++value) {
            const auto lookup = [&](int round, uint64_t half) { return table[(round << right_bits_) + half]; };
            if (!visit(walk(value, lookup))) return;
        }
    }

private:
    template <class RoundFunction>
    uint64_t walk(uint64_t value, RoundFunction round_function) const {
        const uint64_t left_mask = (1ULL << left_bits_) - 1, right_mask = (1ULL << right_bits_) - 1;
        do {
            uint64_t left = value >> right_bits_, right = value & right_mask;
            for (int round = 0; round < FEISTEL_ROUNDS; round += 2) {
                right ^= round_function(round, left) & right_mask;
                left ^= round_function(round + 1, right) & left_mask;
            }
            value = left << right_bits_ | right;
        } while (value >= size_);
        return value;
    }

    uint64_t size_;
    int left_bits_, right_bits_;
    std::array<uint64_t, FEISTEL_ROUNDS> round_keys_;
};
