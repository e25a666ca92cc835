// Tasks in threads: the functions of one instruction set.

#pragma once

#include "backward.hpp"
#include "forward.hpp"

namespace windowed_attention::ISA {

// run(i) for every i < count, in order of i as threads become free.
template <class Run>
void for_each_task(int64_t count, const Threads& threads, const Run& run) {
    struct Context {
        const Run& run;
        int64_t count;
        std::atomic<int64_t> next{0};
    } context{run, count};
    const auto body = [](int64_t, int64_t, void* pointer) {
        auto& context = *static_cast<Context*>(pointer);
        for (int64_t i; (i = context.next.fetch_add(1)) < context.count;) context.run(i);
    };
    threads.run(std::min(threads.count, count), body, &context);
}

template <class Arithmetic, class Element>
void forward(const Forward<Element>& problem, const Threads& threads) {
    const Sizes& sizes = problem.sizes;
    const int64_t chunk = std::max<int64_t>(1, CHUNK_ROWS / (sizes.H / sizes.G));
    const int64_t chunks = (sizes.S + chunk - 1) / chunk;
    const int64_t heads = sizes.B * sizes.G;
    // The last chunks first: without a window they see the most keys.
    for_each_task(heads * chunks, threads, [&](int64_t task) {
        const int64_t first = (chunks - 1 - task / heads) * chunk, head = task % heads;
        using Task = ForwardTask<Arithmetic, Element>;
        Workspace workspace{thread_workspace(Task::workspace_floats(sizes))};
        Task(problem, head / sizes.G, head % sizes.G, first, std::min(first + chunk, sizes.S)).run(workspace);
    });
}

// The gradients of `heads` key/value heads from `first_head` on (b * G + g), summed at sums_of(head).
template <class Arithmetic, class Element, class SumsOf>
void backward_heads(const Backward<Element>& problem, const Threads& threads, int64_t first_head, int64_t heads,
                    const SumsOf& sums_of) {
    const Sizes& sizes = problem.sizes;
    const int64_t offset = sizes.T - sizes.S;
    const int64_t query_chunks = (sizes.S + CHUNK_QUERIES - 1) / CHUNK_QUERIES;
    const int64_t earlier_chunks = (offset + CHUNK_QUERIES - 1) / CHUNK_QUERIES;  // of keys before the first query's
    const int64_t furthest = std::min((sizes.window - 1 + CHUNK_QUERIES - 1) / CHUNK_QUERIES,
                                      query_chunks - 1 + earlier_chunks);
    for (int64_t distance = 0; distance <= furthest; ++distance) {
        // Query chunk i meets key chunk i - distance, which is there from -earlier_chunks on.
        const int64_t first_chunk = std::max<int64_t>(0, distance - earlier_chunks);
        for_each_task(heads * (query_chunks - first_chunk), threads, [&](int64_t task) {
            const int64_t head = first_head + task % heads, chunk = first_chunk + task / heads;
            const int64_t b = head / sizes.G, first_query = chunk * CHUNK_QUERIES;
            int64_t end_query = std::min(first_query + CHUNK_QUERIES, sizes.S);
            const int64_t key_chunk = offset + (chunk - distance) * CHUNK_QUERIES;
            const int64_t first_key = std::max({key_chunk, int64_t{0}, offset + first_query - sizes.window + 1});
            const int64_t end_key = std::min(key_chunk + CHUNK_QUERIES, sizes.T);
            // The last query to see a key is the one a window later.
            const int64_t complete_dk = end_query == sizes.S ? sizes.T : offset + end_query - sizes.window + 1;
            // Later queries see no earlier keys.
            while (end_query > first_query && seen_keys(sizes, b, end_query - 1).first >= end_key) --end_query;
            const ChunkPair pair{b, head % sizes.G, first_query, end_query, first_key, end_key, distance == 0,
                                 key_chunk, complete_dk};
            if (pair.first_key >= pair.end_key) return;
            using Task = BackwardTask<Arithmetic, Element>;
            Workspace workspace{thread_workspace(Task::workspace_floats(sizes))};
            Task(problem, sums_of(head), pair).run(workspace);
        });
    }
}

// A sink's gradient: minus the sum over its queries of its weight times delta.
template <class Element>
void backward_sinks(const Backward<Element>& problem, const Threads& threads) {
    const Sizes& sizes = problem.sizes;
    for_each_task(problem.dsinks ? sizes.H : 0, threads, [&](int64_t h) {
        double sum = 0;
        for (int64_t i = h; i < sizes.B * sizes.S * sizes.H; i += sizes.H)
            sum += std::exp(sizes.sinks[h] - problem.lse[i]) * problem.delta[i];
        problem.dsinks[h] = static_cast<float>(-sum);
    });
}

// Gradients of keys before the first query's own, which nobody may see.
template <class Element>
void clear_earlier_keys(const Sizes& sizes, const Tensor<Element>& dk, const Tensor<Element>& dv, int64_t b,
                        int64_t g) {
    for (int64_t key = 0; key < sizes.T - sizes.S; ++key) {
        std::fill_n(at(dk, b, key, g), sizes.D, Element{});
        std::fill_n(at(dv, b, key, g), sizes.D, Element{});
    }
}

template <class Arithmetic>
void backward(const Backward<float>& problem, const Threads& threads) {
    const Sizes& sizes = problem.sizes;
    const int64_t heads = sizes.B * sizes.G, R = sizes.H / sizes.G;
    const auto from = [](const Tensor<float>& x, int64_t b, int64_t h) {
        return Tensor<float>{at(x, b, 0, h), x.strides};
    };
    const auto sums_of = [&](int64_t head) {
        const int64_t b = head / sizes.G, g = head % sizes.G;
        return HeadSums{from(problem.dq, b, g * R), from(problem.dk, b, g), from(problem.dv, b, g)};
    };
    for_each_task(heads, threads, [&](int64_t head) {
        clear_earlier_keys(sizes, problem.dk, problem.dv, head / sizes.G, head % sizes.G);
    });
    backward_heads<Arithmetic>(problem, threads, 0, heads, sums_of);
    backward_sinks(problem, threads);
}

// Gradients of bf16 are summed aside, for as few heads at a time as keep the threads busy.
template <class Arithmetic>
void backward(const Backward<Bf16>& problem, const Threads& threads) {
    const Sizes& sizes = problem.sizes;
    const int64_t heads = sizes.B * sizes.G, R = sizes.H / sizes.G, D = sizes.D;
    const int64_t chunks = (sizes.S + CHUNK_QUERIES - 1) / CHUNK_QUERIES;
    const int64_t at_once = std::min(heads, std::max<int64_t>(1, 4 * threads.count / chunks));
    const int64_t dq_floats = sizes.S * R * D, dk_floats = sizes.T * D;
    const std::unique_ptr<float[]> memory(new float[at_once * (dq_floats + 2 * dk_floats)]);
    for (int64_t first = 0; first < heads; first += at_once) {
        const int64_t count = std::min(at_once, heads - first);
        const auto sums_of = [&](int64_t head) {
            float* const dq = memory.get() + (head - first) * (dq_floats + 2 * dk_floats);
            float* const dk = dq + dq_floats;
            return HeadSums{{dq, {0, R * D, D}}, {dk, {0, D, D}}, {dk + dk_floats, {0, D, D}}};
        };
        for_each_task(count, threads, [&](int64_t i) {
            const HeadSums sums = sums_of(first + i);
            clear_earlier_keys(sizes, sums.dk, sums.dv, 0, 0);
            clear_earlier_keys(sizes, problem.dk, problem.dv, (first + i) / sizes.G, (first + i) % sizes.G);
        });
        backward_heads<Arithmetic>(problem, threads, first, count, sums_of);
    }
    backward_sinks(problem, threads);
}

template <class Bf16Arithmetic>
constexpr Kernels kernels{forward<Fp32, float>, forward<Bf16Arithmetic, Bf16>, backward<Fp32>,
                          backward<Bf16Arithmetic>};

}  // namespace windowed_attention::ISA
