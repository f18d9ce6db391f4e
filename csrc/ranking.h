// The host's side of item_ranking: lists in order, work for the threads, results merged.
#pragma once

#include <cstdint>

#include "item_ranking.h"

namespace fmrec {

struct RankingCall {
    ItemRanking a;          // without lists
    std::int64_t rows, items;
    const std::int64_t* exclude;  // [rows, excludes], -1 fills short rows; or null
    std::int64_t excludes;
    int num_threads;
};

// The k best of each row; where fewer are left, -inf and -1. `candidates` is null, [count] (shared)
// or [rows, count]; -1 fills, duplicates count once.
void rank_best(const RankingCall& call, const std::int64_t* candidates, std::int64_t count,
               bool per_row, std::int64_t k, float* scores, std::int64_t* ids);

// 1 + the items ahead of each row's target. With the targets' scores `of_target`, a target may be an
// item of another table, below 0 or beyond `items`; null: they are items of this one.
void rank_targets(const RankingCall& call, const std::int64_t* target, const float* of_target,
                  std::int64_t* ranks);

}  // namespace fmrec
