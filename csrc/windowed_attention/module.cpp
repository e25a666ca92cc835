// What Python sees: pointers and sizes in, nothing out. Tensors are made and checked by megazebra/attention/simd.py.

#include "problem.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace windowed_attention {
namespace {

using Address = std::uintptr_t;
using TensorArguments = std::tuple<Address, int64_t, int64_t, int64_t>;  // data, strides of batch, position, head
using SizeArguments = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;  // B, S, T, H, G, D

template <class Element>
Tensor<Element> tensor(const TensorArguments& x) {
    const auto& [data, batch, position, head] = x;
    return {reinterpret_cast<Element*>(data), {batch, position, head}};
}

Sizes sizes_of(const SizeArguments& x, int64_t window, float scale, float softcap, Address document_start,
               Address sinks) {
    const auto& [B, S, T, H, G, D] = x;
    return {B, S, T, H, G, D, window, scale, softcap, reinterpret_cast<const int64_t*>(document_start),
            reinterpret_cast<const float*>(sinks)};
}

// torch_parallel_for of torch's stable C interface: its threads are torch's own, so that there is one pool of them.
using ParallelFor = int32_t (*)(int64_t first, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                void* context);
ParallelFor parallel_for = nullptr;

void run_in_threads(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    if (parallel_for(0, count, 1, body, context) != 0)
        throw std::runtime_error("windowed attention failed in one of its threads: no memory for its workspace");
}

struct InstructionSet {
    std::string name;
    const Kernels* kernels;
};

// Those that this processor has, best first.
std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets;
#if defined(X86_INSTRUCTION_SETS)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back({"AVX-512 with BF16", &avx512_bf16_kernels});
    if (avx512) sets.push_back({"AVX-512", &avx512_kernels});
    if (avx2) sets.push_back({"AVX2", &avx2_kernels});
#endif
    sets.push_back({"portable", &portable_kernels});
    return sets;
}

const Kernels& kernels_of(const std::string& name) {
    for (const InstructionSet& set : instruction_sets())
        if (set.name == name) return *set.kernels;
    throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

// The two passes for one type of elements. Addresses may be 0 where a pointer may be null.
template <class Element>
void bind_passes(py::module_& module, const std::string& type,
                 void (*Kernels::*forward)(const Forward<Element>&, const Threads&),
                 void (*Kernels::*backward)(const Backward<Element>&, const Threads&)) {
    using In = const TensorArguments&;
    module.def(("forward_" + type).c_str(),
               [=](const std::string& instruction_set, int64_t threads, const SizeArguments& sizes, int64_t window,
                   float scale, float softcap, Address document_start, Address sinks, In q, In k, In v, In out,
                   Address lse) {
                   const Kernels& kernels = kernels_of(instruction_set);
                   const py::gil_scoped_release release;
                   (kernels.*forward)({sizes_of(sizes, window, scale, softcap, document_start, sinks),
                                       tensor<const Element>(q), tensor<const Element>(k), tensor<const Element>(v),
                                       tensor<Element>(out), reinterpret_cast<float*>(lse)},
                                      {threads, run_in_threads});
               });
    module.def(("backward_" + type).c_str(),
               [=](const std::string& instruction_set, int64_t threads, const SizeArguments& sizes, int64_t window,
                   float scale, float softcap, Address document_start, Address sinks, In q, In k, In v, In out, In dout,
                   Address lse, In dq, In dk, In dv, Address delta, Address dsinks) {
                   const Kernels& kernels = kernels_of(instruction_set);
                   const py::gil_scoped_release release;
                   (kernels.*backward)({sizes_of(sizes, window, scale, softcap, document_start, sinks),
                                        tensor<const Element>(q), tensor<const Element>(k), tensor<const Element>(v),
                                        tensor<const Element>(out), tensor<const Element>(dout),
                                        reinterpret_cast<const float*>(lse), tensor<Element>(dq), tensor<Element>(dk),
                                        tensor<Element>(dv), reinterpret_cast<float*>(delta),
                                        reinterpret_cast<float*>(dsinks)},
                                       {threads, run_in_threads});
               });
}

}  // namespace
}  // namespace windowed_attention

PYBIND11_MODULE(_windowed_attention, module) {
    using namespace windowed_attention;
    module.doc() = "Windowed causal attention on the CPU; see megazebra/attention/simd.py.";
    module.attr("sources") = SOURCES_DIGEST;
    module.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const InstructionSet& set : instruction_sets()) names.push_back(set.name);
        return names;
    });
    module.def("set_parallel_for", [](Address function) { parallel_for = reinterpret_cast<ParallelFor>(function); });
    bind_passes<float>(module, "fp32", &Kernels::forward_fp32, &Kernels::backward_fp32);
    bind_passes<Bf16>(module, "bf16", &Kernels::forward_bf16, &Kernels::backward_bf16);
}
