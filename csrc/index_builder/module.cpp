// The Python module of the index builder: one bind_*() per source file, documented there.

#include "module.hpp"

PYBIND11_MODULE(_index_builder, module) {
    module.doc() = "Compiled kernels of megazebra.data.index; their numpy twins stand beside the callers there.";
}
