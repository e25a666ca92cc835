// Whatever the compiler builds for by default: four lanes are what every x86-64 and ARM64 processor has.

#include "problem.hpp"
#include "standard_library.hpp"
#include "workspace.hpp"

#define ISA portable

#include "kernels.hpp"

namespace windowed_attention {

const Kernels portable_kernels = portable::kernels<portable::Fp32>;

}  // namespace windowed_attention
