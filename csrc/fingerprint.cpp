#include "fingerprint.h"

#include "philox.h"

namespace fmrec {
namespace {

// Bytes ahead that a line is asked for: the processor's own prefetching ends at every page.
const int64_t AHEAD = 2048;

struct Sums {
    u64v first, second;
};

FMREC_INLINE u32v load_words(const void* source) {
    u32v value;
    __builtin_memcpy(&value, source, sizeof value);
    return value;
}

FMREC_INLINE u64v products(u32v words) {
    return multiply_low_halves((u64v)words, (u64v)words >> 32);
}

FMREC_INLINE void add_words(u32v words, const uint32_t* key, Sums* sums) {
    sums->first += products(words + load_words(key));
    sums->second += products(words + load_words(key + DIGESTED / 4));
}

void digest(const void* data, int64_t bytes, const uint32_t* key, uint64_t* digests) {
    const char* source = (const char*)data;
    for (int64_t begin = 0; begin < bytes; begin += DIGESTED, source += DIGESTED, digests += 2) {
        const int64_t size = bytes - begin < DIGESTED ? bytes - begin : DIGESTED;
        Sums even = {u64v{}, u64v{}}, odd = even;
        int64_t at = 0;
        for (; at + 2 * FMREC_VECTOR_BYTES <= size; at += 2 * FMREC_VECTOR_BYTES) {
            __builtin_prefetch(source + at + AHEAD);
            if (FMREC_VECTOR_BYTES == 64) __builtin_prefetch(source + at + AHEAD + 64);
            add_words(load_words(source + at), key + at / 4, &even);
            add_words(load_words(source + at + FMREC_VECTOR_BYTES),
                      key + (at + FMREC_VECTOR_BYTES) / 4, &odd);
        }
        for (; at < size; at += FMREC_VECTOR_BYTES) {
            u32v words = {};
            const int64_t left = size - at;
            __builtin_memcpy(&words, source + at,
                             (size_t)(left < FMREC_VECTOR_BYTES ? left : FMREC_VECTOR_BYTES));
            add_words(words, key + at / 4, &even);
        }
        const u64v first = even.first + odd.first, second = even.second + odd.second;
        digests[0] = digests[1] = 0;
        for (int lane = 0; lane < LANES; ++lane) {
            digests[0] += first[lane];
            digests[1] += second[lane];
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const FingerprintKernels fingerprint = {digest};
}

}  // namespace fmrec
