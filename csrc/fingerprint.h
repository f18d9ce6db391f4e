// A hash of bytes that tells whether any of them has changed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.h"

namespace fmrec {

// Bytes that become one digest of two words, and the levels of digests of digests: a fifth level
// serves 2^39 bytes.
constexpr int64_t DIGESTED = 2048, DIGEST_WORDS = 2, LEVELS = 5;
constexpr int64_t DIGEST_KEY = DIGEST_WORDS * DIGESTED / 4;  // uint32_t, of one level

struct FingerprintKernels {
    // The digests of `bytes` bytes, a multiple of 4, piece by piece; the last piece may be shorter.
    void (*digest)(const void* data, int64_t bytes, const uint32_t* key, uint64_t* digests);
};

FMREC_DECLARE_TABLE(FingerprintKernels, fingerprint)

struct Bytes {
    const void* data;
    int64_t size;  // a multiple of 4
};

struct Fingerprint {
    uint64_t words[DIGEST_WORDS];
};

// A piece of words m_0, m_1, ... has the digest sum_i (m_2i + k_2i) (m_2i+1 + k_2i+1), the additions
// modulo 2^32 and the sum modulo 2^64, under two independent keys k (NH, the universal hash of UMAC);
// the digests of all pieces are hashed alike, level by level, until one is left. Two different
// contents of the same parts have the same digest with a chance of at most 2^-64 a level, whatever
// they are, because the keys are random and unknown to who wrote them: 2^-61 in all. The keys are
// drawn once a process, so that a fingerprint says nothing to another one.
Fingerprint fingerprint(const std::vector<Bytes>& parts);

}  // namespace fmrec
