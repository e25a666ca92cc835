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
            ChunkPair pair{head / sizes.G, head % sizes.G, chunk * CHUNK_QUERIES, 0, 0, 0, distance == 0};
            pair.end_query = std::min(pair.first_query + CHUNK_QUERIES, sizes.S);
            const int64_t key_chunk_start = offset + (chunk - distance) * CHUNK_QUERIES;
            pair.end_key = std::min(key_chunk_start + CHUNK_QUERIES, sizes.T);
            pair.first_key = std::max({key_chunk_start, int64_t{0}, seen_keys(sizes, pair.b, pair.first_query).first});
            // Later queries see no earlier keys.
            while (pair.end_query > pair.first_query &&
                   seen_keys(sizes, pair.b, pair.end_query - 1).first >= pair.end_key)
                --pair.end_query;
            if (pair.first_key >= pair.end_key || pair.first_query >= pair.end_query) return;
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

inline Tensor<float> head_of(const Tensor<float>& x, int64_t b, int64_t head) {
    return {at(x, b, 0, head), x.strides};
}

// Float32 gradients are summed where they are returned.
template <class Arithmetic>
void backward(const Backward<float>& problem, const Threads& threads) {
    const Sizes& sizes = problem.sizes;
    const int64_t heads = sizes.B * sizes.G, R = sizes.H / sizes.G;
    const auto sums_of = [&](int64_t head) {
        const int64_t b = head / sizes.G, g = head % sizes.G;
        return HeadSums{head_of(problem.dq, b, g * R), head_of(problem.dk, b, g), head_of(problem.dv, b, g)};
    };
    for_each_task(heads, threads, [&](int64_t head) {
        // Keys before the first query's own may be seen by nobody.
        const HeadSums sums = sums_of(head);
        for (int64_t key = 0; key < sizes.T - sizes.S; ++key) {
            std::fill_n(at(sums.dk, 0, key, 0), sizes.D, 0.0f);
            std::fill_n(at(sums.dv, 0, key, 0), sizes.D, 0.0f);
        }
    });
    backward_heads<Arithmetic>(problem, threads, 0, heads, sums_of);
    backward_sinks(problem, threads);
}

// Those of bf16 are summed aside, for as few heads at a time as keep the threads busy, and rounded once.
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
            float* const start = memory.get() + (head - first) * (dq_floats + 2 * dk_floats);
            return HeadSums{{start, {0, R * D, D}}, {start + dq_floats, {0, D, D}},
                            {start + dq_floats + dk_floats, {0, D, D}}};
        };
        for_each_task(count, threads, [&](int64_t i) {
            const HeadSums sums = sums_of(first + i);
            std::fill_n(sums.dk.data, (sizes.T - sizes.S) * D, 0.0f);
            std::fill_n(sums.dv.data, (sizes.T - sizes.S) * D, 0.0f);
        });
        backward_heads<Arithmetic>(problem, threads, first, count, sums_of);
        const auto round = [&](const Tensor<float>& from, const Tensor<Bf16>& to, int64_t b, int64_t from_head,
                               int64_t to_head, int64_t first_position, int64_t end_position) {
            for (int64_t i = first_position; i < end_position; ++i)
                for (int64_t d = 0; d < D; d += LANES)
                    store(at(to, b, i, to_head) + d, load(at(from, 0, i, from_head) + d));
        };
        constexpr int64_t POSITIONS = 1024;
        const int64_t parts = (sizes.T + POSITIONS - 1) / POSITIONS;
        for_each_task(count * parts, threads, [&](int64_t task) {
            const int64_t head = first + task / parts, b = head / sizes.G, g = head % sizes.G;
            const int64_t start = task % parts * POSITIONS, end = start + POSITIONS;
            const HeadSums sums = sums_of(head);
            round(sums.dk, problem.dk, b, 0, g, start, std::min(end, sizes.T));
            round(sums.dv, problem.dv, b, 0, g, start, std::min(end, sizes.T));
            for (int64_t r = 0; r < R; ++r) round(sums.dq, problem.dq, b, r, g * R + r, start, std::min(end, sizes.S));
        });
    }
    backward_sinks(problem, threads);
}

template <class Bf16Arithmetic>
constexpr Kernels kernels{forward<Fp32, float>, forward<Bf16Arithmetic, Bf16>, backward<Fp32>,
                          backward<Bf16Arithmetic>};

}  // namespace windowed_attention::ISA
