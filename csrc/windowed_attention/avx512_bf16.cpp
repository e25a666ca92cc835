// AVX-512 with BF16 instructions (Intel since Cooper Lake and Sapphire Rapids, AMD since Zen 4).

#include "problem.hpp"
#include "standard_library.hpp"
#include "workspace.hpp"

#if defined(X86_INSTRUCTION_SETS)

#define ISA avx512_bf16
#define ISA_AVX512 1
#define ISA_BF16 1

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include "kernels.hpp"

namespace windowed_attention {

const Kernels avx512_bf16_kernels = avx512_bf16::kernels<avx512_bf16::Bf16Pairs>;

}  // namespace windowed_attention

#endif
