#include "ranking.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "packed_encoder.h"
#include "parallel.h"

namespace fmrec {

namespace {

// Rows ranked in one pass over the items, and items that a thread takes at a time.
constexpr std::int64_t MOST_ROWS = 1024, CHUNK = 16 * RANKING_PANEL;
// From so many rows on a thread packs the items for itself.
constexpr std::int64_t ROWS_FOR_A_THREAD = 128;
// What the threads' keys may take together; a second thread for the same rows must fit in.
constexpr std::int64_t MOST_KEY_BYTES = std::int64_t{16} << 20;
// Multiplications below which a second thread costs more than it brings.
constexpr std::int64_t GRAIN = 1 << 18;

void keep_best(std::uint64_t* keys, std::int64_t count, std::int64_t k) {
    std::nth_element(keys, keys + k - 1, keys + count, std::greater<std::uint64_t>());
}

float score_of(std::uint64_t key) {
    const std::uint32_t high = static_cast<std::uint32_t>(key >> 32);
    const std::uint32_t bits = high & 0x80000000u ? high & 0x7fffffffu : ~high;
    float score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
}

// Ascending, each id once, without the -1 that fills.
std::int64_t in_order(const std::int64_t* ids, std::int64_t count, std::int64_t* out) {
    std::int64_t* const end =
        std::copy_if(ids, ids + count, out, [](std::int64_t id) { return id >= 0; });
    std::sort(out, end);
    return std::unique(out, end) - out;
}

// The exclusions of rows [first, first + rows), in order: a.excluded, a.starts.
struct Lists {
    std::vector<std::int64_t> ids, starts;

    Lists(const RankingCall& call, std::int64_t first, std::int64_t rows, ItemRanking& a) {
        a.excluded = a.starts = nullptr;
        if (!call.exclude) return;
        ids.resize(static_cast<std::size_t>(rows * call.excludes));
        starts.assign(1, 0);
        for (std::int64_t row = 0; row < rows; ++row) {
            const std::int64_t* from = call.exclude + (first + row) * call.excludes;
            starts.push_back(starts.back() +
                             in_order(from, call.excludes, ids.data() + starts.back()));
        }
        a.excluded = ids.data();
        a.starts = starts.data();
    }
};

std::int64_t capacity_for(std::int64_t k, std::int64_t positions) {
    return std::min(k + std::max<std::int64_t>(k, 64), std::max(positions, k) + 1);
}

// The keys of one thread (a claim) for `rows` rows.
struct Claim {
    std::vector<std::int64_t> count;
    std::vector<std::uint64_t> worst;
    std::vector<float> threshold;

    void clear(std::int64_t rows) {
        const std::size_t size = static_cast<std::size_t>(rows);
        count.assign(size, 0);
        worst.assign(size, 0);
        threshold.assign(size, std::numeric_limits<float>::quiet_NaN());
    }
};

// The best k of `count` keys, in order.
void write_best(const ItemRanking& a, std::uint64_t* keys, std::int64_t count, std::int64_t k,
                float* scores, std::int64_t* ids) {
    const std::int64_t found = std::min(count, k);
    if (count > k) keep_best(keys, count, k);
    std::sort(keys, keys + found, std::greater<std::uint64_t>());
    for (std::int64_t i = 0; i < found; ++i) {
        const std::int64_t position = static_cast<std::uint32_t>(~keys[i]);
        scores[i] = score_of(keys[i]);
        ids[i] = a.items ? a.items[position] : position;
    }
    std::fill(scores + found, scores + k, -std::numeric_limits<float>::infinity());
    std::fill(ids + found, ids + k, std::int64_t{-1});
}

// `positions` of a for `rows` rows, the threads taking the next chunk whenever they are done.
// Which thread met an item leaves no trace: no two keys of a row are equal.
void best_of_block(const ItemRankingKernels& kernels, const ItemRanking& a, std::int64_t rows,
                   std::int64_t positions, std::int64_t k, int num_threads, float* scores,
                   std::int64_t* ids) {
    const std::int64_t capacity = capacity_for(k, positions);
    const std::int64_t chunks = (positions + CHUNK - 1) / CHUNK;
    const bool worth_it = rows * positions * a.depth >= GRAIN && chunks > 1;
    const std::int64_t fit = std::max<std::int64_t>(1, MOST_KEY_BYTES / (rows * capacity * 8));
    const std::int64_t threads = worth_it ? num_threads : 1, claims = std::min(threads, fit);
    // A thread of its own for many rows meets fewer items that only look good so far than threads
    // that share the rows and divide the items. Who is done with a block helps with the next.
    const std::int64_t blocks = std::min(
        rows, std::max(std::min(threads, rows / ROWS_FOR_A_THREAD),
                       (threads + claims - 1) / claims));
    std::vector<std::uint64_t> keys(static_cast<std::size_t>(claims * rows * capacity));
    std::vector<Claim> states(static_cast<std::size_t>(claims));
    for (Claim& state : states) state.clear(rows);
    const std::int64_t scratch_size = (RANKING_SCRATCH(a.depth) + 15) / 16 * 16;
    const Floats scratch = allocate_floats(threads * scratch_size, false);
    struct Block {
        std::atomic<std::int64_t> chunk{0}, claim{0};
    };
    std::vector<Block> progress(static_cast<std::size_t>(blocks));
    std::atomic<std::int64_t> next_thread{0};
    parallel_items(static_cast<int>(threads), threads, threads > 1,
                   [&](std::int64_t, std::int64_t) {
        const std::int64_t thread = next_thread.fetch_add(1);
        for (std::int64_t i = 0; i < blocks; ++i) {
            const std::int64_t block = (thread + i) % blocks;
            Block& state = progress[static_cast<std::size_t>(block)];
            if (state.chunk.load() >= chunks) continue;
            const std::int64_t mine = state.claim.fetch_add(1);
            if (mine >= claims) continue;
            Claim& claim = states[static_cast<std::size_t>(mine)];
            const BestItems best{keys.data() + mine * rows * capacity, claim.count.data(),
                                 claim.worst.data(), claim.threshold.data(), k, capacity,
                                 keep_best};
            const std::int64_t first = rows * block / blocks, last = rows * (block + 1) / blocks;
            for (std::int64_t chunk = state.chunk.fetch_add(1); chunk < chunks;
                 chunk = state.chunk.fetch_add(1)) {
                kernels.best(&a, &best, first, last, chunk * CHUNK,
                             std::min(positions, (chunk + 1) * CHUNK),
                             scratch.get() + thread * scratch_size);
            }
        }
    });
    parallel_items(static_cast<int>(threads), rows, threads > 1,
                   [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            // A row's keys of all claims fit in behind those of the first, in place or not at all.
            std::uint64_t* const merged = keys.data() + row * capacity;
            std::int64_t count = states[0].count[static_cast<std::size_t>(row)];
            for (std::int64_t claim = 1; claim < claims; ++claim) {
                const std::uint64_t* from = keys.data() + (claim * rows + row) * capacity;
                const std::int64_t more =
                    states[static_cast<std::size_t>(claim)].count[static_cast<std::size_t>(row)];
                for (std::int64_t i = 0; i < more; ++i) {
                    if (count == capacity) {
                        keep_best(merged, count, k);
                        count = k;
                    }
                    merged[count++] = from[i];
                }
            }
            write_best(a, merged, count, k, scores + row * k, ids + row * k);
        }
    });
}

// One row at a time, each with candidates of its own.
void best_of_lists(const ItemRankingKernels& kernels, const RankingCall& call,
                   const std::int64_t* candidates, std::int64_t count, std::int64_t k,
                   float* scores, std::int64_t* ids) {
    const std::int64_t capacity = capacity_for(k, count);
    const std::int64_t scratch_size = (RANKING_SCRATCH(call.a.depth) + 15) / 16 * 16;
    const std::int64_t threads = call.num_threads;
    const Floats scratch = allocate_floats(threads * scratch_size, false);
    std::vector<std::uint64_t> all_keys(static_cast<std::size_t>(threads * capacity));
    std::vector<std::int64_t> all_items(static_cast<std::size_t>(threads * count));
    std::vector<std::int64_t> all_excluded(static_cast<std::size_t>(threads * call.excludes));
    std::atomic<std::int64_t> next_thread{0};
    parallel_items(call.num_threads, call.rows, call.rows * count * call.a.depth >= GRAIN,
                   [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t thread = next_thread.fetch_add(1);
        std::int64_t* const items = all_items.data() + thread * count;
        std::int64_t* const excluded = all_excluded.data() + thread * call.excludes;
        std::uint64_t* const keys = all_keys.data() + thread * capacity;
        for (std::int64_t row = begin; row < end; ++row) {
            ItemRanking a = call.a;
            a.rep += row * a.depth;
            a.items = items;
            std::int64_t starts[2] = {0, 0};
            if (call.exclude) {
                starts[1] = in_order(call.exclude + row * call.excludes, call.excludes, excluded);
                a.excluded = excluded;
                a.starts = starts;
            }
            const std::int64_t positions = in_order(candidates + row * count, count, items);
            std::int64_t found = 0;
            std::uint64_t worst = 0;
            float threshold = std::numeric_limits<float>::quiet_NaN();
            const BestItems best{keys, &found, &worst, &threshold, k, capacity, keep_best};
            kernels.best(&a, &best, 0, 1, 0, positions, scratch.get() + thread * scratch_size);
            write_best(a, keys, found, k, scores + row * k, ids + row * k);
        }
    });
}

}  // namespace

void rank_best(const RankingCall& call, const std::int64_t* candidates, std::int64_t count,
               bool per_row, std::int64_t k, float* scores, std::int64_t* ids) {
    const ItemRankingKernels& kernels = FMREC_TABLE(item_ranking);
    if (candidates && per_row) {
        best_of_lists(kernels, call, candidates, count, k, scores, ids);
        return;
    }
    std::vector<std::int64_t> items;
    std::int64_t positions = call.items;
    if (candidates) {
        items.resize(static_cast<std::size_t>(count) + 1);
        positions = in_order(candidates, count, items.data());
    }
    for (std::int64_t first = 0; first < call.rows; first += MOST_ROWS) {
        const std::int64_t rows = std::min(MOST_ROWS, call.rows - first);
        ItemRanking a = call.a;
        a.rep += first * a.depth;
        a.items = candidates ? items.data() : nullptr;
        const Lists lists(call, first, rows, a);
        best_of_block(kernels, a, rows, positions, k, call.num_threads, scores + first * k,
                      ids + first * k);
    }
}

void rank_targets(const RankingCall& call, const std::int64_t* target, const float* given,
                  std::int64_t* ranks) {
    const ItemRankingKernels& kernels = FMREC_TABLE(item_ranking);
    const std::int64_t scratch_size = (RANKING_SCRATCH(call.a.depth) + 15) / 16 * 16;
    const std::int64_t chunks = (call.items + CHUNK - 1) / CHUNK;
    for (std::int64_t start = 0; start < call.rows; start += MOST_ROWS) {
        const std::int64_t rows = std::min(MOST_ROWS, call.rows - start);
        ItemRanking a = call.a;
        a.rep += start * a.depth;
        const Lists lists(call, start, rows, a);
        const bool worth_it = rows * call.items * a.depth >= GRAIN;
        const std::int64_t threads = worth_it ? call.num_threads : 1;
        const Floats scratch = allocate_floats(threads * scratch_size, false);
        const std::size_t counters = static_cast<std::size_t>(rows * RANKING_COUNTERS);
        std::vector<std::int32_t> ahead(counters * static_cast<std::size_t>(threads), 0);
        std::vector<std::int64_t> next;
        for (std::int64_t t = 0; t < threads && call.exclude; ++t) {
            next.insert(next.end(), lists.starts.begin(), lists.starts.end() - 1);
        }
        std::vector<float> of_target(static_cast<std::size_t>(rows));
        ItemRanking targets = a;
        targets.items = target + start;
        if (given) std::copy(given + start, given + start + rows, of_target.begin());
        else kernels.diagonal(&targets, 0, rows, of_target.data(), scratch.get());
        std::atomic<std::int64_t> next_chunk{0}, next_thread{0};
        parallel_items(static_cast<int>(threads), threads, threads > 1,
                       [&](std::int64_t, std::int64_t) {
            const std::int64_t thread = next_thread.fetch_add(1);
            const TargetRank rank{target + start, of_target.data(),
                                  ahead.data() + thread * rows * RANKING_COUNTERS,
                                  call.exclude ? next.data() + thread * rows : nullptr};
            for (std::int64_t chunk = next_chunk.fetch_add(1); chunk < chunks;
                 chunk = next_chunk.fetch_add(1)) {
                kernels.ahead(&a, &rank, 0, rows, chunk * CHUNK,
                              std::min(call.items, (chunk + 1) * CHUNK),
                              scratch.get() + thread * scratch_size);
            }
        });
        for (std::int64_t row = 0; row < rows; ++row) {
            std::int64_t sum = 1;
            for (std::int64_t t = 0; t < threads; ++t) {
                const std::int32_t* of_row = ahead.data() + (t * rows + row) * RANKING_COUNTERS;
                for (int i = 0; i < RANKING_COUNTERS; ++i) sum += of_row[i];
            }
            ranks[start + row] = sum;
        }
    }
}

}  // namespace fmrec
