// Which samples of a step each data-parallel rank takes; megazebra/data/index/balance.py explains the rule.

#include "module.hpp"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

namespace {

using RankByTotal = std::pair<double, int64_t>;
using LeastTotalFirst = std::priority_queue<RankByTotal, std::vector<RankByTotal>, std::greater<RankByTotal>>;

// costs: [n], finite, n a multiple of ranks * micro_batch_size. Returns [ranks, n / ranks].
py::array_t<int64_t> balance(const Array<double>& costs, int64_t ranks, int64_t micro_batch_size) {
    const int64_t count = costs.size(), per_rank = count / ranks, chunk = ranks * micro_batch_size;
    py::array_t<int64_t> dealt({ranks, per_rank});
    const double* cost = costs.data();
    int64_t* samples_of = dealt.mutable_data();
    {
        const py::gil_scoped_release release;
        std::vector<int64_t> order(count);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
        std::vector<double> totals(ranks, 0.0);
        std::vector<int64_t> taken(ranks, 0);
        for (int64_t first = 0; first < count; first += chunk) {
            LeastTotalFirst with_room;
            for (int64_t rank = 0; rank < ranks; ++rank) with_room.emplace(totals[rank], rank);
            for (int64_t i = first; i < first + chunk; ++i) {
                const int64_t rank = with_room.top().second;
                with_room.pop();
                samples_of[rank * per_rank + taken[rank]++] = order[i];
                totals[rank] += cost[order[i]];
                if (taken[rank] % micro_batch_size != 0) with_room.emplace(totals[rank], rank);
            }
        }
    }
    return dealt;
}

}  // namespace

void bind_balance(py::module_& module) {
    module.def("balance", &balance, py::arg("costs").noconvert(), py::arg("ranks"), py::arg("micro_batch_size"));
}
