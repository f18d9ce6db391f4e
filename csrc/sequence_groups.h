// Splitting sequences over threads, in groups that go through the transformer stack together. Host
// code.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "encoder.h"
#include "memory.h"
#include "parallel.h"

namespace fmrec {

// Sequences in a group: at most this many, and at most this many floats of activations.
constexpr std::int64_t MOST_IN_GROUP = 16;
constexpr std::int64_t GROUP_FLOATS = 1 << 17, TIED_FLOATS = 1 << 16;

// Sequences that go through the stack together: as many as share a block's weights while their
// activations stay in the cache, and as few as give every thread the same number of groups.
inline std::int64_t group_size(const Encoder& encoder, std::int64_t batch,
                               std::int64_t num_threads) {
    const std::int64_t sequence = encoder.length * row_stride(encoder.channels);
    std::int64_t most = GROUP_FLOATS / sequence;
    most = most < 1 ? 1 : most > MOST_IN_GROUP ? MOST_IN_GROUP : most;
    const std::int64_t rounds = (batch + num_threads * most - 1) / (num_threads * most);
    return (batch + num_threads * rounds - 1) / (num_threads * rounds);
}

// Runs all groups, from bounds[i] to bounds[i + 1]: a thread takes the next one when it is done.
template <typename Kernels, typename Arguments>
void run_ranges(const Kernels& kernels, const Arguments& a, const std::vector<std::int64_t>& bounds,
                int num_threads) {
    const std::int64_t groups = static_cast<std::int64_t>(bounds.size()) - 1;
    std::int64_t most = 0;
    for (std::int64_t i = 0; i < groups; ++i) {
        const std::int64_t size = bounds[static_cast<std::size_t>(i) + 1] -
                                  bounds[static_cast<std::size_t>(i)];
        most = size > most ? size : most;
    }
    const std::int64_t slabs = groups < num_threads ? groups : num_threads;
    const std::int64_t slab_size = round_up(kernels.scratch(&a, most), UNIT);
    const Floats memory = allocate_floats(slabs * slab_size, true);
    std::atomic<std::int64_t> next_group{0}, next_slab{0};
    parallel_items(num_threads, num_threads, groups > 1, [&](std::int64_t, std::int64_t) {
        std::int64_t group = next_group.fetch_add(1);
        if (group >= groups) return;
        float* slab = memory.get() + next_slab.fetch_add(1) * slab_size;
        for (; group < groups; group = next_group.fetch_add(1)) {
            const std::size_t i = static_cast<std::size_t>(group);
            kernels.run(&a, bounds[i], bounds[i + 1], slab);
        }
    });
}

// Runs all sequences, group by group. A sequence's result does not depend on its group.
template <typename Kernels, typename Arguments>
void run_groups(const Kernels& kernels, const Arguments& a, std::int64_t batch, int num_threads) {
    const std::int64_t size = group_size(a.encoder, batch, num_threads);
    const std::int64_t groups = (batch + size - 1) / size;
    // Equal groups, the larger ones first: 30 sequences on two threads are 8 + 7 on each.
    std::vector<std::int64_t> bounds;
    for (std::int64_t group = 0; group <= groups; ++group) {
        const std::int64_t larger = batch % groups;
        bounds.push_back(group * (batch / groups) + (group < larger ? group : larger));
    }
    run_ranges(kernels, a, bounds, num_threads);
}

// start[b]: the rows before sequence b when the padded prefix of a sequence is one token.
inline std::vector<std::int64_t> tied_rows(const float* mask, std::int64_t batch,
                                           std::int64_t length) {
    std::vector<std::int64_t> start(1, 0);
    for (std::int64_t b = 0; b < batch; ++b) {
        std::int64_t padding = 0;
        while (padding < length && mask[b * length + padding] == 0.0f) ++padding;
        start.push_back(start.back() + length - (padding > 1 ? padding - 1 : 0));
    }
    return start;
}

// Groups of about as many rows as each thread's equal share in a few rounds; each row of the batch
// has `points` sequences. Sets what the arguments hold of tied padding.
template <typename Kernels, typename Arguments>
void run_tied(const Kernels& kernels, Arguments& a, std::int64_t points, int num_threads) {
    const std::vector<std::int64_t> start = tied_rows(a.mask, a.batch, a.encoder.length);
    const std::int64_t most = TIED_FLOATS / row_stride(a.encoder.channels);
    const std::int64_t total = points * start.back();
    const std::int64_t rounds = (total + num_threads * most - 1) / (num_threads * most);
    const std::int64_t share = (total + num_threads * rounds - 1) / (num_threads * rounds);
    std::vector<std::int64_t> bounds(1, 0);
    std::int64_t rows = 0;
    for (std::int64_t s = 0; s < points * a.batch; ++s) {
        const std::size_t b = static_cast<std::size_t>(s / points);
        rows += start[b + 1] - start[b];
        if (rows >= share || s + 1 == points * a.batch) {
            bounds.push_back(s + 1);
            a.group_rows = rows > a.group_rows ? rows : a.group_rows;
            rows = 0;
        }
    }
    a.start = start.data();
    run_ranges(kernels, a, bounds, num_threads);
    a.start = nullptr;
}

template <typename Kernels, typename Arguments>
void run_sequences(const Kernels& kernels, Arguments& a, std::int64_t points, bool tied,
                   int num_threads) {
    if (tied) {
        run_tied(kernels, a, points, num_threads);
    } else {
        run_groups(kernels, a, points * a.batch, num_threads);
    }
}

}  // namespace fmrec
