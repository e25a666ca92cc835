// The Python module of the index builder: one bind_*() per source file, documented there.

#include "module.hpp"

PYBIND11_MODULE(_index_builder, module) {
    module.doc() = "Compiled kernels of megazebra.data.index; their numpy twins stand beside the callers there.";
    module.attr("sources") = SOURCES_DIGEST;
    bind_block_order(module);
    bind_gather(module);
    bind_megatron_order(module);
    bind_balance(module);
    bind_boundaries(module);
    bind_blend(module);
    bind_buckets(module);
    bind_packing(module);
}
