// What the bindings that run the transformer stack share.
#pragma once

#include "bindings.h"
#include "packed_encoder.h"
#include "sampler_network.h"

namespace fmrec {

// The stack for sequences of `length` positions. Throws where `packed` is for other kernels or
// another length.
Encoder make_encoder(const PackedEncoder& packed, std::int64_t length);

// The arrays of a SamplerNetwork, kept while the kernel runs.
struct NetworkArrays {
    py::array norm_weight, norm_bias, e, mask, taus, noise, rows;
};

// Checks what the samplers share and fills it in; `out` must overlap none of it.
NetworkArrays sampler_network(SamplerNetwork& a, const PackedEncoder& packed,
                              const py::object& norm_weight, const py::object& norm_bias,
                              const py::object& e, const py::object& mask, const py::object& taus,
                              const py::object& noise, const py::object& rows,
                              const py::object& seed, double delta, const py::array& out);

}  // namespace fmrec
