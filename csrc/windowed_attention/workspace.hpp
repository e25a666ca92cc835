// Workspace of a thread, kept from call to call: fresh memory would be faulted in page by page each time.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace windowed_attention {

// At least so many floats of this thread's workspace, aligned to a cache line; valid until its next call.
float* thread_workspace(size_t floats);

// Slices of a workspace, each aligned to a cache line.
struct Workspace {
    float* next;

    float* take(int64_t floats) {
        float* const slice = next;
        next += (floats + 15) / 16 * 16;
#if defined(__SANITIZE_ADDRESS__)
        // A gap that must not be touched: the sanitizer sees where memory ends, but not where a slice does.
        constexpr int64_t GAP = 128;  // longer than a row of any block; the bound on the workspace leaves room
        next += GAP;
        ASAN_UNPOISON_MEMORY_REGION(slice, floats * sizeof(float));
        ASAN_POISON_MEMORY_REGION(slice + floats, (next - slice - floats) * sizeof(float));
#endif
        return slice;
    }
};

}  // namespace windowed_attention
