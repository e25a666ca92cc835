// What document boundaries do to a sample: positions begin anew behind them, and no label reaches across one.

#include "module.hpp"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace {

using Integers = py::array_t<int64_t, py::array::c_style>;

// lengths: int64 [n], adding up to the result's size.
Integers document_positions(const Integers& lengths) {
    const int64_t* length = lengths.data();
    const int64_t* end = length + lengths.size();
    Integers positions(std::accumulate(length, end, int64_t{0}));
    int64_t* position = positions.mutable_data();
    const py::gil_scoped_release release;
    for (; length < end; position += *length++) std::iota(position, position + *length, int64_t{0});
    return positions;
}

// line: int64 [L + 1] of pieces of these lengths; the labels of its first L tokens, `ignore` where a piece ends.
Integers chunk_labels(const Integers& line, const Integers& lengths, int64_t ignore) {
    Integers labels(line.size() - 1);
    int64_t* label = labels.mutable_data();
    const py::gil_scoped_release release;
    std::copy(line.data() + 1, line.data() + line.size(), label);
    int64_t position = 0;
    for (int64_t piece = 0; piece + 1 < lengths.size(); ++piece) {
        position += lengths.data()[piece];
        label[position - 1] = ignore;
    }
    return labels;
}

}  // namespace

void bind_boundaries(py::module_& module) {
    module.def("document_positions", &document_positions, py::arg("lengths"));
    module.def("chunk_labels", &chunk_labels, py::arg("line"), py::arg("lengths"), py::arg("ignore"));
}
