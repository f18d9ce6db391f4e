// tanh-GELU: 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3). It equals x s with
// s = 1 / (1 + e) and e = exp(-2 u), in which nothing cancels.
#pragma once

#include "vector.h"

namespace fmrec {
namespace {

// exp(-2 u), at most 2^100: s is then as good as 0.
FMREC_INLINE f32v gelu_exponential(f32v x) {
    // -2 sqrt(2 / pi) log2(e), and 0.044715 times that.
    const f32v linear_term = broadcast(-2.302208198f), cubic = broadcast(-0.1029432397f);
    const f32v t = x * (x * x * cubic + linear_term);
    return exponential2(smaller(t, broadcast(100.0f)));
}

FMREC_INLINE f32v gelu(f32v x) { return x * reciprocal(gelu_exponential(x) + 1.0f); }

// The same of several vectors in step: of one, every instruction waits for the one before, and the
// processor does not look far enough ahead to fill the time with the next.
template <int COUNT>
FMREC_INLINE void gelu_all(f32v* x) {
    f32v t[COUNT], f[COUNT], p[COUNT];
#define FMREC_EACH _Pragma("GCC unroll 8") for (int i = 0; i < COUNT; ++i)
    FMREC_EACH t[i] = x[i] * x[i] * -0.1029432397f + -2.302208198f;
    FMREC_EACH t[i] *= x[i];
    FMREC_EACH t[i] = larger(smaller(t[i], broadcast(100.0f)), broadcast(-126.0f));
    FMREC_EACH p[i] = t[i] + 12582912.0f;
    FMREC_EACH f[i] = t[i] - (p[i] - 12582912.0f);
    FMREC_EACH t[i] = f[i] * 1.32647273e-3f + 9.67151299e-3f;
    FMREC_EACH t[i] = t[i] * f[i] + 5.55073358e-2f;
    FMREC_EACH t[i] = t[i] * f[i] + 2.40222424e-1f;
    FMREC_EACH t[i] = t[i] * f[i] + 6.93147004e-1f;
    FMREC_EACH t[i] = t[i] * f[i] + 1.0f;
    FMREC_EACH t[i] = (f32v)((i32v)t[i] + ((i32v)p[i] << 23)) + 1.0f;
    FMREC_EACH x[i] *= reciprocal(t[i]);
#undef FMREC_EACH
}

// gelu(x) and its derivative s + x s (1 - s) d(2 u)/dx, where 1 - s = e s.
FMREC_INLINE f32v gelu_and_derivative(f32v x, f32v* derivative) {
    const f32v linear_term = broadcast(1.595769122f), quadratic = broadcast(0.2140644888f);
    const f32v e = gelu_exponential(x);
    const f32v s = reciprocal(e + 1.0f), value = x * s;
    *derivative = s + value * (e * s) * (x * x * quadratic + linear_term);
    return value;
}

FMREC_INLINE f32v gelu_derivative(f32v x) {
    f32v derivative;
    gelu_and_derivative(x, &derivative);
    return derivative;
}

// gelu(x) and its first two derivatives. With y = d(2 u)/dx the second one is
// 2 s (1 - s) y + x s (1 - s) ((1 - 2 s) y^2 + dy/dx).
FMREC_INLINE void gelu_derivatives(f32v x, f32v* value, f32v* first, f32v* second) {
    const f32v linear_term = broadcast(1.595769122f), quadratic = broadcast(0.2140644888f);
    const f32v e = gelu_exponential(x);
    const f32v s = reciprocal(e + 1.0f), bell = s * (e * s);
    const f32v y = x * x * quadratic + linear_term;
    *value = x * s;
    *first = s + x * bell * y;
    *second = bell * (y + y + x * ((1.0f - s - s) * y * y + (x + x) * quadratic));
}

}  // namespace
}  // namespace fmrec
