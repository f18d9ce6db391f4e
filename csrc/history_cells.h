// Which cells of the multi-hot matrix [B, V] the history loss looks at: its ones, and drawn zeros.
#pragma once

#include <cstdint>
#include <vector>

namespace fmrec {

struct HistoryCells {
    // Distinct ids of each row, ascending, without padding: those of row r are
    // ids[starts[r] .. starts[r + 1]).
    std::vector<std::int64_t> ids, starts;
    // Numbers of the zero cells that are used, counted in row-major order, ascending.
    std::vector<std::int64_t> zeros;

    std::int64_t count() const { return static_cast<std::int64_t>(ids.size() + zeros.size()); }
};

// out[j] = draw first + j of the noise stream; its low 63 bits count.
typedef void (*StreamWords)(std::uint64_t seed, std::uint64_t first, std::int64_t count,
                            std::int64_t* out);

// The ones of sequence [B, L] and min(zeros, int(ones * mask_ratio)) draws among the zeros,
// duplicates counted once. B V and B L mask_ratio are below 2^62. Throws std::invalid_argument
// where an id is not 0 .. V - 1.
HistoryCells draw_history_cells(const std::int64_t* sequence, std::int64_t batch,
                                std::int64_t length, std::int64_t items, double mask_ratio,
                                StreamWords words, std::uint64_t seed);

// Rows, columns and labels of the ones and then of the zeros, count() of each.
void write_history_cells(const HistoryCells& cells, std::int64_t items, std::int64_t* rows,
                         std::int64_t* cols, float* label);

}  // namespace fmrec
