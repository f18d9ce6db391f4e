// What the bindings that rank items share.
#pragma once

#include "bindings.h"
#include "ranking.h"

namespace fmrec {

// rep [B, D], weight [V, D], and bias and exclude where they are given.
RankingCall ranking_call(const py::array& rep, const py::array& weight, const py::object& scale,
                         const py::object& bias, const py::object& exclude, int num_threads);

}  // namespace fmrec
