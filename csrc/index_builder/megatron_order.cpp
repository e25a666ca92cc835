// Megatron's order: numpy's legacy generator and its shuffle, bit for bit, and sample positions in shuffled documents.
// The twin of numpy.random.RandomState and of megazebra/data/index/megatron_order.py.

#include "module.hpp"
#include "pieces.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace {

// Into the second-level cache, where more misses may be under way at once than in the first.
void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// MT19937 (Matsumoto and Nishimura 1998). std::mt19937 gives the same numbers at a quarter of the speed: here the
// 624 of a turn are made at once, in loops that the compiler vectorizes.
class RandomState {
public:
    explicit RandomState(uint32_t seed) {
        state_[0] = seed;
        for (uint32_t i = 1; i < N; ++i) state_[i] = 1812433253U * (state_[i - 1] ^ (state_[i - 1] >> 30)) + i;
    }

    // Fisher-Yates from the top, each partner the first of the masked draws that is not beyond its element. Partners
    // are drawn ahead, so that their memory is fetched in parallel, and rejected without a branch.
    template <typename T>
    void shuffle(Array<T>& array) {
        if (array.ndim() != 1) throw py::value_error("an array of one dimension is needed");
        T* values = array.mutable_data();
        const auto size = static_cast<uint64_t>(array.size());
        if (size > uint64_t{1} << 32) throw py::value_error("partners are drawn of 32 bits");
        const py::gil_scoped_release release;
        std::array<uint32_t, 1024> partners;
        uint32_t mask = ~uint32_t{0};
        for (uint64_t top = size - 1; size > 0 && top > 0;) {
            while (mask >> 1 >= top) mask >>= 1;
            const uint64_t same_mask = top - (mask >> 1);
            const uint64_t count = std::min<uint64_t>(partners.size(), same_mask);
            for (uint64_t drawn = 0; drawn < count;) {
                partners[drawn] = next() & mask;
                drawn += partners[drawn] <= top - drawn;
            }
            for (uint64_t i = 0; i < count; ++i) prefetch(values + partners[i]);
            for (uint64_t i = 0; i < count; ++i, --top) std::swap(values[top], values[partners[i]]);
        }
    }

private:
    static constexpr uint32_t N = 624, M = 397;

    uint32_t next() {
        if (used_ == N) refill();
        return numbers_[used_++];
    }

    static uint32_t twist(uint32_t upper, uint32_t lower) {
        const uint32_t mixed = (upper & 0x80000000U) | (lower & 0x7FFFFFFFU);
        return (mixed >> 1) ^ (-(lower & 1U) & 0x9908B0DFU);
    }

    void refill() {
        for (uint32_t i = 0; i < N - M; ++i) state_[i] = state_[i + M] ^ twist(state_[i], state_[i + 1]);
        for (uint32_t i = N - M; i < N - 1; ++i) state_[i] = state_[i + M - N] ^ twist(state_[i], state_[i + 1]);
        state_[N - 1] = state_[M - 1] ^ twist(state_[N - 1], state_[0]);
        for (uint32_t i = 0; i < N; ++i) {
            uint32_t number = state_[i];
            number ^= number >> 11;
            number ^= (number << 7) & 0x9D2C5680U;
            number ^= (number << 15) & 0xEFC60000U;
            numbers_[i] = number ^ (number >> 18);
        }
        used_ = 0;
    }

    std::array<uint32_t, N> state_, numbers_;
    uint32_t used_ = N;
};

// int64 [blocks + 1]: token positions of every `block_documents` entries of `documents`, and the end of the last.
template <typename Length>
py::array_t<int64_t> listed_block_starts(const Array<Length>& lengths, const Array<int32_t>& documents,
                                         int64_t block_documents) {
    const Length* length = lengths.data();
    const int32_t* document = documents.data();
    const int64_t count = documents.size();
    return lay_blocks(count, block_documents, [=](int64_t first, int64_t last) {
        const int64_t next = std::min(last + block_documents, count);
        for (int64_t i = last; i < next; ++i) prefetch(length + document[i]);
        int64_t tokens = 0;
        for (int64_t i = first; i < last; ++i) tokens += length[document[i]];
        return tokens;
    });
}

// What lies at tokens [position, position + length) of `documents` laid end to end.
template <typename Length>
py::tuple locate_listed(const Array<Length>& lengths, const Array<int32_t>& documents, const Array<int64_t>& starts,
                        int64_t block_documents, int64_t position, int64_t length) {
    const py::ssize_t block = block_at(starts, position);
    PieceCutter cutter(position - starts.at(block), length);
    for (int64_t i = block * block_documents; !cutter.done(); ++i) {
        const int32_t document = documents.at(i);
        cutter.lay(document, lengths.data()[document]);
    }
    return cutter.pieces();
}

template <typename Length>
void bind_lengths(py::module_& module) {
    module.def("listed_block_starts", &listed_block_starts<Length>, py::arg("lengths").noconvert(),
               py::arg("documents").noconvert(), py::arg("block_documents"));
    module.def("locate_listed", &locate_listed<Length>, py::arg("lengths").noconvert(),
               py::arg("documents").noconvert(), py::arg("starts").noconvert(), py::arg("block_documents"),
               py::arg("position"), py::arg("length"));
}

}  // namespace

void bind_megatron_order(py::module_& module) {
    bind_lengths<int32_t>(module);
    bind_lengths<int64_t>(module);
    py::class_<RandomState>(module, "RandomState", "numpy.random.RandomState's seeding and shuffle")
        .def(py::init<uint32_t>(), py::arg("seed"))
        .def("shuffle", &RandomState::shuffle<int32_t>, py::arg("array").noconvert())
        .def("shuffle", &RandomState::shuffle<uint32_t>, py::arg("array").noconvert());
}
