// Scores of a few rows against many items, seen once and thrown away: the best items of each row,
// or how many are ahead of a target.
//
// A score is the sum of its products in order, first to last, then + bias, for every row and item:
// it does not depend on the batch, the tile or the threads, so equal items tie and a target meets
// the same bits wherever it is scored.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

// Items of a packed panel, rows that are scored between two filters, counters of a row.
enum { RANKING_PANEL = 64, RANKING_ROWS = 24, RANKING_COUNTERS = 16 };

enum class TableType : int32_t { float32 = 0, bfloat16 = 1, int8 = 2 };

// Positions are what is gone through: the items themselves, or `items` in ascending order.
struct ItemRanking {
    const float* rep;         // [rows, depth]
    const void* weight;       // [V, depth] of `type`
    TableType type;
    const float* scale;       // [V] that the products with an item are multiplied by, or null
    const float* bias;        // [V] or null
    const int64_t* items;     // position -> item, or null
    const int64_t* excluded;  // ids of all rows, ascending within a row, or null
    const int64_t* starts;    // row r's are excluded[starts[r] .. starts[r + 1])
    int64_t depth;
};

// What one thread has found: per row up to `capacity` keys. A key compares as (score, lower
// position first): the score's bits, made to compare as integers, above the position's complement.
struct BestItems {
    uint64_t* keys;    // [rows, capacity]
    int64_t* count;    // [rows]
    uint64_t* worst;   // [rows] the k-th best key so far; 0 while there are fewer
    float* threshold;  // [rows] its score; NaN, which nothing is below, while there are fewer
    int64_t k, capacity;
    // Brings the k largest keys to the front, the k-th to place k - 1.
    void (*keep_best)(uint64_t* keys, int64_t count, int64_t k);
};

struct TargetRank {
    const int64_t* target;   // [rows]
    const float* of_target;  // [rows] their scores
    int32_t* ahead;          // [rows, RANKING_COUNTERS], added to
    int64_t* next;           // [rows] the first exclusion not gone past, from starts[row]
};

// `scratch` is RANKING_SCRATCH(depth) floats at a multiple of 64 bytes.
#define RANKING_SCRATCH(depth) (::fmrec::RANKING_PANEL * ((depth) + ::fmrec::RANKING_ROWS + 1))

struct ItemRankingKernels {
    // Positions [begin, end) for rows [first, last); calls go through positions in ascending order.
    void (*best)(const ItemRanking*, const BestItems*, int64_t first, int64_t last, int64_t begin,
                 int64_t end, float* scratch);
    // The same for the number of items ahead of the target; without `items`.
    void (*ahead)(const ItemRanking*, const TargetRank*, int64_t first, int64_t last,
                  int64_t begin, int64_t end, float* scratch);
    // out[r] = score of items[r] for row r, r in [first, last).
    void (*diagonal)(const ItemRanking*, int64_t first, int64_t last, float* out, float* scratch);
};

FMREC_DECLARE_TABLE(ItemRankingKernels, item_ranking)

}  // namespace fmrec
