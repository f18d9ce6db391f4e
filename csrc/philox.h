// Philox4x32-10 and Box-Muller in vector registers: the noise stream of fmrec_fast/noise.py.
//
// Included by kernel translation units only; everything here has internal linkage, so that each
// instruction set keeps its own copy. Every choice below follows from one fact: x86 multiplies
// 32 x 32 -> 64 bits only in 64-bit lanes. A counter word therefore lives in a 64-bit lane of its
// own. The upper half of a lane holds whatever the last step left there: the multiply ignores it,
// so nothing ever has to mask it.
#pragma once

#include <stdint.h>

#include "vector.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two words packed into a 64-bit lane are read back as little-endian"
#endif

namespace fmrec {
namespace {

// Counters in one vector, and vectors in flight: one Philox round waits 7 cycles for itself, so
// several independent counters must be under way to keep the multipliers busy.
enum { LANES = FMREC_VECTOR_BYTES / 8, IN_FLIGHT = 4, COUNTERS = LANES * IN_FLIGHT };

// The low halves' 64-bit products.
FMREC_INLINE u64v multiply_low_halves(u64v a, u64v b) {
#if defined(__AVX512F__)
    return (u64v)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (u64v)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (u64v)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Lane l of a vector works for counter LANE_COUNTER(l) of the vector's LANES consecutive ones:
// the even lanes for the first half, the odd lanes for the second. So interleaving two vectors
// within each 128 bits, which is one cheap instruction, leaves the channels in order.
FMREC_INLINE int lane_counter(int lane) { return lane / 2 + (lane & 1) * (LANES / 2); }

#if defined(__AVX512F__)
FMREC_INLINE u64v interleave_low64(u64v a, u64v b) {
    return (u64v)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
}
FMREC_INLINE u64v interleave_high64(u64v a, u64v b) {
    return (u64v)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
}
FMREC_INLINE f32v interleave_low32(f32v a, f32v b) {
    return (f32v)_mm512_unpacklo_ps((__m512)a, (__m512)b);
}
FMREC_INLINE f32v interleave_high32(f32v a, f32v b) {
    return (f32v)_mm512_unpackhi_ps((__m512)a, (__m512)b);
}
#elif defined(__AVX2__)
FMREC_INLINE u64v interleave_low64(u64v a, u64v b) {
    return (u64v)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
}
FMREC_INLINE u64v interleave_high64(u64v a, u64v b) {
    return (u64v)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
}
FMREC_INLINE f32v interleave_low32(f32v a, f32v b) {
    return (f32v)_mm256_unpacklo_ps((__m256)a, (__m256)b);
}
FMREC_INLINE f32v interleave_high32(f32v a, f32v b) {
    return (f32v)_mm256_unpackhi_ps((__m256)a, (__m256)b);
}
#else
FMREC_INLINE u64v interleave_low64(u64v a, u64v b) { return u64v{a[0], b[0]}; }
FMREC_INLINE u64v interleave_high64(u64v a, u64v b) { return u64v{a[1], b[1]}; }
FMREC_INLINE f32v interleave_low32(f32v a, f32v b) { return f32v{a[0], b[0], a[1], b[1]}; }
FMREC_INLINE f32v interleave_high32(f32v a, f32v b) { return f32v{a[2], b[2], a[3], b[3]}; }
#endif

// Ten rounds over IN_FLIGHT vectors of counters c0..c3, in place. The key is one pair of words.
FMREC_INLINE void philox(u64v c0[IN_FLIGHT], u64v c1[IN_FLIGHT], u64v c2[IN_FLIGHT],
                         u64v c3[IN_FLIGHT], uint32_t k0, uint32_t k1) {
    const u64v m0 = broadcast64(0xD2511F53u), m1 = broadcast64(0xCD9E8D57u);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const u64v key0 = broadcast64(k0), key1 = broadcast64(k1);
#pragma GCC unroll 4
        for (int v = 0; v < IN_FLIGHT; ++v) {
            const u64v product0 = multiply_low_halves(c0[v], m0);
            const u64v product1 = multiply_low_halves(c2[v], m1);
            c0[v] = (product1 >> 32) ^ c1[v] ^ key0;
            c2[v] = (product0 >> 32) ^ c3[v] ^ key1;
            c1[v] = product1;
            c3[v] = product0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// Natural logarithm of a float32 in [1e-7, 1], to about an ulp: x = 2^e * (1 + z) with 1 + z in
// [sqrt(1/2), sqrt(2)), and log1p(z) by Cephes' polynomial, whose leading terms z - z^2/2 are kept
// apart so that the result is relatively exact near x = 1, where z is.
FMREC_INLINE f32v logarithm(f32v x) {
    i32v bits = (i32v)x;
    // Subtracting the bits of sqrt(1/2) makes the exponent field count from there.
    i32v e = (bits - 0x3F3504F3) >> 23;
    const f32v z = (f32v)(bits - (e << 23)) - 1.0f;
    const f32v exponent = __builtin_convertvector(e, f32v);
    f32v p = z * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * z + 1.1676998740e-1f;
    p = p * z - 1.2420140846e-1f;
    p = p * z + 1.4249322787e-1f;
    p = p * z - 1.6668057665e-1f;
    p = p * z + 2.0000714765e-1f;
    p = p * z - 2.4999993993e-1f;
    p = p * z + 3.3333331174e-1f;
    const f32v z2 = z * z;
    f32v tail = p * z * z2 + exponent * -2.12194440e-4f;
    tail = tail - 0.5f * z2;
    return (z + tail) + exponent * 0.693359375f;
}

// Sine and cosine of a float32 angle in [0, 2 pi], to about an ulp. The angle is reduced in
// radians, not in turns: the stream's definition rounds 2 pi u to float32 first, and starting
// from the rounded angle keeps the two within an ulp of each other.
FMREC_INLINE void sine_cosine(f32v angle, f32v* sine, f32v* cosine) {
    const i32v quadrant = __builtin_convertvector(angle * 0.636619772f + 0.5f, i32v);
    const f32v q = __builtin_convertvector(quadrant, f32v);
    // pi / 2 in three parts; the first two have so few bits that their products are exact.
    f32v r = angle - q * 1.5703125f;
    r = r - q * 4.8375129699707e-4f;
    r = r - q * 7.5495324e-8f;
    const f32v r2 = r * r;
    f32v s = r2 * -1.9515295891e-4f + 8.3321608736e-3f;
    s = s * r2 - 1.6666654611e-1f;
    s = s * r2 * r + r;
    f32v c = r2 * 2.443315711809948e-5f - 1.388731625493765e-3f;
    c = c * r2 + 4.166664568298827e-2f;
    c = c * r2 * r2 + (1.0f - 0.5f * r2);
    const i32v odd = (quadrant & 1) != 0;
    const i32v si = (i32v)s, ci = (i32v)c;
    const i32v sine_bits = (odd & ci) | (~odd & si), cosine_bits = (odd & si) | (~odd & ci);
    *sine = (f32v)(sine_bits ^ ((quadrant & 2) << 30));
    *cosine = (f32v)(cosine_bits ^ (((quadrant + 1) & 2) << 30));
}

// 32-bit words to [0, 1), as Triton's uint_to_uniform_float: -x - 1 is ~x.
FMREC_INLINE f32v to_uniform(u32v word) {
    const i32v x = (i32v)word;
    return __builtin_convertvector(x ^ (x >> 31), f32v) * 4.6566127342e-10f;
}

// The counters (group, position) of one row in row-major order, COUNTERS at a time. Groups are
// the channels' quadruples; consecutive counters run over the groups of one position, then over
// the next position's.
struct CounterWalk {
    // The first COUNTERS counters, in lane order, and what COUNTERS more add.
    uint64_t first_group[COUNTERS], first_position[COUNTERS];
    uint64_t groups, advance_groups, advance_positions;
    uint64_t offset, stride;
};

struct Counters {
    u64v group[IN_FLIGHT], position[IN_FLIGHT];
};

// Positions are held as the words offset + stride * i, so that a step is an addition; they wrap
// modulo 2^32 because only the lower halves of the lanes count.
static inline void make_walk(CounterWalk* walk, uint64_t groups, uint64_t offset, uint64_t stride) {
    walk->groups = groups;
    walk->offset = offset;
    walk->stride = stride;
    walk->advance_groups = COUNTERS % groups;
    walk->advance_positions = COUNTERS / groups * stride;
    for (int i = 0; i < COUNTERS; ++i) {
        const uint64_t counter = (uint64_t)(i / LANES * LANES + lane_counter(i % LANES));
        walk->first_group[i] = counter % groups;
        walk->first_position[i] = counter / groups * stride;
    }
}

// Moves on by `groups` within the position and `positions` (a multiple of the stride).
FMREC_INLINE void advance(const CounterWalk* walk, Counters* c, uint64_t groups,
                          uint64_t positions) {
#pragma GCC unroll 4
    for (int v = 0; v < IN_FLIGHT; ++v) {
        const u64v group = c->group[v] + groups;
        // All ones where the group ran over; signed, for AVX2 has no unsigned comparison.
        typedef int64_t i64v __attribute__((vector_size(FMREC_VECTOR_BYTES)));
        const u64v over = (u64v)((i64v)group >= (i64v)broadcast64(walk->groups));
        c->group[v] = group - (over & walk->groups);
        c->position[v] = c->position[v] + positions + (over & walk->stride);
    }
}

// The counters from number `start` of the row on.
FMREC_INLINE void start_walk(const CounterWalk* walk, Counters* c, uint64_t start) {
    __builtin_memcpy(c->group, walk->first_group, sizeof c->group);
    __builtin_memcpy(c->position, walk->first_position, sizeof c->position);
    advance(walk, c, start % walk->groups, walk->offset + start / walk->groups * walk->stride);
}

// The next COUNTERS counters' words, four u64v of IN_FLIGHT each, and moves on.
FMREC_INLINE void next_words(const CounterWalk* walk, Counters* c, uint32_t step, uint32_t row,
                             uint64_t seed, u64v w0[IN_FLIGHT], u64v w1[IN_FLIGHT],
                             u64v w2[IN_FLIGHT], u64v w3[IN_FLIGHT]) {
#pragma GCC unroll 4
    for (int v = 0; v < IN_FLIGHT; ++v) {
        w0[v] = c->group[v];
        w1[v] = c->position[v];
        w2[v] = broadcast64(step);
        w3[v] = broadcast64(row);
    }
    philox(w0, w1, w2, w3, (uint32_t)seed, (uint32_t)(seed >> 32));
    advance(walk, c, walk->advance_groups, walk->advance_positions);
}

FMREC_INLINE uint64_t round_up_counters(uint64_t count) {
    return (count + COUNTERS - 1) / COUNTERS * COUNTERS;
}

// Raw words of `count` counters (rounded up to COUNTERS) into words[4 * count], channel order.
static inline void fill_words(const CounterWalk* walk, uint64_t start, uint64_t count,
                              uint32_t step, uint32_t row, uint64_t seed, uint32_t* words) {
    Counters c;
    start_walk(walk, &c, start);
    for (uint64_t done = 0; done < count; done += COUNTERS) {
        u64v w0[IN_FLIGHT], w1[IN_FLIGHT], w2[IN_FLIGHT], w3[IN_FLIGHT];
        next_words(walk, &c, step, row, seed, w0, w1, w2, w3);
#pragma GCC unroll 4
        for (int v = 0; v < IN_FLIGHT; ++v) {
            const u64v a = (w0[v] & 0xFFFFFFFFu) | (w1[v] << 32);
            const u64v b = (w2[v] & 0xFFFFFFFFu) | (w3[v] << 32);
            uint32_t* target = words + 4 * done + 4 * LANES * v;
            store(target, interleave_low64(a, b));
            store(target + 2 * LANES, interleave_high64(a, b));
        }
    }
}

// mean + scale * normal of `count` counters (rounded up to COUNTERS), channel order.
static inline void fill_normals(const CounterWalk* walk, uint64_t start, uint64_t count,
                                uint32_t step, uint32_t row, uint64_t seed, float mean,
                                float scale, float* values) {
    Counters c;
    start_walk(walk, &c, start);
    for (uint64_t done = 0; done < count; done += COUNTERS) {
        u64v w0[IN_FLIGHT], w1[IN_FLIGHT], w2[IN_FLIGHT], w3[IN_FLIGHT];
        next_words(walk, &c, step, row, seed, w0, w1, w2, w3);
#pragma GCC unroll 4
        for (int v = 0; v < IN_FLIGHT; ++v) {
            // Both Box-Muller pairs of a counter side by side: (w0, w2) and (w1, w3).
            const u32v first = (u32v)((w0[v] & 0xFFFFFFFFu) | (w2[v] << 32));
            const u32v second = (u32v)((w1[v] & 0xFFFFFFFFu) | (w3[v] << 32));
            f32v u = to_uniform(first);
            const f32v smallest = broadcast(1.0e-7f);
            u = u > smallest ? u : smallest;
            const f32v radius = square_root(-2.0f * logarithm(u)) * scale;
            f32v sine, cosine;
            sine_cosine(to_uniform(second) * 6.283185307179586f, &sine, &cosine);
            const f32v even = mean + radius * cosine, odd = mean + radius * sine;
            float* target = values + 4 * done + 4 * LANES * v;
            store(target, interleave_low32(even, odd));
            store(target + 2 * LANES, interleave_high32(even, odd));
        }
    }
}

}  // namespace
}  // namespace fmrec
