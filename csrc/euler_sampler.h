// All q Euler steps of the sampler (FMRec eq. 23): noise fusion, encoder, final norm, update.
#pragma once

#include <stdint.h>

#include "sampler_network.h"

namespace fmrec {

struct EulerSampler : SamplerNetwork {
    const float* z0;  // [B, D]
    float* out;       // [B, D], or the trajectory [q + 1, B, D]
    bool trajectory;
    bool velocity;    // the network predicts the velocity, not the end
};

// Works on the sequences [begin, end), together: see EncoderKernels.
struct EulerSamplerKernels {
    int64_t (*scratch)(const EulerSampler*, int64_t count);  // floats
    void (*run)(const EulerSampler*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(EulerSamplerKernels, euler_sampler)

}  // namespace fmrec
