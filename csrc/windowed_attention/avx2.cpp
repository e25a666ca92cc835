// AVX2 with FMA: bf16 is computed in float32.

#include "problem.hpp"
#include "standard_library.hpp"
#include "workspace.hpp"

#if defined(X86_INSTRUCTION_SETS)

#define ISA avx2
#define ISA_AVX2 1

#pragma GCC target("avx2,fma")
#include "kernels.hpp"

namespace windowed_attention {

const Kernels avx2_kernels = avx2::kernels<avx2::Fp32>;

}  // namespace windowed_attention

#endif
