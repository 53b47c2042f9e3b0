/* Products in bf16, summed up in fp32, and what is made of them; weights are read as models hold them,
 * [outputs, width], and no copy of them is kept. Included by native.c for processors with AVX512-BF16,
 * whose instruction takes numbers below 2^-126 for 0.
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

/* Rows whose sums with the columns of a panel are held in registers at once. */
#define HIGHEST 12
#define PANEL 32

/* Most rows that meet a panel, and its greatest depth; it stays in the second cache. */
#define MANY_ROWS 1008
#define DEEPEST 1536

/* Numbers, and rows, by which those for a panel are asked for ahead: from memory they would come too
 * late otherwise. */
#define AHEAD 128
#define ROWS_AHEAD 16

/* So few outputs are not shared among threads. */
#define FEW_OUTPUTS 64

/* Rows of a share of the work where rows are shared. */
#define ROW_SHARE 64

/* Vectors of columns in a block of a narrow product, and rows that are held in pairs there. */
#define NARROW 4
#define PAIR_ROWS 512

/* The most low-rank additions of a group of layers. */
#define MOST_PARTS 8

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
    /* [rows, outputs], rows `stride` numbers apart, as in `onto`; the one that is there is set. */
    float *wide;
    bf16 *narrow;
    int64_t stride;
} target;

static inline void finish(
    const target to, __m512 sums, int64_t row, int64_t rows, int64_t output, int64_t outputs) {
    float found[TILE][TILE];
    _mm512_storeu_ps((float *)found, sums);
    __mmask8 there = outputs - output < TILE ? (1u << (outputs - output)) - 1 : 0xf;
    for (int r = 0; r < TILE && row + r < rows; r++) {
        int64_t place = (row + r) * to.stride + output;
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
 * Up [outputs, rank]; without `inner` if the rank is 0. Rows of x are `stride` numbers apart, those
 * of the result and of `onto` `result_stride`. */
void product_bf16(
    const bf16 *x, const bf16 *weight, const bf16 *inner, const bf16 *up, const float *bias,
    const bf16 *onto, float divisor, float *wide, bf16 *narrow, int64_t rows, int64_t outputs,
    int64_t width, int64_t rank, int64_t stride, int64_t result_stride) {
    const matrix left = {x, rows, width, stride}, right = {weight, outputs, width, width};
    const matrix low = {inner, rows, rank, rank}, high = {up, outputs, rank, rank};
    const target to = {bias, onto, divisor, wide, narrow, result_stride};
    /* Whole tiles of outputs, as many to every thread; other work may slow one of them down. Few
     * outputs are too few to share, so their rows are. */
    int64_t threads = omp_get_max_threads(), tiles = (outputs + TILE - 1) / TILE;
    int64_t shares = threads * ((outputs + threads * SHARE - 1) / (threads * SHARE));
    int64_t share = (tiles + shares - 1) / shares * TILE, some_rows = rows;
    if (outputs <= FEW_OUTPUTS) {
        share = outputs;
        some_rows = ROW_SHARE;
    }
#pragma omp parallel for collapse(2) schedule(dynamic) if (rows * outputs * width > FEW_MULTIPLICATIONS)
    for (int64_t first = 0; first < outputs; first += share) {
        for (int64_t first_row = 0; first_row < rows; first_row += some_rows) {
            int64_t last = first + share < outputs ? first + share : outputs;
            int64_t last_row = first_row + some_rows < rows ? first_row + some_rows : rows;
            for (int64_t near = first_row; near < last_row; near += NEAR_ROWS) {
                int64_t end = near + NEAR_ROWS < last_row ? near + NEAR_ROWS : last_row;
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
}

static inline __m512 widened(__m256i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

static inline __mmask16 first_of(int64_t count) {
    return count < VECTOR ? (__mmask16)((1u << count) - 1) : (__mmask16)0xffff;
}

/* `finish` for up to 16 outputs of one row. */
static inline void finish_vector(
    const target to, __m512 y, int64_t row, int64_t output, int64_t outputs) {
    if (output >= outputs) return;
    __mmask16 there = first_of(outputs - output);
    int64_t place = row * to.stride + output;
    if (to.bias != NULL) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(there, to.bias + output));
    if (to.onto != NULL) {
        y = _mm512_add_ps(y, widened(_mm256_maskz_loadu_epi16(there, to.onto + place)));
    }
    if (to.divisor != 1) y = _mm512_div_ps(y, _mm512_set1_ps(to.divisor));
    if (to.wide != NULL) {
        _mm512_mask_storeu_ps(to.wide + place, there, y);
    } else {
        _mm256_mask_storeu_epi16(to.narrow + place, there, (__m256i)_mm512_cvtneps_pbh(y));
    }
}

/* Two numbers that stand side by side. */
static inline __m512i both(const bf16 *numbers) {
    int32_t pair;
    memcpy(&pair, numbers, sizeof pair);
    return _mm512_set1_epi32(pair);
}

/* 16 rows of 16 pairs become 16 columns of them. */
static inline void transpose(__m512i rows[VECTOR]) {
    __m512i half[VECTOR];
#pragma GCC unroll 8
    for (int i = 0; i < VECTOR; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTOR; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        half[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        half[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        half[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        half[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0xdd);
    }
}

/* A matrix [depth, columns], or its transpose, rows `stride` numbers apart. */
typedef struct {
    const bf16 *numbers;
    int64_t depth, columns, stride;
    int is_transposed;
} factor;

/* PANEL columns from `column` on, of `depth` rows from `first` on, two rows at a time: of every
 * column the pair. What is behind the last column is never used. */
static inline void pack(
    __m512i *panel, const factor from, int64_t column, int64_t first, int64_t depth) {
    int64_t left_over = from.columns - column;
    if (!from.is_transposed) {
        __mmask32 there = left_over < PANEL ? (1u << left_over) - 1 : ~0u;
        /* Unpacking takes every other four numbers. */
        const __m512i first_half = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i second_half = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        const bf16 *row = from.numbers + first * from.stride + column;
        for (int64_t k = 0; k < depth; k += 2, row += 2 * from.stride, panel += 2) {
            __m512i one = _mm512_maskz_loadu_epi16(there, row), other = _mm512_setzero_si512();
            if (k + 1 < depth) other = _mm512_maskz_loadu_epi16(there, row + from.stride);
            _mm_prefetch((const char *)(row + ROWS_AHEAD * from.stride), _MM_HINT_T0);
            _mm_prefetch((const char *)(row + (ROWS_AHEAD + 1) * from.stride), _MM_HINT_T0);
            __m512i low = _mm512_unpacklo_epi16(one, other);
            __m512i high = _mm512_unpackhi_epi16(one, other);
            panel[0] = _mm512_permutex2var_epi64(low, first_half, high);
            panel[1] = _mm512_permutex2var_epi64(low, second_half, high);
        }
        return;
    }
    for (int64_t k = 0; k < depth; k += 32, panel += 2 * VECTOR) {
        __mmask32 there = depth - k < 32 ? (1u << (depth - k)) - 1 : ~0u;
        int64_t pairs = depth - k < 32 ? (depth - k + 1) / 2 : VECTOR;
        for (int half = 0; half < 2; half++) {
            __m512i rows[VECTOR];
            for (int i = 0; i < VECTOR; i++) {
                int64_t place = half * VECTOR + i < left_over ? half * VECTOR + i : left_over - 1;
                const bf16 *row = from.numbers + (column + place) * from.stride + first + k;
                rows[i] = _mm512_maskz_loadu_epi16(there, row);
                _mm_prefetch((const char *)(row + AHEAD), _MM_HINT_T0);
            }
            transpose(rows);
            for (int64_t i = 0; i < pairs; i++) panel[2 * i + half] = rows[i];
        }
    }
}

/* Asks for what `pack` will read, 64 bytes each time: from `line` up to `end` of `depth` lines. */
static inline void ask_for(
    const factor from, int64_t column, int64_t first, int64_t depth, int64_t line, int64_t end) {
    for (; line < end && line < depth; line++) {
        int64_t place = from.is_transposed
                            ? (column + line % PANEL) * from.stride + first + line / PANEL * PANEL
                            : (first + line) * from.stride + column;
        _mm_prefetch((const char *)(from.numbers + place), _MM_HINT_T1);
    }
}

/* Rows of a left factor, `stride` numbers apart, and a panel of as deep a right one. */
typedef struct {
    const bf16 *left;
    int64_t stride, depth;
    const __m512i *panel;
} panel_product;

/* Rows of a product with a panel; the first `rows` of the left factors' are taken. */
typedef struct {
    int64_t rows;
    /* Both are added up; the second one may have no depth. */
    panel_product main, low;
    /* Sums so far, and where they go unless these are all; [rows, PANEL]. */
    const float *before;
    float *after;
} tile;

static inline __attribute__((always_inline)) void add_panel(
    const int high, const panel_product of, int64_t rows, __m512 *first, __m512 *second) {
    const bf16 *left[HIGHEST];
#pragma GCC unroll 12
    for (int r = 0; r < high; r++) left[r] = of.left + (r < rows ? r : rows - 1) * of.stride;
    int64_t k = 0;
    for (; k + 1 < of.depth; k += 2) {
        __m512bh one = (__m512bh)of.panel[k], other = (__m512bh)of.panel[k + 1];
#pragma GCC unroll 12
        for (int r = 0; r < high; r++) {
            __m512bh pair = (__m512bh)both(left[r] + k);
            first[r] = _mm512_dpbf16_ps(first[r], pair, one);
            second[r] = _mm512_dpbf16_ps(second[r], pair, other);
        }
    }
    if (k < of.depth) {
#pragma GCC unroll 12
        for (int r = 0; r < high; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32(left[r][k].bits);
            first[r] = _mm512_dpbf16_ps(first[r], pair, (__m512bh)of.panel[k]);
            second[r] = _mm512_dpbf16_ps(second[r], pair, (__m512bh)of.panel[k + 1]);
        }
    }
}

static inline __attribute__((always_inline)) void multiply_tile(
    const int high, const tile of, const target to, int64_t row, int64_t column, int64_t columns) {
    __m512 first[HIGHEST], second[HIGHEST];
#pragma GCC unroll 12
    for (int r = 0; r < high; r++) {
        first[r] = second[r] = _mm512_setzero_ps();
        if (of.before != NULL && r < of.rows) {
            first[r] = _mm512_loadu_ps(of.before + r * PANEL);
            second[r] = _mm512_loadu_ps(of.before + r * PANEL + VECTOR);
        }
    }
    add_panel(high, of.main, of.rows, first, second);
    if (of.low.depth) add_panel(high, of.low, of.rows, first, second);
#pragma GCC unroll 12
    for (int r = 0; r < high; r++) {
        if (r >= of.rows) continue;
        if (of.after != NULL) {
            _mm512_storeu_ps(of.after + r * PANEL, first[r]);
            _mm512_storeu_ps(of.after + r * PANEL + VECTOR, second[r]);
        } else {
            finish_vector(to, first[r], row + r, column, columns);
            finish_vector(to, second[r], row + r, column + VECTOR, columns);
        }
    }
}

/* As many of the rows as fit into a tile, with a panel from `column` on; how many there were room for.
 * `row` is the first one's number in the result. */
static __attribute__((noinline)) int64_t multiply_some(
    const tile of, const target to, int64_t row, int64_t column, int64_t columns) {
    if (of.rows >= HIGHEST) {
        multiply_tile(HIGHEST, of, to, row, column, columns);
        return HIGHEST;
    }
    multiply_tile(TILE, of, to, row, column, columns);
    return TILE;
}

/* A part of a low-rank product: columns of `inner` from the first rank on, times numbers [ranks,
 * columns], onto columns of the result. */
typedef struct {
    int64_t first_column, end_column, first_rank, end_rank;
} part;

/* The low-rank product's share of a panel: its parts beside each other, 0 between them. Returns how
 * many ranks it takes, from `first_rank` on. */
static inline int64_t pack_parts(
    __m512i *panel, const bf16 *numbers, const part *parts, int64_t count, int64_t column,
    int64_t *first_rank) {
    int64_t first = -1, end = 0;
    for (int64_t i = 0; i < count; i++) {
        if (parts[i].end_column <= column || parts[i].first_column >= column + PANEL) continue;
        if (first < 0) first = parts[i].first_rank;
        end = parts[i].end_rank;
    }
    if (first < 0) return 0;
    memset(panel, 0, (end - first + 1) / 2 * 2 * sizeof *panel);
    for (int64_t i = 0; i < count; i++) {
        int64_t columns = parts[i].end_column - parts[i].first_column;
        for (int64_t rank = parts[i].first_rank; rank < parts[i].end_rank; rank++) {
            const bf16 *row = numbers + (rank - parts[i].first_rank) * columns;
            bf16 *to = (bf16 *)(panel + (rank - first) / 2 * 2) + (rank - first) % 2;
            int64_t from = column > parts[i].first_column ? column : parts[i].first_column;
            int64_t last = column + PANEL < parts[i].end_column ? column + PANEL : parts[i].end_column;
            for (int64_t c = from; c < last; c++) {
                to[2 * (c - column)] = row[c - parts[i].first_column];
            }
        }
        numbers += columns * (parts[i].end_rank - parts[i].first_rank);
    }
    *first_rank = first;
    return end - first;
}

/* Number of the next share of some work, for a thread of a team whose first shares are their own
 * numbers; so many more are taken. */
static inline int64_t take(int64_t *taken) {
    return omp_get_num_threads() + __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
}

/* Columns of inner [rows, ranks] times numbers one after the other in `ups`; at most DEEPEST ranks. */
typedef struct {
    const bf16 *inner, *ups;
    int64_t ranks;
    const part *parts;
    int64_t count;
} low_rank_product;

/* What `to` says of left·right + a low-rank product for many rows: left [rows, depth], right [depth,
 * columns]. A panel of the right factor is brought into order, and then meets all rows of a share; in
 * the meantime the next one is asked for, as from memory it would come too late. */
static void multiply_many(
    const bf16 *left, int64_t left_stride, int64_t rows, const factor from, const low_rank_product low,
    const target to) {
    int64_t depth = from.depth, columns = from.columns;
    if (rows == 0) return;
    /* As many rows in every share, in whole tiles. */
    int64_t row_shares = (rows + MANY_ROWS - 1) / MANY_ROWS;
    int64_t some_rows = ((rows + row_shares - 1) / row_shares + HIGHEST - 1) / HIGHEST * HIGHEST;
    int64_t shares = (columns + PANEL - 1) / PANEL * row_shares, taken = 0;
#pragma omp parallel
    for (int64_t share = omp_get_thread_num(), next; share < shares; share = next) {
        __m512i panel[DEEPEST], low_panel[DEEPEST];
        float sums[MANY_ROWS * PANEL];
        int64_t column = share / row_shares * PANEL, near = share % row_shares * some_rows;
        int64_t here = rows - near < some_rows ? rows - near : some_rows;
        int64_t tiles = (here + HIGHEST - 1) / HIGHEST;
        next = take(&taken);
        for (int64_t first = 0; first < depth; first += DEEPEST) {
            int64_t deep = depth - first < DEEPEST ? depth - first : DEEPEST;
            int64_t low_depth = 0, first_rank = 0, asked = 0, lines = (deep + tiles - 1) / tiles;
            int is_last = first + deep == depth;
            pack(panel, from, column, first, deep);
            if (is_last) {
                low_depth =
                    pack_parts(low_panel, low.ups, low.parts, low.count, column, &first_rank);
            }
            for (int64_t row = 0; row < here; asked += lines) {
                int64_t place = near + row;
                float *held = sums + row * PANEL;
                tile of = {
                    here - row,
                    {left + place * left_stride + first, left_stride, deep, panel},
                    {low.inner + place * low.ranks + first_rank, low.ranks, low_depth, low_panel},
                    first ? held : NULL,
                    is_last ? NULL : held};
                if (next < shares) {
                    ask_for(from, next / row_shares * PANEL, first, deep, asked, asked + lines);
                }
                row += multiply_some(of, to, place, column, columns);
            }
        }
    }
}

/* (left·right + bias + onto)/divisor for many rows: left [rows, depth], right [depth, columns] or, if
 * it is transposed, [columns, depth]; rows of each are so many numbers apart. */
void large_product_bf16(
    const bf16 *left, const bf16 *right, const float *bias, const bf16 *onto, float divisor,
    float *wide, bf16 *narrow, int64_t rows, int64_t columns, int64_t depth, int64_t left_stride,
    int64_t right_stride, int64_t is_transposed) {
    const factor from = {right, depth, columns, right_stride, is_transposed != 0};
    const target to = {bias, onto, divisor, wide, narrow, columns};
    multiply_many(left, left_stride, rows, from, (low_rank_product){0}, to);
}

/* Of two rows of up to 16 numbers the first, the first, the second, the second, … */
static inline __m512i in_pairs(const bf16 *one, const bf16 *other, __mmask16 there) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, one));
    if (other == NULL) return low;
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, other));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Sums of up to VECTOR ranks with NARROW vectors of columns: by vector, rank and column. */
typedef float block_sums[NARROW][VECTOR][VECTOR];

/* Adds leftᵀ·right of so many rows; the sums are of `ranks` columns of the left factor and `columns`
 * of the right one. */
static void add_transposed_product(
    block_sums sums, const bf16 *left, int64_t left_stride, const bf16 *right, int64_t right_stride,
    int64_t rows, int64_t ranks, int64_t columns) {
    __mmask16 of_ranks = first_of(ranks);
    for (int64_t start = 0; start < rows; start += PAIR_ROWS) {
        int64_t end = start + PAIR_ROWS < rows ? start + PAIR_ROWS : rows;
        int32_t pairs[PAIR_ROWS / 2][VECTOR];
        for (int64_t row = start; row < end; row += 2) {
            const bf16 *one = left + row * left_stride;
            __m512i of_row = in_pairs(one, row + 1 < end ? one + left_stride : NULL, of_ranks);
            _mm512_storeu_si512(pairs[(row - start) / 2], of_row);
        }
        for (int64_t part = 0; part * VECTOR < columns; part++) {
            __mmask16 there = first_of(columns - part * VECTOR);
            __m512 found[VECTOR];
#pragma GCC unroll 16
            for (int i = 0; i < VECTOR; i++) found[i] = _mm512_loadu_ps(sums[part][i]);
            for (int64_t row = start; row < end; row += 2) {
                const bf16 *one = right + row * right_stride + part * VECTOR;
                __m512bh numbers =
                    (__m512bh)in_pairs(one, row + 1 < end ? one + right_stride : NULL, there);
                const int32_t *pair = pairs[(row - start) / 2];
#pragma GCC unroll 16
                for (int i = 0; i < VECTOR; i++) {
                    found[i] = _mm512_dpbf16_ps(
                        found[i], numbers, (__m512bh)_mm512_set1_epi32(pair[i]));
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < VECTOR; i++) _mm512_storeu_ps(sums[part][i], found[i]);
        }
    }
}

/* A product leftᵀ·right in fp32, times a factor: of rows of `ranks` numbers and rows of `columns`
 * numbers, so many numbers apart; the result is [ranks, columns] or, transposed, [columns, ranks]. */
typedef struct {
    const bf16 *left, *right;
    int64_t left_stride, right_stride;
    float *result;
    int64_t ranks, columns;
    float factor;
    int is_transposed;
} narrow_product;

static inline void put(
    const narrow_product *to, const block_sums sums, int64_t rank, int64_t first_column) {
    int64_t ranks = to->ranks - rank < VECTOR ? to->ranks - rank : VECTOR;
    for (int part = 0; part < NARROW; part++) {
        int64_t column = first_column + part * VECTOR, columns = to->columns - column;
        if (columns <= 0) return;
        __m512i found[VECTOR];
        for (int i = 0; i < VECTOR; i++) {
            __m512 some = _mm512_mul_ps(_mm512_loadu_ps(sums[part][i]), _mm512_set1_ps(to->factor));
            found[i] = _mm512_castps_si512(some);
        }
        if (!to->is_transposed) {
            float *place = to->result + rank * to->columns + column;
            for (int64_t i = 0; i < ranks; i++, place += to->columns) {
                _mm512_mask_storeu_epi32(place, first_of(columns), found[i]);
            }
            continue;
        }
        transpose(found);
        float *place = to->result + column * to->ranks + rank;
        for (int64_t i = 0; i < VECTOR && i < columns; i++, place += to->ranks) {
            _mm512_mask_storeu_epi32(place, first_of(ranks), found[i]);
        }
    }
}

/* Blocks of sums across a product's columns, and all of them. */
static inline int64_t blocks_across(const narrow_product *of) {
    return (of->columns + NARROW * VECTOR - 1) / (NARROW * VECTOR);
}

static inline int64_t blocks_of(const narrow_product *of) {
    return (of->ranks + VECTOR - 1) / VECTOR * blocks_across(of);
}

static inline void find_block(const narrow_product *of, int64_t rows, int64_t block) {
    int64_t rank = block / blocks_across(of) * VECTOR;
    int64_t column = block % blocks_across(of) * NARROW * VECTOR;
    int64_t columns = of->columns - column < NARROW * VECTOR ? of->columns - column : NARROW * VECTOR;
    int64_t ranks = of->ranks - rank < VECTOR ? of->ranks - rank : VECTOR;
    block_sums sums;
    memset(sums, 0, sizeof sums);
    add_transposed_product(
        sums, of->left + rank, of->left_stride, of->right + column, of->right_stride, rows, ranks,
        columns);
    put(of, sums, rank, column);
}

/* Products over the same number of rows, shared out together. */
static void find_narrow_products(const narrow_product *all, int64_t count, int64_t rows) {
    int64_t blocks = 0, numbers = 0, taken = 0;
    for (int64_t i = 0; i < count; i++) {
        blocks += blocks_of(all + i);
        numbers += rows * all[i].columns;
    }
#pragma omp parallel if (numbers > FEW_NUMBERS)
    for (int64_t share = omp_get_thread_num(); share < blocks; share = take(&taken)) {
        const narrow_product *of = all;
        int64_t block = share;
        for (; block >= blocks_of(of); of++) block -= blocks_of(of);
        find_block(of, rows, block);
    }
}

/* leftᵀ·right in fp32, for left [rows, ranks] and right [rows, columns]. */
void gradient_bf16(
    const bf16 *left, const bf16 *right, float *result, int64_t rows, int64_t ranks,
    int64_t columns, int64_t left_stride, int64_t right_stride, int64_t is_transposed) {
    const narrow_product all = {
        left, right, left_stride, right_stride, result, ranks, columns, 1, is_transposed != 0};
    find_narrow_products(&all, 1, rows);
}

/* x·Wᵀ + bias + onto and its low-rank additions, for x [rows, width] and W [outputs, width]: inner =
 * x·Downᵀ [rows, ranks], of which each of `count` parts takes some columns, times its numbers in `ups`
 * [ranks of its own, columns of its own]. */
void group_forward_bf16(
    const bf16 *x, const bf16 *weight, const bf16 *down, const bf16 *ups, const int64_t *parts,
    const float *bias, const bf16 *onto, bf16 *inner, bf16 *result, int64_t rows, int64_t width,
    int64_t outputs, int64_t ranks, int64_t count) {
    product_bf16(
        x, down, NULL, NULL, NULL, NULL, 1, NULL, inner, rows, ranks, width, 0, width, ranks);
    const factor from = {weight, width, outputs, width, 1};
    const low_rank_product low = {inner, ups, ranks, (const part *)parts, count};
    multiply_many(
        x, width, rows, from, low, (target){bias, onto, 1, NULL, result, outputs});
}

/* Of the same with respect to x, and, in fp32, to each part's numbers of Down [ranks, width] and,
 * times a scale, of `ups`, there transposed: they go to `gradients`, where `starts` says for both of
 * each part. There are at most MOST_PARTS; of_inner [rows, ranks] is room. */
void group_backward_bf16(
    const bf16 *of_outputs, const bf16 *x, const bf16 *inner, const bf16 *weight, const bf16 *down,
    const bf16 *ups, const int64_t *parts, const int64_t *starts, const float *scales, bf16 *of_inner,
    bf16 *of_x, float *gradients, int64_t rows, int64_t width, int64_t outputs, int64_t ranks,
    int64_t count) {
    const part *all = (const part *)parts;
    narrow_product found[2 * MOST_PARTS];
    for (int64_t i = 0; i < count; i++, all++) {
        int64_t columns = all->end_column - all->first_column, rank = all->first_rank;
        int64_t own_ranks = all->end_rank - rank;
        const bf16 *of_part = of_outputs + all->first_column;
        product_bf16(
            of_part, ups, NULL, NULL, NULL, NULL, 1, NULL, of_inner + rank, rows, own_ranks, columns, 0,
            outputs, ranks);
        ups += own_ranks * columns;
        found[2 * i] = (narrow_product){
            of_inner + rank, x, ranks, width, gradients + starts[2 * i], own_ranks, width, 1, 0};
        found[2 * i + 1] = (narrow_product){
            inner + rank, of_part, ranks, outputs, gradients + starts[2 * i + 1], own_ranks, columns,
            scales[i], 1};
    }
    const part everything = {0, width, 0, ranks};
    const factor from = {weight, outputs, width, width, 0};
    const low_rank_product low = {of_inner, down, ranks, &everything, 1};
    multiply_many(
        of_outputs, outputs, rows, from, low, (target){NULL, NULL, 1, NULL, of_x, width});
    find_narrow_products(found, 2 * count, rows);
}

/* Sequences of one length in qkv [tokens, (queries + 2 · groups) · size], rotated: their tokens stand
 * there from `first` on, [rows, columns], and all of them also see the first `prefix` tokens. A
 * sequence sees at most MOST_SEEN keys; `size` is at most MOST_HEAD_NUMBERS. */
typedef struct {
    const bf16 *qkv;
    float scale;
    int64_t first, rows, columns, prefix, queries, groups, size;
} sequences;

static inline int64_t stride_of(const sequences *all) {
    return (all->queries + 2 * all->groups) * all->size;
}

static inline int64_t keys_of(const sequences *all) { return all->prefix + all->columns; }

/* The token of a sequence's key. */
static inline int64_t token_of(const sequences *all, int64_t sequence, int64_t key) {
    return key < all->prefix ? key : all->first + sequence * all->columns + key - all->prefix;
}

/* Panels for products with up to MOST_SEEN keys of up to MOST_HEAD_NUMBERS numbers. */
typedef __m512i panels[MOST_SEEN * MOST_HEAD_NUMBERS / VECTOR / 2];

/* Numbers of a panel for products of such a depth. */
static inline int64_t panel_size(int64_t depth) { return (depth + 1) / 2 * 2; }

static inline void pack_all(__m512i *to, const factor from) {
    for (int64_t column = 0; column < from.columns; column += PANEL) {
        pack(to, from, column, 0, from.depth);
        to += panel_size(from.depth);
    }
}

/* left [rows, depth] · a packed factor of `packed_depth` rows, of which the first `depth` are taken:
 * the first `columns` columns. */
static inline void multiply_all(
    const bf16 *left, int64_t stride, int64_t rows, int64_t depth, const __m512i *packed,
    int64_t packed_depth, int64_t columns, const target to) {
    for (int64_t column = 0; column < columns; column += PANEL) {
        for (int64_t row = 0; row < rows;) {
            tile of = {rows - row, {left + row * stride, stride, depth, packed}, {0}, NULL, NULL};
            row += multiply_some(of, to, row, column, columns);
        }
        packed += panel_size(packed_depth);
    }
}

/* Keys, or values, of one sequence and group, those of the beginning first; [keys, size]. */
static inline void gather(const sequences *all, int64_t sequence, int64_t head, bf16 *to) {
    for (int64_t k = 0; k < keys_of(all); k++) {
        const bf16 *from =
            all->qkv + token_of(all, sequence, k) * stride_of(all) + head * all->size;
        memcpy(to + k * all->size, from, all->size * sizeof(bf16));
    }
}

/* Room for a query's keys, in whole vectors. */
#define ROOM (MOST_SEEN + VECTOR)

/* Attention weights of a query that sees `seen` keys: its products with them become the weights, and
 * 0 up to `wide`; also in bf16. */
static inline void weigh_keys(
    float *scores, bf16 *weights, float scale, int64_t seen, int64_t wide) {
    for (int64_t i = 0; i < seen; i += VECTOR) {
        _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(scale)));
    }
    __m512 share = _mm512_set1_ps(weigh_seen(scores, seen));
    for (int64_t i = 0; i < wide; i += VECTOR) {
        __mmask16 there = i < seen ? first_of(seen - i) : 0;
        __m512 some = _mm512_maskz_mul_ps(there, share, _mm512_loadu_ps(scores + i));
        _mm512_storeu_ps(scores + i, some);
        _mm256_storeu_si256((__m256i *)(weights + i), (__m256i)_mm512_cvtneps_pbh(some));
    }
}

/* Of up to HIGHEST queries of a sequence from `place` on; how many. */
static inline int64_t weigh_tile(
    const sequences *all, const bf16 *queries, const __m512i *keys, int64_t place,
    float scores[HIGHEST][ROOM], bf16 *weights) {
    int64_t here = all->columns - place < HIGHEST ? all->columns - place : HIGHEST;
    int64_t seen = all->prefix + place + here;
    const target to = {NULL, NULL, 1, scores[0], NULL, ROOM};
    multiply_all(
        queries + place * stride_of(all), stride_of(all), here, all->size, keys, all->size, seen, to);
    for (int64_t r = 0; r < here; r++) {
        weigh_keys(scores[r], weights + r * ROOM, all->scale, seen - here + r + 1, seen);
    }
    return here;
}

/* Causal attention; result [tokens, queries · size]. */
void attend_rows_bf16(
    const bf16 *qkv, bf16 *result, float scale, int64_t first, int64_t rows, int64_t columns,
    int64_t prefix, int64_t queries, int64_t groups, int64_t size) {
    const sequences all = {qkv, scale, first, rows, columns, prefix, queries, groups, size};
    int64_t each = queries / groups, keys = keys_of(&all);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t sequence = 0; sequence < rows; sequence++) {
        for (int64_t group = 0; group < groups; group++) {
            int64_t start = first + sequence * columns;
            bf16 near[MOST_SEEN * MOST_HEAD_NUMBERS];
            panels of_keys, of_values;
            gather(&all, sequence, queries + group, near);
            pack_all(of_keys, (factor){near, size, keys, size, 1});
            gather(&all, sequence, queries + groups + group, near);
            pack_all(of_values, (factor){near, keys, size, size, 0});
            for (int64_t head = group * each; head < (group + 1) * each; head++) {
                const bf16 *asking = qkv + start * stride_of(&all) + head * size;
                for (int64_t place = 0; place < columns; place += HIGHEST) {
                    float scores[HIGHEST][ROOM];
                    bf16 weights[HIGHEST * ROOM];
                    int64_t here = weigh_tile(&all, asking, of_keys, place, scores, weights);
                    bf16 *mixed = result + ((start + place) * queries + head) * size;
                    const target to = {NULL, NULL, 1, NULL, mixed, queries * size};
                    multiply_all(
                        weights, ROOM, here, prefix + place + here, of_values, keys, size, to);
                }
            }
        }
    }
}

/* Adds numbers to those of a key, or of its value. */
static inline void add_to(bf16 *numbers, const float *found, int64_t count) {
    for (int64_t i = 0; i < count; i += VECTOR) {
        __mmask16 there = first_of(count - i);
        __m512 before = widened(_mm256_maskz_loadu_epi16(there, numbers + i));
        __m512 sum = _mm512_add_ps(before, _mm512_maskz_loadu_ps(there, found + i));
        _mm256_mask_storeu_epi16(numbers + i, there, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

/* Of weights W and what comes from above, G: (G - Σ W·G)·W·scale, for one query; in bf16. */
static inline void of_scores(
    const float *weights, const float *above, bf16 *result, float scale, int64_t wide) {
    __m512 shared = _mm512_setzero_ps();
    for (int64_t i = 0; i < wide; i += VECTOR) {
        __mmask16 there = first_of(wide - i);
        shared = _mm512_fmadd_ps(
            _mm512_maskz_loadu_ps(there, weights + i), _mm512_maskz_loadu_ps(there, above + i), shared);
    }
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(shared));
    for (int64_t i = 0; i < wide; i += VECTOR) {
        __mmask16 there = first_of(wide - i);
        __m512 weight = _mm512_maskz_mul_ps(
            there, _mm512_set1_ps(scale), _mm512_maskz_loadu_ps(there, weights + i));
        __m512 found =
            _mm512_mul_ps(weight, _mm512_sub_ps(_mm512_maskz_loadu_ps(there, above + i), mean));
        _mm256_storeu_si256((__m256i *)(result + i), (__m256i)_mm512_cvtneps_pbh(found));
    }
}

/* Sums of all keys with all numbers of a head: keys, then numbers, in blocks. */
typedef block_sums all_keys_sums[MOST_SEEN / VECTOR][MOST_HEAD_NUMBERS / VECTOR / NARROW];

/* Adds leftᵀ·right: of every key with each query that sees it; left [columns, ROOM] of one head. */
static inline void add_by_key(
    const sequences *all, all_keys_sums sums, const bf16 *left, const bf16 *right, int64_t stride) {
    int64_t keys = keys_of(all);
    for (int64_t key = 0; key < keys; key += VECTOR) {
        /* Queries before this one see none of these keys. */
        int64_t query = key > all->prefix ? key - all->prefix : 0;
        for (int64_t number = 0; number < all->size; number += NARROW * VECTOR) {
            add_transposed_product(
                sums[key / VECTOR][number / VECTOR / NARROW], left + query * ROOM + key, ROOM,
                right + query * stride + number, stride, all->columns - query,
                keys - key < VECTOR ? keys - key : VECTOR,
                all->size - number < NARROW * VECTOR ? all->size - number : NARROW * VECTOR);
        }
    }
}

/* Hands on what a sequence's keys, or values, have got: to its own tokens at once, for those of the
 * beginning into `shared` [prefix, size]. */
static inline void hand_on(
    const sequences *all, int64_t sequence, int64_t head, const all_keys_sums sums, float *shared,
    bf16 *of_qkv) {
    for (int64_t key = 0; key < keys_of(all); key++) {
        float found[MOST_HEAD_NUMBERS];
        for (int64_t i = 0; i < all->size; i += VECTOR) {
            int64_t part = i / VECTOR;
            const float *from =
                sums[key / VECTOR][part / NARROW][part % NARROW][key % VECTOR];
            memcpy(found + i, from, VECTOR * sizeof(float));
        }
        if (key < all->prefix) {
            memcpy(shared + key * all->size, found, all->size * sizeof(float));
        } else {
            int64_t token = token_of(all, sequence, key);
            add_to(of_qkv + token * stride_of(all) + head * all->size, found, all->size);
        }
    }
}

/* Adds to of_qkv, laid out as qkv, what follows from of_result, laid out as the result of
 * `attend_rows`; the attention weights are made again. shared [rows, 2 · groups, prefix, size] is room
 * for what every sequence has for the beginning. */
void attend_rows_backward_bf16(
    const bf16 *qkv, const bf16 *of_result, bf16 *of_qkv, float *shared, float scale, int64_t first,
    int64_t rows, int64_t columns, int64_t prefix, int64_t queries, int64_t groups, int64_t size) {
    const sequences all = {qkv, scale, first, rows, columns, prefix, queries, groups, size};
    int64_t each = queries / groups, keys = keys_of(&all), stride = stride_of(&all);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t sequence = 0; sequence < rows; sequence++) {
        for (int64_t group = 0; group < groups; group++) {
            int64_t start = first + sequence * columns;
            bf16 near[MOST_SEEN * MOST_HEAD_NUMBERS];
            panels of_values, across_keys, along_keys;
            all_keys_sums key_sums, value_sums;
            bf16 weights[MOST_SEEN * ROOM], of_weights[MOST_SEEN * ROOM];
            gather(&all, sequence, queries + groups + group, near);
            pack_all(of_values, (factor){near, size, keys, size, 1});
            gather(&all, sequence, queries + group, near);
            pack_all(across_keys, (factor){near, size, keys, size, 1});
            pack_all(along_keys, (factor){near, keys, size, size, 0});
            for (int64_t i = 0; i * VECTOR < keys; i++) {
                memset(key_sums[i], 0, sizeof key_sums[i]);
                memset(value_sums[i], 0, sizeof value_sums[i]);
            }
            for (int64_t head = group * each; head < (group + 1) * each; head++) {
                const bf16 *asking = qkv + start * stride + head * size;
                const bf16 *above = of_result + (start * queries + head) * size;
                for (int64_t place = 0; place < columns; place += HIGHEST) {
                    float scores[HIGHEST][ROOM], found[HIGHEST][ROOM];
                    bf16 *of_tile = of_weights + place * ROOM;
                    int64_t here = weigh_tile(
                        &all, asking, across_keys, place, scores, weights + place * ROOM);
                    int64_t seen = prefix + place + here;
                    const target by_key = {NULL, NULL, 1, found[0], NULL, ROOM};
                    multiply_all(
                        above + place * queries * size, queries * size, here, size, of_values, size,
                        seen, by_key);
                    for (int64_t r = 0; r < here; r++) {
                        of_scores(scores[r], found[r], of_tile + r * ROOM, scale, seen);
                    }
                    bf16 *of_queries = of_qkv + (start + place) * stride + head * size;
                    const target by_query = {NULL, of_queries, 1, NULL, of_queries, stride};
                    multiply_all(of_tile, ROOM, here, seen, along_keys, keys, size, by_query);
                }
                add_by_key(&all, key_sums, of_weights, asking, stride);
                add_by_key(&all, value_sums, weights, above, queries * size);
            }
            float *place = shared + (sequence * 2 * groups + group) * prefix * size;
            hand_on(&all, sequence, queries + group, key_sums, place, of_qkv);
            place += groups * prefix * size;
            hand_on(&all, sequence, queries + groups + group, value_sums, place, of_qkv);
        }
    }
#pragma omp parallel for collapse(2) if (rows * prefix * groups * size > FEW_NUMBERS)
    for (int64_t head = 0; head < 2 * groups; head++) {
        for (int64_t key = 0; key < prefix; key++) {
            float sums[MOST_HEAD_NUMBERS] = {0};
            for (int64_t sequence = 0; sequence < rows; sequence++) {
                const float *found = shared + ((sequence * 2 * groups + head) * prefix + key) * size;
#pragma omp simd
                for (int64_t i = 0; i < size; i++) sums[i] += found[i];
            }
            add_to(of_qkv + key * stride + (queries + head) * size, sums, size);
        }
    }
}

/* Running softmax over the keys that up to TILE queries have seen so far. */
typedef struct {
    float top[TILE], total[TILE];
    float mixed[TILE][MOST_HEAD_NUMBERS];
} all_seen;

static inline void look_at_all(
    all_seen *seen, const matrix asking, float scale, const context_bf16 context) {
    int64_t size = asking.width;
    for (int64_t start = 0; start < context.count; start += KEY_BLOCK) {
        int64_t left = context.count - start, some = left < KEY_BLOCK ? left : KEY_BLOCK;
        const matrix block = {context.keys + start * size, some, size, size};
        float scores[TILE][KEY_BLOCK], shrink[TILE];
        for (int64_t key = 0; key < some; key += TILE) {
            __m512 sums[TILE][TILE];
            float found[TILE][TILE];
            clear(sums);
            add_products(sums, asking, 0, block, key);
            _mm512_storeu_ps((float *)found, all_sums(sums));
            for (int q = 0; q < TILE; q++) memcpy(scores[q] + key, found[q], sizeof found[q]);
        }
        for (int q = 0; q < TILE; q++) {
            float top = seen->top[q], total = 0;
#pragma omp simd reduction(max : top)
            for (int64_t k = 0; k < some; k++) {
                scores[q][k] *= scale;
                top = scores[q][k] > top ? scores[q][k] : top;
            }
            shrink[q] = exponential(seen->top[q] - top);
#pragma omp simd reduction(+ : total)
            for (int64_t k = 0; k < some; k++) {
                scores[q][k] = exponential(scores[q][k] - top);
                total += scores[q][k];
            }
            seen->top[q] = top;
            seen->total[q] = seen->total[q] * shrink[q] + total;
        }
        for (int64_t i = 0; i < size; i += VECTOR) {
            __mmask16 there = first_of(size - i);
            __m512 mixed[TILE];
#pragma GCC unroll 4
            for (int q = 0; q < TILE; q++) {
                mixed[q] = _mm512_mul_ps(
                    _mm512_loadu_ps(seen->mixed[q] + i), _mm512_set1_ps(shrink[q]));
            }
            for (int64_t k = 0; k < some; k++) {
                const bf16 *value = context.values + (start + k) * size + i;
                __m512 wide = widened(_mm256_maskz_loadu_epi16(there, value));
#pragma GCC unroll 4
                for (int q = 0; q < TILE; q++) {
                    mixed[q] = _mm512_fmadd_ps(_mm512_set1_ps(scores[q][k]), wide, mixed[q]);
                }
            }
#pragma GCC unroll 4
            for (int q = 0; q < TILE; q++) _mm512_storeu_ps(seen->mixed[q] + i, mixed[q]);
        }
    }
}

/* As in native_kernels.h, of several heads at once. */
static void attend_heads_bf16(
    const bf16 *asking, context_bf16 beginning, context_bf16 own, bf16 *result, float scale,
    int64_t heads, int64_t size) {
    /* From memory they would come too late otherwise. */
    for (int64_t i = 0; i < own.count * size; i += 32) {
        _mm_prefetch((const char *)(own.keys + i), _MM_HINT_T0);
        _mm_prefetch((const char *)(own.values + i), _MM_HINT_T0);
    }
    for (int64_t first = 0; first < heads; first += TILE) {
        int64_t some = heads - first < TILE ? heads - first : TILE;
        const matrix queries = {asking + first * size, some, size, size};
        all_seen seen = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}, {0}, {{0}}};
        look_at_all(&seen, queries, scale, beginning);
        look_at_all(&seen, queries, scale, own);
        for (int64_t q = 0; q < some; q++) {
            bf16 *mixed = result + (first + q) * size;
            for (int64_t i = 0; i < size; i++) {
                mixed[i] = store_bf16(seen.mixed[q][i] / seen.total[q]);
            }
        }
    }
}
