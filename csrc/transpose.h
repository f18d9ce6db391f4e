// Squares of 4 x 4 floats in registers: baseline instructions only, for host and kernel sources.
// Everything here has internal linkage.
#pragma once

#include <stdint.h>

#include "isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fmrec {
namespace {

// out[j, i] = in[i, j] * factor[i], i and j in 0 .. 3.
FMREC_INLINE void transpose4(const float* in, int64_t in_row, const float* factor, float* out,
                             int64_t out_row) {
#if defined(__SSE2__)
    __m128 r0 = _mm_loadu_ps(in), r1 = _mm_loadu_ps(in + in_row);
    __m128 r2 = _mm_loadu_ps(in + 2 * in_row), r3 = _mm_loadu_ps(in + 3 * in_row);
    const __m128 factors = _mm_loadu_ps(factor);
    _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
    _mm_storeu_ps(out, _mm_mul_ps(r0, factors));
    _mm_storeu_ps(out + out_row, _mm_mul_ps(r1, factors));
    _mm_storeu_ps(out + 2 * out_row, _mm_mul_ps(r2, factors));
    _mm_storeu_ps(out + 3 * out_row, _mm_mul_ps(r3, factors));
#else
    for (int64_t i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < 4; ++j) out[j * out_row + i] = in[i * in_row + j] * factor[i];
    }
#endif
}

}  // namespace
}  // namespace fmrec
