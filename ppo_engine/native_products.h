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

/* Fewer multiplications are done before other threads have woken up. */
#define FEW_MULTIPLICATIONS 1048576

typedef struct {
    const bf16 *numbers;
    int64_t count, width;
} matrix;

/* The tile's first rows from `first` on; behind the end the last one once more. */
static inline void rows_from(matrix from, int64_t first, const bf16 *rows[TILE]) {
    for (int i = 0; i < TILE; i++) {
        int64_t row = first + i < from.count ? first + i : from.count - 1;
        rows[i] = from.numbers + row * from.width;
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
            _mm_prefetch((const char *)(outputs[o] + k + TILE * right.width), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int r = 0; r < TILE; r++) {
                sums[r][o] = _mm512_dpbf16_ps(sums[r][o], of_rows[r], of_output);
            }
        }
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
    const matrix left = {x, rows, width}, right = {weight, outputs, width};
    const matrix low = {inner, rows, rank}, high = {up, outputs, rank};
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
                    for (int r = 0; r < TILE; r++) {
                        for (int o = 0; o < TILE; o++) sums[r][o] = _mm512_setzero_ps();
                    }
                    add_products(sums, left, row, right, output);
                    if (rank) add_products(sums, low, row, high, output);
                    finish(to, all_sums(sums), row, rows, output, outputs);
                }
            }
        }
    }
}
