// One vector register of the instruction set that a kernel translation unit is compiled for.
//
// Included by kernel translation units only; everything here has internal linkage, so that each
// instruction set keeps its own copy. The vectors are the compiler's vector extension.
#pragma once

#include <stdint.h>

#include "isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FMREC_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FMREC_VECTOR_BYTES 32
#else
#define FMREC_VECTOR_BYTES 16
#endif

namespace fmrec {
namespace {

typedef uint64_t u64v __attribute__((vector_size(FMREC_VECTOR_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(FMREC_VECTOR_BYTES)));
typedef int32_t i32v __attribute__((vector_size(FMREC_VECTOR_BYTES)));
typedef float f32v __attribute__((vector_size(FMREC_VECTOR_BYTES)));

enum { FLOATS = FMREC_VECTOR_BYTES / 4 };

FMREC_INLINE u64v broadcast64(uint64_t x) { return u64v{} + x; }

// Not f32v{} + x: adding to a zero turns -0 into +0, so the compiler would have to add.
FMREC_INLINE f32v broadcast(float x) {
#if defined(__AVX512F__)
    return (f32v)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (f32v)_mm256_set1_ps(x);
#else
    return f32v{x, x, x, x};
#endif
}

FMREC_INLINE f32v load(const float* source) {
    f32v value;
    __builtin_memcpy(&value, source, sizeof value);
    return value;
}

template <typename Vector, typename Scalar>
FMREC_INLINE void store(Scalar* target, Vector value) {
    __builtin_memcpy(target, &value, sizeof value);
}

// Past the caches, to an address of whole vectors: for what is not read again soon. The line is not
// fetched before it is overwritten. A thread that has streamed calls stream_end.
FMREC_INLINE void stream(float* target, f32v value) {
#if defined(__AVX512F__)
    _mm512_stream_ps(target, (__m512)value);
#elif defined(__AVX2__)
    _mm256_stream_ps(target, (__m256)value);
#elif defined(__SSE2__)
    _mm_stream_ps(target, (__m128)value);
#else
    store(target, value);
#endif
}

FMREC_INLINE void stream_end() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

FMREC_INLINE f32v square_root(f32v x) {
#if defined(__AVX512F__)
    return (f32v)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (f32v)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (f32v)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < FLOATS; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// 1 / x to about an ulp, 1 <= x < 2^120.
FMREC_INLINE f32v reciprocal(f32v x) {
#if defined(__AVX512F__)
    // 14 bits and one Newton step; a division takes the time of a dozen multiplications.
    const f32v r = (f32v)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r);
#else
    return 1.0f / x;
#endif
}

// The second where one is NaN. As instructions: of a > b ? a : b GCC makes two.
FMREC_INLINE f32v larger(f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (f32v)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

FMREC_INLINE f32v smaller(f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (f32v)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
}

// 2^x to about an ulp for x <= 126, 2^-126 for x below -126. NaN gives some number.
FMREC_INLINE f32v exponential2(f32v x) {
    x = larger(x, broadcast(-126.0f));
    // 1.5 * 2^23: the addition rounds to an integer, which the low bits then hold.
    const f32v shifted = x + 12582912.0f;
    const f32v f = x - (shifted - 12582912.0f);
    // Minimax for 2^f on [-1/2, 1/2].
    f32v p = f * 1.32647273e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
    return (f32v)((i32v)p + ((i32v)shifted << 23));
}

FMREC_INLINE float sum(f32v x) {
#if defined(__AVX512F__)
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                                   _mm512_extractf32x8_ps((__m512)x, 1));
#elif defined(__AVX2__)
    const __m256 y = (__m256)x;
#endif
#if defined(__AVX2__)
    typedef float f32x4 __attribute__((vector_size(16)));
    const f32x4 z = (f32x4)_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#else
    const f32v z = x;
#endif
    return (z[0] + z[2]) + (z[1] + z[3]);
}

// Of a vector without NaN; of one with NaN, some number or NaN.
FMREC_INLINE float largest(f32v x) {
#if defined(__AVX512F__)
    const __m256 y = _mm256_max_ps(_mm512_castps512_ps256((__m512)x),
                                   _mm512_extractf32x8_ps((__m512)x, 1));
#elif defined(__AVX2__)
    const __m256 y = (__m256)x;
#endif
#if defined(__AVX2__)
    typedef float f32x4 __attribute__((vector_size(16)));
    const f32x4 z = (f32x4)_mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#else
    const f32v z = x;
#endif
    const float a = z[0] > z[2] ? z[0] : z[2], b = z[1] > z[3] ? z[1] : z[3];
    return a > b ? a : b;
}

}  // namespace
}  // namespace fmrec
