#include "workspace.hpp"

#include <memory>
#include <new>

namespace windowed_attention {

namespace {

constexpr std::align_val_t CACHE_LINE{64};

struct Release {
    void operator()(float* memory) const { ::operator delete(memory, CACHE_LINE); }
};

}  // namespace

float* thread_workspace(size_t floats) {
    thread_local std::unique_ptr<float, Release> memory;
    thread_local size_t capacity = 0;
    if (floats > capacity) {
        memory.reset();
        capacity = 0;
        memory.reset(static_cast<float*>(::operator new(floats * sizeof(float), CACHE_LINE)));
        capacity = floats;
    }
    return memory.get();
}

}  // namespace windowed_attention
