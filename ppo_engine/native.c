/* The work of a layer between its matrix products, on a CPU, one walk over the memory each.
 *
 * Numbers are read and written in one format (fp32 or bf16) and computed in fp32. A row's result
 * does not depend on the rows beside it. `native.py` calls these functions and says what they
 * compute; they are compiled when the package is installed, once per instruction set, without an
 * OpenMP library: the one that PyTorch has loaded serves both.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Smaller work is done before other threads have woken up. */
#define FEW_NUMBERS 8192

/* The longest head that `attend_next` has room for. */
#define MOST_HEAD_NUMBERS 256

/* Keys whose scores are held at once. */
#define KEY_BLOCK 64

/* The most keys that `causal_softmax` has room for. */
#define MOST_KEYS 1024

/* Scores whose exponentials are held at once. */
#define CHUNK 256

/* Numbers that loops take at once; what is left of a row would be taken one by one. */
#define VECTOR 16

typedef struct {
    uint16_t bits;
} bf16;

static inline float bits_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float load_bf16(bf16 value) { return bits_as_float((uint32_t)value.bits << 16); }

/* To the nearest, ties to even. */
static inline bf16 store_bf16(float value) {
    uint32_t bits = float_as_bits(value);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bf16 result = {(uint16_t)(value != value ? 0x7fc0 : nearest)};
    return result;
}

static inline float load_fp32(float value) { return value; }

static inline float store_fp32(float value) { return value; }

/* e^x = 2^n · e^r with |r| <= ln 2 / 2, the latter by its Taylor series: within 2 units of the last
 * place from -87 to 88, and held there beyond. NaN stays NaN. */
static inline float exponential(float x) {
    const float round = 12582912.0f; /* 1.5 · 2^23: adding it rounds to an integer */
    float held = x < -87.0f ? -87.0f : x;
    held = held > 88.0f ? 88.0f : held;
    float shifted = held * 1.44269504f + round;
    float n = shifted - round;
    float r = held - n * 0.693145752f; /* ln 2 in two parts */
    r = r - n * 1.42860677e-6f;
    float series = 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    uint32_t power = (float_as_bits(shifted) - float_as_bits(round) + 127) << 23;
    return series * bits_as_float(power);
}

static inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* exp(z - top) of some scores; adds them up, and their products with z - top. Never inlined: copies
 * of the loop could add in different orders, and a token's log-probability must not depend on what
 * else is asked for. */
static __attribute__((noinline)) void weigh(
    const float *scores, float top, int64_t count, float *weights, float *total, float *spread) {
    float all = 0, all_spread = 0;
#pragma omp simd reduction(+ : all, all_spread)
    for (int64_t i = 0; i < count; i++) {
        weights[i] = exponential(scores[i] - top);
        all += weights[i];
        all_spread += weights[i] * (scores[i] - top);
    }
    *total += all;
    *spread += all_spread;
}

/* Makes weights, but for a common factor, of a query's first `seen` scores; the factor. There must
 * be room for whole vectors of them. */
static inline float weigh_seen(float *scores, int64_t seen) {
    int64_t whole = (seen + VECTOR - 1) / VECTOR * VECTOR;
    float top = -INFINITY, total = 0;
    for (int64_t i = seen; i < whole; i++) scores[i] = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < whole; i++) top = scores[i] > top ? scores[i] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < whole; i++) {
        scores[i] = exponential(scores[i] - top);
        total += scores[i];
    }
    return 1 / total;
}

#define NUMBER float
#define OF(name) name##_fp32
#include "native_kernels.h"
#undef NUMBER
#undef OF

#ifdef __AVX512BF16__
#define HAS_FASTER_ATTEND_HEADS
#endif
#define NUMBER bf16
#define OF(name) name##_bf16
#include "native_kernels.h"

#ifdef __AVX512BF16__
#include "native_products.h"
#endif
