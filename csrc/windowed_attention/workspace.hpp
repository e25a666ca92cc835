// Workspace of a thread, kept from call to call: fresh memory would be faulted in page by page each time.

#pragma once

#include <cstddef>
#include <cstdint>

namespace windowed_attention {

// At least so many floats of this thread's workspace, aligned to a cache line; valid until its next call.
float* thread_workspace(size_t floats);

// Slices of a workspace, each aligned to a cache line.
struct Workspace {
    float* next;

    float* take(int64_t floats) {
        float* const slice = next;
        next += (floats + 15) / 16 * 16;
        return slice;
    }
};

}  // namespace windowed_attention
