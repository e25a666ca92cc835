// Best-fit decreasing packing ("Fewer Truncations Improve Language Modeling", Ding et al. 2024, arXiv:2404.10830).
//
// The open bins are kept by the space left in them: a bitmap says which spaces occur, a stack per space holds its bins.
// An item costs one search in the bitmap, four words deep at a capacity of 2^24, whatever the number of bins. Bins have
// 32-bit numbers: at large capacities most of the time goes into touching the stacks' memory. The twin of
// megazebra/data/index/best_fit.py, which explains the result.

#include "module.hpp"

#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

namespace {

// A set of integers in [0, size): 64 to a word, and above each level another that marks its words which aren't empty.
class IntegerSet {
public:
    explicit IntegerSet(int64_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    // Returns whether the value is new.
    bool insert(int64_t value) {
        for (size_t level = 0; level < levels_.size(); ++level, value >>= 6) {
            uint64_t& word = levels_[level][value >> 6];
            const bool was_empty = word == 0;
            const uint64_t bit = uint64_t{1} << (value & 63);
            if (level == 0 && (word & bit)) return false;
            word |= bit;
            if (!was_empty) break;
        }
        return true;
    }

    void erase(int64_t value) {
        for (auto& level : levels_) {
            uint64_t& word = level[value >> 6];
            word &= ~(uint64_t{1} << (value & 63));
            if (word != 0) break;
            value >>= 6;
        }
    }

    // The smallest member >= value, -1 when there is none.
    int64_t ceiling(int64_t value) const {
        for (size_t level = 0; level < levels_.size(); ++level) {
            const size_t index = value >> 6;
            if (index >= levels_[level].size()) return -1;
            const uint64_t rest = levels_[level][index] >> (value & 63);
            if (rest != 0) {
                value += __builtin_ctzll(rest);
                while (level-- > 0) value = (value << 6) + __builtin_ctzll(levels_[level][value]);
                return value;
            }
            value = (value >> 6) + 1;
        }
        return -1;
    }

private:
    std::vector<std::vector<uint64_t>> levels_;
};

// The bins with space left in them.
class OpenBins {
public:
    // remainder: the room in bin 0, which is open from the start; 0: there is no such bin.
    OpenBins(int64_t capacity, int64_t remainder)
        : capacity_(capacity), spaces_(capacity), newest_(new int32_t[capacity]) {
        if (remainder > 0) {
            below_.push_back(NONE);
            push(0, remainder);
        }
    }

    // How many bins were opened.
    int32_t count() const { return static_cast<int32_t>(below_.size()); }

    // Puts an item into the bin with the least space that holds it, of several the one that came to this space last,
    // else into a new one. Returns the bin; bins are numbered as they are opened.
    int32_t put(int64_t length) {
        int64_t space = spaces_.ceiling(length);
        int32_t bin;
        if (space < 0) {
            space = capacity_;
            bin = count();
            below_.push_back(NONE);
        } else {
            bin = newest_[space];
            if (below_[bin] == NONE) {
                spaces_.erase(space);
            } else {
                newest_[space] = below_[bin];
            }
        }
        if (space > length) push(bin, space - length);
        return bin;
    }

private:
    static constexpr int32_t NONE = -1;

    void push(int32_t bin, int64_t space) {
        below_[bin] = spaces_.insert(space) ? NONE : newest_[space];
        newest_[space] = bin;
    }

    int64_t capacity_;
    IntegerSet spaces_;
    std::unique_ptr<int32_t[]> newest_;  // per member of spaces_: the top of its stack of bins; not set elsewhere
    std::vector<int32_t> below_;         // per bin: the one under it in its stack
};

struct Item {
    int64_t length, number;
};

// The items by decreasing length, equal ones by number: a radix sort, least significant digit first.
std::vector<Item> by_decreasing_length(const int64_t* lengths, int64_t count, int64_t capacity) {
    constexpr int digit_bits = 11;
    constexpr int64_t digits = int64_t{1} << digit_bits;
    std::vector<Item> items(count), sorted(count);
    for (int64_t i = 0; i < count; ++i) items[i] = {lengths[i], i};
    for (int shift = 0; capacity >> shift > 0; shift += digit_bits) {
        const auto digit = [&](const Item& item) { return ((capacity - item.length) >> shift) & (digits - 1); };
        int64_t next[digits + 1] = {};
        for (const Item& item : items) ++next[digit(item) + 1];
        std::partial_sum(next, next + digits, next);
        for (const Item& item : items) sorted[next[digit(item)]++] = item;
        items.swap(sorted);
    }
    return items;
}

// lengths: from 1 to capacity, fewer than 2^31. remainder: less than capacity. Returns (items, starts): bins in the
// order of their first items, whose items increase; the bin of the remainder comes first.
py::tuple pack_best_fit(const Integers& lengths, int64_t capacity, int64_t remainder) {
    const int64_t count = lengths.size();
    Integers items(count);
    int64_t* grouped = items.mutable_data();
    const int64_t* length_of = lengths.data();
    std::vector<int64_t> starts;
    {
        const py::gil_scoped_release release;
        std::vector<int32_t> bin_of(count);
        OpenBins open_bins(capacity, remainder);
        for (const auto [length, number] : by_decreasing_length(length_of, count, capacity)) {
            bin_of[number] = open_bins.put(length);
        }
        std::vector<int32_t> place(open_bins.count(), -1);
        starts.assign(place.size() + 1, 0);
        int32_t placed = 0;
        if (remainder > 0) place[0] = placed++;
        for (int32_t& bin : bin_of) {
            if (place[bin] < 0) place[bin] = placed++;
            bin = place[bin];
            ++starts[bin + 1];
        }
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        std::vector<int64_t> next(starts);
        for (int64_t i = 0; i < count; ++i) grouped[next[bin_of[i]]++] = i;
    }
    return py::make_tuple(items, Integers(static_cast<py::ssize_t>(starts.size()), starts.data()));
}

}  // namespace

void bind_packing(py::module_& module) {
    module.def("pack_best_fit", &pack_best_fit, py::arg("lengths").noconvert(), py::arg("capacity"),
               py::arg("remainder"));
}
