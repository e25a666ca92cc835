// AVX-512 without BF16 instructions: bf16 is computed in float32.

#include "problem.hpp"
#include "standard_library.hpp"
#include "workspace.hpp"

#if defined(X86_INSTRUCTION_SETS)

#define ISA avx512
#define ISA_AVX512 1

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "kernels.hpp"

namespace windowed_attention {

const Kernels avx512_kernels = avx512::kernels<avx512::Fp32>;

}  // namespace windowed_attention

#endif
