/* Products in bf16, summed up in fp32, of rows with a weight as models hold it, [outputs, width]:
 * nothing is packed or copied. Included by native.c for processors with AVX512-BF16, whose
 * instruction takes numbers below 2^-126 for 0.
 *
 * A row's result does not depend on the rows beside it.
 */

#include <immintrin.h>
#include <omp.h>

/* Rows, and outputs, whose sums are held in registers at once. */
#define TILE 4

/* Rows that are gone through while a tile of the weight is near; they stay in the first cache. */
#define NEAR_ROWS 16

/* Most outputs in a share of the work: their part of the weight stays in the second cache. */
#define SHARE 128

/* The most keys that `attend_rows` has room for. */
#define MOST_SEEN 256

/* Fewer multiplications are done before other threads have woken up. */
#define FEW_MULTIPLICATIONS 1048576

/* `count` rows of `width` numbers, `stride` numbers apart. */
typedef struct {
    const bf16 *numbers;
    int64_t count, width, stride;
} matrix;

/* The tile's first rows from `first` on; behind the end the last one once more. */
static inline void rows_from(matrix from, int64_t first, const bf16 *rows[TILE]) {
    for (int i = 0; i < TILE; i++) {
        int64_t row = first + i < from.count ? first + i : from.count - 1;
        rows[i] = from.numbers + row * from.stride;
    }
}

/* Adds the products of four rows of `left` with four of `right` to a tile's sums. */
static inline void add_products(
    __m512 sums[TILE][TILE], const matrix left, int64_t row, const matrix right, int64_t output) {
    const bf16 *rows[TILE], *outputs[TILE];
    rows_from(left, row, rows);
    rows_from(right, output, outputs);
    for (int64_t k = 0; k < right.width; k += 32) {
        int64_t left_over = right.width - k;
        __mmask32 there = left_over < 32 ? (1u << left_over) - 1 : ~0u;
        __m512bh of_rows[TILE];
#pragma GCC unroll 4
        for (int r = 0; r < TILE; r++) {
            of_rows[r] = (__m512bh)_mm512_maskz_loadu_epi16(there, rows[r] + k);
        }
#pragma GCC unroll 4
        for (int o = 0; o < TILE; o++) {
            __m512bh of_output = (__m512bh)_mm512_maskz_loadu_epi16(there, outputs[o] + k);
            /* Of the next tile; from memory a weight would come too late otherwise. */
            _mm_prefetch((const char *)(outputs[o] + k + TILE * right.stride), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int r = 0; r < TILE; r++) {
                sums[r][o] = _mm512_dpbf16_ps(sums[r][o], of_rows[r], of_output);
            }
        }
    }
}

static inline void clear(__m512 sums[TILE][TILE]) {
    for (int r = 0; r < TILE; r++) {
        for (int o = 0; o < TILE; o++) sums[r][o] = _mm512_setzero_ps();
    }
}

/* Sums within each 128 bits of four vectors, side by side there. */
static inline __m512 quarter_sums(const __m512 four[TILE]) {
    __m512 first = _mm512_add_ps(
        _mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
    __m512 second = _mm512_add_ps(
        _mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3]));
    __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
    return _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

/* The sum of every vector, row by row. */
static inline __m512 all_sums(const __m512 vectors[TILE][TILE]) {
    __m512 a = quarter_sums(vectors[0]), b = quarter_sums(vectors[1]);
    __m512 c = quarter_sums(vectors[2]), d = quarter_sums(vectors[3]);
    __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 second =
        _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    return _mm512_add_ps(
        _mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
}

typedef struct {
    /* Added to the sums; each may be absent. */
    const float *bias; /* [outputs] */
    const bf16 *onto;  /* [rows, outputs] */
    float divisor;
    /* [rows, outputs]; the one that is there is set. */
    float *wide;
    bf16 *narrow;
} target;

static inline void finish(
    const target to, __m512 sums, int64_t row, int64_t rows, int64_t output, int64_t outputs) {
    float found[TILE][TILE];
    _mm512_storeu_ps((float *)found, sums);
    __mmask8 there = outputs - output < TILE ? (1u << (outputs - output)) - 1 : 0xf;
    for (int r = 0; r < TILE && row + r < rows; r++) {
        int64_t place = (row + r) * outputs + output;
        __m128 y = _mm_loadu_ps(found[r]);
        if (to.bias != NULL) y = _mm_add_ps(y, _mm_maskz_loadu_ps(there, to.bias + output));
        if (to.onto != NULL) {
            __m128i bits = _mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(there, to.onto + place));
            y = _mm_add_ps(y, _mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
        }
        if (to.divisor != 1) y = _mm_div_ps(y, _mm_set1_ps(to.divisor));
        if (to.wide != NULL) {
            _mm_mask_storeu_ps(to.wide + place, there, y);
        } else {
            _mm_mask_storeu_epi16(to.narrow + place, there, (__m128i)_mm_cvtneps_pbh(y));
        }
    }
}

/* (x·Wᵀ + inner·Upᵀ + bias + onto)/divisor, for x [rows, width], inner [rows, rank],
 * Up [outputs, rank]; without `inner` if the rank is 0. */
void product_bf16(
    const bf16 *x, const bf16 *weight, const bf16 *inner, const bf16 *up, const float *bias,
    const bf16 *onto, float divisor, float *wide, bf16 *narrow, int64_t rows, int64_t outputs,
    int64_t width, int64_t rank) {
    const matrix left = {x, rows, width, width}, right = {weight, outputs, width, width};
    const matrix low = {inner, rows, rank, rank}, high = {up, outputs, rank, rank};
    const target to = {bias, onto, divisor, wide, narrow};
    /* Whole tiles of outputs, as many to every thread; other work may slow one of them down. */
    int64_t threads = omp_get_max_threads(), tiles = (outputs + TILE - 1) / TILE;
    int64_t shares = threads * ((outputs + threads * SHARE - 1) / (threads * SHARE));
    int64_t share = (tiles + shares - 1) / shares * TILE;
#pragma omp parallel for schedule(dynamic) if (rows * outputs * width > FEW_MULTIPLICATIONS)
    for (int64_t first = 0; first < outputs; first += share) {
        int64_t last = first + share < outputs ? first + share : outputs;
        for (int64_t near = 0; near < rows; near += NEAR_ROWS) {
            int64_t end = near + NEAR_ROWS < rows ? near + NEAR_ROWS : rows;
            for (int64_t output = first; output < last; output += TILE) {
                for (int64_t row = near; row < end; row += TILE) {
                    __m512 sums[TILE][TILE];
                    clear(sums);
                    add_products(sums, left, row, right, output);
                    if (rank) add_products(sums, low, row, high, output);
                    finish(to, all_sums(sums), row, rows, output, outputs);
                }
            }
        }
    }
}

/* Softmax of a query's first `seen` scores, into probabilities [room]; the scores are used up. */
static inline void weigh_keys(float *scores, bf16 *probabilities, int64_t seen, int64_t room) {
    __m512 share = _mm512_set1_ps(weigh_seen(scores, seen));
    for (int64_t i = 0; i < seen; i += VECTOR) {
        __m512 some = _mm512_mul_ps(share, _mm512_loadu_ps(scores + i));
        _mm256_storeu_si256((__m256i *)(probabilities + i), (__m256i)_mm512_cvtneps_pbh(some));
    }
    memset(probabilities + seen, 0, (room - seen) * sizeof(bf16));
}

/* Causal attention of sequences [rows, columns], which stand in qkv and in the result from the
 * token `first` on; all of them also see the first `prefix` tokens.
 *
 * qkv [tokens, (queries + 2 · groups) · size], rotated; result [tokens, queries · size]. A sequence
 * sees at most MOST_SEEN keys; `size` is a multiple of TILE, at most MOST_HEAD_NUMBERS. */
void attend_rows_bf16(
    const bf16 *qkv, bf16 *result, float scale, int64_t first, int64_t rows, int64_t columns,
    int64_t prefix, int64_t queries, int64_t groups, int64_t size) {
    int64_t stride = (queries + 2 * groups) * size, each = queries / groups;
    int64_t keys = prefix + columns, room = (keys + 31) / 32 * 32;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t sequence = 0; sequence < rows; sequence++) {
        for (int64_t group = 0; group < groups; group++) {
            int64_t start = first + sequence * columns;
            bf16 near_keys[MOST_SEEN * MOST_HEAD_NUMBERS];
            bf16 values[MOST_HEAD_NUMBERS * MOST_SEEN]; /* [size, room] */
            for (int64_t k = 0; k < keys; k++) {
                int64_t token = k < prefix ? k : start + k - prefix;
                const bf16 *key = qkv + token * stride + (queries + group) * size;
                const bf16 *value = key + groups * size;
                memcpy(near_keys + k * size, key, size * sizeof(bf16));
                for (int64_t i = 0; i < size; i++) values[i * room + k] = value[i];
            }
            for (int64_t i = 0; i < size; i++) {
                memset(values + i * room + keys, 0, (room - keys) * sizeof(bf16));
            }
            const matrix all_keys = {near_keys, keys, size, size};
            for (int64_t head = group * each; head < (group + 1) * each; head++) {
                const matrix asking = {qkv + start * stride + head * size, columns, size, stride};
                bf16 *out = result + (start * queries + head) * size;
                for (int64_t place = 0; place < columns; place += TILE) {
                    int64_t here = columns - place < TILE ? columns - place : TILE;
                    int64_t seen = prefix + place + here, wide = (seen + 31) / 32 * 32;
                    float scores[TILE][MOST_SEEN + VECTOR];
                    bf16 probabilities[TILE][MOST_SEEN + VECTOR];
                    __m512 sums[TILE][TILE];
                    float found[TILE][TILE];
                    for (int64_t key = 0; key < seen; key += TILE) {
                        clear(sums);
                        add_products(sums, asking, place, all_keys, key);
                        __m512 some = _mm512_mul_ps(all_sums(sums), _mm512_set1_ps(scale));
                        _mm512_storeu_ps((float *)found, some);
                        for (int r = 0; r < TILE; r++) {
                            memcpy(scores[r] + key, found[r], sizeof found[r]);
                        }
                    }
                    for (int64_t r = 0; r < here; r++) {
                        weigh_keys(scores[r], probabilities[r], prefix + place + r + 1, wide);
                    }
                    const matrix weights = {probabilities[0], here, wide, MOST_SEEN + VECTOR};
                    const matrix mixed = {values, size, wide, room};
                    for (int64_t i = 0; i < size; i += TILE) {
                        clear(sums);
                        add_products(sums, weights, 0, mixed, i);
                        _mm512_storeu_ps((float *)found, all_sums(sums));
                        for (int64_t r = 0; r < here; r++) {
                            __m128i rounded = (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(found[r]));
                            _mm_storel_epi64(
                                (__m128i *)(out + (place + r) * queries * size + i), rounded);
                        }
                    }
                }
            }
        }
    }
}
