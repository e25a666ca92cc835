// What one call computes, and the table of functions that each instruction set fills. Plain data: no code here, since
// every instruction set includes it and the linker keeps one copy of an inline function, whatever it was compiled for.
//
// Legend: B batch, S queries, T keys (S <= T, aligned at the end), H query heads, G key/value heads, R = H / G heads
// that share a key/value head, D head dim. Strides are in elements; the last dimension is contiguous.

#pragma once

#include <cstdint>

// Instruction sets are chosen by GCC's pragma; other compilers build the portable kernels only.
#if defined(__x86_64__) && !defined(__clang__)
#define X86_INSTRUCTION_SETS 1
#endif

namespace windowed_attention {

// [batch, position, head, D]
struct Strides {
    int64_t batch, position, head;
};

template <class Element>
struct Tensor {
    Element* data;
    Strides strides;
};

// bf16 as its bits; other names for the same 16 bits would be taken for numbers.
struct Bf16 {
    uint16_t bits;
};

struct Sizes {
    int64_t B, S, T, H, G, D;
    int64_t window;                 // keys a query sees, itself included; T where there is no limit
    float scale;                    // of the logits
    float softcap;                  // 0: none
    const int64_t* document_start;  // [B, S] first key of each query's document; null: 0
    const float* sinks;             // [H]; null: none
};

template <class Element>
struct Forward {
    Sizes sizes;
    Tensor<const Element> q, k, v;
    Tensor<Element> out;
    float* lse;  // [B, S, H] natural logarithm of the sum of exponentials, the sink's among them
};

template <class Element>
struct Backward {
    Sizes sizes;
    Tensor<const Element> q, k, v, out, dout;
    const float* lse;
    Tensor<Element> dq, dk, dv;
    float* delta;   // [B, S, H] workspace: sum of dout * out over D
    float* dsinks;  // [H]; null where there are no sinks
};

// Calls body(context, first, end) with ranges that cover [0, count), in threads where it likes.
struct Threads {
    int64_t count;
    void (*run)(int64_t count, void (*body)(int64_t first, int64_t end, void* context), void* context);
};

struct Kernels {
    void (*forward_fp32)(const Forward<float>&, const Threads&);
    void (*forward_bf16)(const Forward<Bf16>&, const Threads&);
    void (*backward_fp32)(const Backward<float>&, const Threads&);
    void (*backward_bf16)(const Backward<Bf16>&, const Threads&);
};

extern const Kernels avx512_bf16_kernels, avx512_kernels, avx2_kernels, portable_kernels;

}  // namespace windowed_attention
