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

// Each lane's low half of a, and above it that of b.
FMREC_INLINE u64v low_halves(u64v a, u64v b) {
#if defined(__AVX512F__)
    return (u64v)_mm512_mask_moveldup_ps((__m512)a, 0xAAAA, (__m512)b);
#elif defined(__AVX2__)
    return (u64v)_mm256_blend_ps((__m256)a, _mm256_moveldup_ps((__m256)b), 0xAA);
#else
    return (a & 0xFFFFFFFFu) | (b << 32);
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

const uint32_t MULTIPLIER0 = 0xD2511F53u, MULTIPLIER1 = 0xCD9E8D57u;
// What a round adds to the key's words.
const uint32_t KEY_STEP0 = 0x9E3779B9u, KEY_STEP1 = 0xBB67AE85u;

// What the counters of a call, (group, position, step, row), have in common: the key's two words,
// the row, and the product of the step in round 1.
struct StreamKey {
    uint32_t k0, k1, row;
    uint64_t step;
};

FMREC_INLINE StreamKey stream_key(uint32_t step, uint32_t row, uint64_t seed) {
    return {(uint32_t)seed, (uint32_t)(seed >> 32), row, (uint64_t)step * MULTIPLIER1};
}

// What three of the ten rounds make of the group alone. Round 1 multiplies the group and the step,
// round 2 what came of the position and of the group, and round 3 first what came of the group. So
// where counters share their group's, each has 16 of 20 multiplications left.
struct GroupRounds {
    u64v early, c0, c2, c3;  // the first goes into round 2's c2, the others into round 3's
};

FMREC_INLINE GroupRounds group_rounds(StreamKey key, u64v group) {
    const u64v m0 = broadcast64(MULTIPLIER0), m1 = broadcast64(MULTIPLIER1);
    const u64v p = multiply_low_halves(group, m0);
    const u64v q = multiply_low_halves((p >> 32) ^ broadcast64(key.row ^ key.k1), m1);
    const u64v r = multiply_low_halves(
        (q >> 32) ^ broadcast64((uint32_t)key.step ^ (key.k0 + KEY_STEP0)), m0);
    return {p ^ broadcast64(key.k1 + KEY_STEP1), q ^ broadcast64(key.k0 + 2 * KEY_STEP0),
            (r >> 32) ^ broadcast64(key.k1 + 2 * KEY_STEP1), r};
}

// The words c0..c3 of IN_FLIGHT vectors of counters.
FMREC_INLINE void philox(StreamKey key, const GroupRounds groups[IN_FLIGHT],
                         const u64v positions[IN_FLIGHT], u64v c0[IN_FLIGHT], u64v c1[IN_FLIGHT],
                         u64v c2[IN_FLIGHT], u64v c3[IN_FLIGHT]) {
    const u64v m0 = broadcast64(MULTIPLIER0), m1 = broadcast64(MULTIPLIER1);
    const u64v step = broadcast64((uint32_t)(key.step >> 32) ^ key.k0);
#pragma GCC unroll 4
    for (int v = 0; v < IN_FLIGHT; ++v) {
        const u64v p = multiply_low_halves(positions[v] ^ step, m0);
        c1[v] = multiply_low_halves((p >> 32) ^ groups[v].early, m1);
        c0[v] = (c1[v] >> 32) ^ groups[v].c0;
        c2[v] = p ^ groups[v].c2;
        c3[v] = groups[v].c3;
    }
#pragma GCC unroll 7
    for (uint32_t round = 3; round < 10; ++round) {
        const u64v key0 = broadcast64(key.k0 + round * KEY_STEP0);
        const u64v key1 = broadcast64(key.k1 + round * KEY_STEP1);
#pragma GCC unroll 4
        for (int v = 0; v < IN_FLIGHT; ++v) {
            const u64v product0 = multiply_low_halves(c0[v], m0);
            const u64v product1 = multiply_low_halves(c2[v], m1);
            c0[v] = (product1 >> 32) ^ c1[v] ^ key0;
            c2[v] = (product0 >> 32) ^ c3[v] ^ key1;
            c1[v] = product1;
            c3[v] = product0;
        }
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

// Whether the counters of whole positions share what the first rounds make of their groups.
FMREC_INLINE bool shares_groups(uint64_t groups) {
    return COUNTERS % groups == 0 || groups % COUNTERS == 0;
}

FMREC_INLINE uint64_t round_up_counters(uint64_t count) {
    return (count + COUNTERS - 1) / COUNTERS * COUNTERS;
}

// Calls finish(done, w0, w1, w2, w3) with the words of COUNTERS counters, number start + done the
// first of them, until `count` counters (rounded up to COUNTERS) had their turn.
template <typename Finish>
FMREC_INLINE void for_each_words(const CounterWalk* walk, uint64_t start, uint64_t count,
                                 StreamKey key, const Finish& finish) {
    u64v w0[IN_FLIGHT], w1[IN_FLIGHT], w2[IN_FLIGHT], w3[IN_FLIGHT];
    GroupRounds rounds[IN_FLIGHT];
    Counters c;
    start_walk(walk, &c, start);
    const uint64_t groups = walk->groups;
    const bool narrow = COUNTERS % groups == 0;
    if (narrow || (groups % COUNTERS == 0 && start % groups == 0 && count % groups == 0)) {
        // The same groups come again with every COUNTERS counters; or, of whole positions, they are
        // taken first for all of these, and then the next ones.
        const uint64_t ahead = narrow ? (uint64_t)COUNTERS : groups;
        const uint64_t positions = narrow ? walk->advance_positions : walk->stride;
        for (uint64_t first = 0; first < groups; first += COUNTERS) {
            Counters at = c;
#pragma GCC unroll 4
            for (int v = 0; v < IN_FLIGHT; ++v) rounds[v] = group_rounds(key, c.group[v] + first);
            for (uint64_t done = first; done < count; done += ahead) {
                philox(key, rounds, at.position, w0, w1, w2, w3);
                finish(done, w0, w1, w2, w3);
#pragma GCC unroll 4
                for (int v = 0; v < IN_FLIGHT; ++v) at.position[v] += positions;
            }
        }
        return;
    }
    for (uint64_t done = 0; done < count; done += COUNTERS) {
#pragma GCC unroll 4
        for (int v = 0; v < IN_FLIGHT; ++v) rounds[v] = group_rounds(key, c.group[v]);
        philox(key, rounds, c.position, w0, w1, w2, w3);
        finish(done, w0, w1, w2, w3);
        advance(walk, &c, walk->advance_groups, walk->advance_positions);
    }
}

// Raw words of `count` counters (rounded up to COUNTERS) into words[4 * count], channel order.
static inline void fill_words(const CounterWalk* walk, uint64_t start, uint64_t count,
                              uint32_t step, uint32_t row, uint64_t seed, uint32_t* words) {
    for_each_words(
        walk, start, count, stream_key(step, row, seed),
        [=](uint64_t done, const u64v* w0, const u64v* w1, const u64v* w2, const u64v* w3) {
#pragma GCC unroll 4
            for (int v = 0; v < IN_FLIGHT; ++v) {
                const u64v a = low_halves(w0[v], w1[v]), b = low_halves(w2[v], w3[v]);
                uint32_t* target = words + 4 * done + 4 * LANES * v;
                store(target, interleave_low64(a, b));
                store(target + 2 * LANES, interleave_high64(a, b));
            }
        });
}

// mean + scale * normal of `count` counters (rounded up to COUNTERS), channel order.
static inline void fill_normals(const CounterWalk* walk, uint64_t start, uint64_t count,
                                uint32_t step, uint32_t row, uint64_t seed, float mean,
                                float scale, float* values) {
    for_each_words(
        walk, start, count, stream_key(step, row, seed),
        [=](uint64_t done, const u64v* w0, const u64v* w1, const u64v* w2, const u64v* w3) {
#pragma GCC unroll 4
            for (int v = 0; v < IN_FLIGHT; ++v) {
                // Both Box-Muller pairs of a counter side by side: (w0, w2) and (w1, w3).
                const u32v first = (u32v)low_halves(w0[v], w2[v]);
                const u32v second = (u32v)low_halves(w1[v], w3[v]);
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
        });
}

}  // namespace
}  // namespace fmrec
