// Walks a blend's tree from the root to the source of each sample; megazebra/data/index/blend.py builds the tree.

#include "module.hpp"

#include <cstdint>

namespace {

__extension__ typedef unsigned __int128 uint128_t;

// round(samples * part / whole), halves up. samples <= 2^62, part <= whole < 2^62.
int64_t share(int64_t samples, int64_t part, int64_t whole) {
    return static_cast<int64_t>((2 * static_cast<uint128_t>(samples) * part + whole) / (2 * whole));
}

// children: [sources - 1, 2], of the nodes from `sources` on; weights: of all nodes; the last one is the root.
// Returns (sources, indices) of the samples from `first` on.
py::tuple blend_locate(const Integers& children, const Integers& weights, int64_t first, int64_t count) {
    Integers sources(count), indices(count);
    const int64_t* child = children.data();
    const int64_t* weight = weights.data();
    const int64_t source_count = (weights.size() + 1) / 2, root = weights.size() - 1;
    int64_t* source = sources.mutable_data();
    int64_t* index = indices.mutable_data();
    {
        const py::gil_scoped_release release;
        for (int64_t i = 0; i < count; ++i) {
            int64_t node = root, sample = first + i;
            while (node >= source_count) {
                const int64_t* pair = child + 2 * (node - source_count);
                const int64_t left = share(sample, weight[pair[0]], weight[node]);
                const bool goes_left = share(sample + 1, weight[pair[0]], weight[node]) > left;
                sample = goes_left ? left : sample - left;
                node = pair[goes_left ? 0 : 1];
            }
            source[i] = node;
            index[i] = sample;
        }
    }
    return py::make_tuple(sources, indices);
}

}  // namespace

void bind_blend(py::module_& module) {
    module.def("blend_locate", &blend_locate, py::arg("children").noconvert(), py::arg("weights").noconvert(),
               py::arg("first"), py::arg("count"));
}
