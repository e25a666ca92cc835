#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

// Contiguous arrays; what takes them without `noconvert` gets a copy of others.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Integers = Array<int64_t>;

void bind_block_order(py::module_& module);
void bind_gather(py::module_& module);
void bind_megatron_order(py::module_& module);
void bind_balance(py::module_& module);
void bind_boundaries(py::module_& module);
void bind_blend(py::module_& module);
void bind_buckets(py::module_& module);
void bind_packing(py::module_& module);
