#include "history_cells.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fmrec {

namespace {

// Sorts numbers of 0 .. limit - 1 that are spread evenly, as draws are: each goes to one of as many
// buckets as there are numbers, and is moved past the few that share it.
void sort_evenly_spread(std::vector<std::int64_t>& numbers, std::int64_t limit) {
    const std::size_t count = numbers.size();
    if (count < 2) return;
    const double scale = static_cast<double>(count) / static_cast<double>(limit);
    // Rounding is monotone, so no number of a bucket is above one of a later bucket.
    const auto bucket = [&](std::int64_t x) {
        return std::min(static_cast<std::size_t>(static_cast<double>(x) * scale), count - 1);
    };
    std::vector<std::size_t> ends(count + 1, 0);
    for (const std::int64_t x : numbers) ++ends[bucket(x) + 1];
    for (std::size_t k = 0; k < count; ++k) ends[k + 1] += ends[k];
    std::vector<std::int64_t> sorted(count);
    for (const std::int64_t x : numbers) sorted[ends[bucket(x)]++] = x;
    for (std::size_t i = 1; i < count; ++i) {
        const std::int64_t x = sorted[i];
        std::size_t at = i;
        for (; at > 0 && sorted[at - 1] > x; --at) sorted[at] = sorted[at - 1];
        sorted[at] = x;
    }
    numbers.swap(sorted);
}

}  // namespace

HistoryCells draw_history_cells(const std::int64_t* sequence, std::int64_t batch,
                                std::int64_t length, std::int64_t items, double mask_ratio,
                                StreamWords words, std::uint64_t seed) {
    HistoryCells cells;
    cells.ids.reserve(static_cast<std::size_t>(batch * length));
    cells.starts.reserve(static_cast<std::size_t>(batch + 1));
    cells.starts.push_back(0);
    for (std::int64_t row = 0; row < batch; ++row) {
        for (std::int64_t i = 0; i < length; ++i) {
            const std::int64_t id = sequence[row * length + i];
            if (id < 0 || id >= items) {
                throw std::invalid_argument(
                    "sequence[" + std::to_string(row) + ", " + std::to_string(i) +
                    "] must satisfy 0 <= id < " + std::to_string(items) + ", got " +
                    std::to_string(id));
            }
            if (id != 0) cells.ids.push_back(id);
        }
        const auto begin = cells.ids.begin() + cells.starts.back();
        std::sort(begin, cells.ids.end());
        cells.ids.erase(std::unique(begin, cells.ids.end()), cells.ids.end());
        cells.starts.push_back(static_cast<std::int64_t>(cells.ids.size()));
    }
    const std::int64_t ones = cells.starts.back(), zeros = batch * items - ones;
    const std::int64_t draws =
        std::min(static_cast<std::int64_t>(static_cast<double>(ones) * mask_ratio), zeros);
    cells.zeros.resize(static_cast<std::size_t>(draws));
    words(seed, 0, draws, cells.zeros.data());
    for (std::int64_t& word : cells.zeros) word = (word & INT64_MAX) % zeros;
    sort_evenly_spread(cells.zeros, zeros);
    cells.zeros.erase(std::unique(cells.zeros.begin(), cells.zeros.end()), cells.zeros.end());
    return cells;
}

void write_history_cells(const HistoryCells& cells, std::int64_t items, std::int64_t* rows,
                         std::int64_t* cols, float* label) {
    const std::int64_t* ids = cells.ids.data();
    const std::int64_t* starts = cells.starts.data();
    const std::int64_t batch = static_cast<std::int64_t>(cells.starts.size()) - 1;
    const std::int64_t ones = starts[batch];
    for (std::int64_t row = 0; row < batch; ++row) {
        std::fill(rows + starts[row], rows + starts[row + 1], row);
    }
    std::copy(ids, ids + ones, cols);
    std::fill(label, label + ones, 1.0f);
    std::fill(label + ones, label + cells.count(), 0.0f);
    // Numbers, rows and ids ascend together: i is how many ids of the row lie before the cell.
    std::int64_t at = ones, row = 0, first = 0, i = 0;
    for (const std::int64_t number : cells.zeros) {
        while (number - first >= items - (starts[row + 1] - starts[row])) {
            first += items - (starts[row + 1] - starts[row]);
            ++row;
            i = 0;
        }
        const std::int64_t k = number - first;
        while (i < starts[row + 1] - starts[row] && ids[starts[row] + i] - i <= k) ++i;
        rows[at] = row;
        cols[at++] = k + i;
    }
}

}  // namespace fmrec
