#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_block_order(py::module_& module);
void bind_gather(py::module_& module);
void bind_megatron_order(py::module_& module);
void bind_balance(py::module_& module);
void bind_boundaries(py::module_& module);
void bind_blend(py::module_& module);
void bind_buckets(py::module_& module);
void bind_packing(py::module_& module);
