// The default order's kernels: token counts of blocks of documents, keyed permutations, and the pieces of a sample.
// The twin of megazebra/data/index/{documents,permutation,order}.py, explained there.

#include "feistel.hpp"
#include "module.hpp"
#include "pieces.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <type_traits>

namespace {

// int64 [blocks + 1]: where each block of neighbouring documents begins, and the end of the last.
template <typename Length>
py::array_t<int64_t> block_starts(const Array<Length>& lengths, int64_t block_documents) {
    // Lengths aren't negative: widened as unsigned, which needs half the instructions before AVX.
    using Unsigned = std::make_unsigned_t<Length>;
    const Length* length = lengths.data();
    return lay_blocks(lengths.size(), block_documents, [length](int64_t first, int64_t last) {
        uint64_t tokens = 0;
        for (int64_t d = first; d < last; ++d) tokens += static_cast<Unsigned>(length[d]);
        return static_cast<int64_t>(tokens);
    });
}

uint64_t permute(uint64_t size, uint64_t key, uint64_t value) { return KeyedPermutation(size, key)(value); }

py::array_t<int64_t> permute_all(uint64_t size, uint64_t key) {
    py::array_t<int64_t> result(size);
    int64_t* image = result.mutable_data();
    const py::gil_scoped_release release;
    KeyedPermutation(size, key).for_each([&](uint64_t value) {
        *image++ = static_cast<int64_t>(value);
        return true;
    });
    return result;
}

// What lies at tokens [position, position + length) of an epoch: `blocks` uint32 in its order, `starts` int64
// [blocks + 1] their token positions. key: what the documents inside blocks are shuffled by; None leaves them.
// Microseconds: keeping the GIL is cheaper than to wait for it again.
template <typename Length>
py::tuple locate(const Array<Length>& lengths, const Array<uint32_t>& blocks, const Array<int64_t>& starts,
                 int64_t block_documents, std::optional<uint64_t> key, int64_t position, int64_t length) {
    const int64_t documents = lengths.size();
    py::ssize_t slot = block_at(starts, position);
    PieceCutter cutter(position - starts.at(slot), length);
    for (; !cutter.done(); ++slot) {
        const int64_t block = blocks.at(slot), first = block * block_documents;
        const int64_t count = std::min(block_documents, documents - first);
        const Length* block_lengths = lengths.data() + first;
        const auto lay = [&](int64_t member) { return cutter.lay(first + member, block_lengths[member]); };
        if (key) {
            KeyedPermutation(count, derive_key({*key, static_cast<uint64_t>(block)})).for_each(lay);
        } else {
            for (int64_t member = 0; member < count && lay(member);) ++member;
        }
    }
    return cutter.pieces();
}

template <typename Length>
void bind_lengths(py::module_& module) {
    module.def("block_starts", &block_starts<Length>, py::arg("lengths").noconvert(), py::arg("block_documents"));
    module.def("locate", &locate<Length>, py::arg("lengths").noconvert(), py::arg("blocks").noconvert(),
               py::arg("starts").noconvert(), py::arg("block_documents"), py::arg("key"), py::arg("position"),
               py::arg("length"));
}

}  // namespace

void bind_block_order(py::module_& module) {
    bind_lengths<int32_t>(module);
    bind_lengths<int64_t>(module);
    module.def("permute", &permute, py::arg("size"), py::arg("key"), py::arg("value"));
    module.def("permute_all", &permute_all, py::arg("size"), py::arg("key"));
}
