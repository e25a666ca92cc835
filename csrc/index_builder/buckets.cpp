// A stable counting sort of documents by the bucket their length falls into.

#include "module.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// bounds: increasing; bucket k holds lengths in [bounds[k - 1], bounds[k]). Returns (documents, starts).
template <typename Length>
py::tuple bucket_by_length(const Array<Length>& lengths, const Integers& bounds) {
    const int64_t count = lengths.size(), buckets = bounds.size() + 1;
    Integers documents(count), starts(buckets + 1);
    const Length* length_of = lengths.data();
    const int64_t* bound = bounds.data();
    int64_t* sorted = documents.mutable_data();
    int64_t* start = starts.mutable_data();
    {
        const py::gil_scoped_release release;
        const auto bucket_of = [&](int64_t document) {
            return std::upper_bound(bound, bound + buckets - 1, static_cast<int64_t>(length_of[document])) - bound;
        };
        std::fill(start, start + buckets + 1, 0);
        for (int64_t d = 0; d < count; ++d) ++start[bucket_of(d) + 1];
        for (int64_t b = 0; b < buckets; ++b) start[b + 1] += start[b];
        std::vector<int64_t> next(start, start + buckets);
        for (int64_t d = 0; d < count; ++d) sorted[next[bucket_of(d)]++] = d;
    }
    return py::make_tuple(documents, starts);
}

}  // namespace

void bind_buckets(py::module_& module) {
    module.def("bucket_by_length", &bucket_by_length<int32_t>, py::arg("lengths").noconvert(), py::arg("bounds"));
    module.def("bucket_by_length", &bucket_by_length<int64_t>, py::arg("lengths").noconvert(), py::arg("bounds"));
}
