// What document boundaries do to a sample: positions begin anew behind them, and no label reaches across one.

#include "module.hpp"

#include <cstdint>
#include <numeric>

namespace {

// 0, 1, ... for every piece in turn.
void count_up(const Integers& lengths, int64_t* position) {
    const int64_t* end = lengths.data() + lengths.size();
    for (const int64_t* length = lengths.data(); length < end; position += *length++)
        std::iota(position, position + *length, int64_t{0});
}

// lengths: int64 [n], adding up to the result's size.
Integers document_positions(const Integers& lengths) {
    Integers positions(std::accumulate(lengths.data(), lengths.data() + lengths.size(), int64_t{0}));
    int64_t* position = positions.mutable_data();
    const py::gil_scoped_release release;
    count_up(lengths, position);
    return positions;
}

// line: int64 [L + 1] of pieces of these lengths. The labels of its first L tokens, `ignore` where a piece ends, and
// the positions of all L + 1.
py::tuple labels_and_positions(const Integers& line, const Integers& lengths, int64_t ignore) {
    const int64_t count = line.size() - 1;
    Integers labels(count), positions(count + 1);
    const int64_t* following = line.data() + 1;
    int64_t *label = labels.mutable_data(), *position = positions.mutable_data();
    {
        const py::gil_scoped_release release;
        // Not memmove: for arrays of this size it takes ten times as long where the two lie 8 bytes apart modulo
        // 4096, as malloc likes to lay them. setup.py keeps the compiler from putting it here.
        for (int64_t i = 0; i < count; ++i) label[i] = following[i];
        int64_t end = 0;
        for (int64_t piece = 0; piece + 1 < lengths.size(); ++piece) {
            end += lengths.data()[piece];
            label[end - 1] = ignore;
        }
        count_up(lengths, position);
    }
    return py::make_tuple(labels, positions);
}

}  // namespace

void bind_boundaries(py::module_& module) {
    module.def("document_positions", &document_positions, py::arg("lengths"));
    module.def("labels_and_positions", &labels_and_positions, py::arg("line"), py::arg("lengths"), py::arg("ignore"));
}
