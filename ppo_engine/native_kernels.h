/* The kernels for one number format; included by native.c once for each.
 *
 * NUMBER is the format's type, OF(name) the name of a function for it. Tensors are contiguous.
 */

#define LOAD OF(load)
#define STORE OF(store)

/* What becomes of a matrix [rows, columns]: its place in the result, and whether it comes out
 * transposed. */
typedef struct {
    int64_t rows, columns, place, is_transposed;
} OF(conversion);

/* Converts many matrices of fp32, times a factor each. */
void OF(convert)(
    const float *const *from, NUMBER *to, const float *factors, const OF(conversion) *all,
    int64_t count) {
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t i = 0; i < count; i++) {
        const float *x = from[i];
        NUMBER *y = to + all[i].place;
        int64_t rows = all[i].rows, columns = all[i].columns;
        if (!all[i].is_transposed) {
#pragma omp simd
            for (int64_t n = 0; n < rows * columns; n++) y[n] = STORE(factors[i] * x[n]);
            continue;
        }
        for (int64_t column = 0; column < columns; column++) {
            for (int64_t row = 0; row < rows; row++) {
                y[column * rows + row] = STORE(factors[i] * x[row * columns + column]);
            }
        }
    }
}

/* normed = x/rms(x) · weight, rounded in between as transformers does; inverse = 1/rms. */
void OF(rms_norm)(
    const NUMBER *hidden, const NUMBER *weight, float epsilon, NUMBER *normed, float *inverse,
    int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > FEW_NUMBERS)
    for (int64_t row = 0; row < rows; row++) {
        const NUMBER *x = hidden + row * width;
        NUMBER *y = normed + row * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += LOAD(x[i]) * LOAD(x[i]);
        float scale = 1.0f / sqrtf(squares / (float)width + epsilon);
        inverse[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            y[i] = STORE(LOAD(STORE(LOAD(x[i]) * scale)) * LOAD(weight[i]));
        }
    }
}

/* of_hidden = onto + r·(w·g - x·r²·mean(w·g·x)); `onto` may be absent. */
void OF(rms_norm_backward)(
    const NUMBER *of_normed, const NUMBER *hidden, const NUMBER *weight, const float *inverse,
    const NUMBER *onto, NUMBER *of_hidden, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > FEW_NUMBERS)
    for (int64_t row = 0; row < rows; row++) {
        const NUMBER *g = of_normed + row * width, *x = hidden + row * width;
        NUMBER *y = of_hidden + row * width;
        float scale = inverse[row], shared = 0;
#pragma omp simd reduction(+ : shared)
        for (int64_t i = 0; i < width; i++) {
            shared += LOAD(g[i]) * LOAD(weight[i]) * LOAD(x[i]);
        }
        shared *= scale * scale / (float)width;
        if (onto != NULL) {
            const NUMBER *before = onto + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float found = scale * (LOAD(g[i]) * LOAD(weight[i]) - LOAD(x[i]) * shared);
                y[i] = STORE(LOAD(before[i]) + found);
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                y[i] = STORE(scale * (LOAD(g[i]) * LOAD(weight[i]) - LOAD(x[i]) * shared));
            }
        }
    }
}

/* gated = silu(gate) · up; a row of `gate_up` is the gate's numbers, then as many of up. */
void OF(gated)(const NUMBER *gate_up, NUMBER *result, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > FEW_NUMBERS)
    for (int64_t row = 0; row < rows; row++) {
        const NUMBER *gate = gate_up + row * 2 * width, *up = gate + width;
        NUMBER *y = result + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float x = LOAD(gate[i]);
            y[i] = STORE(x * logistic(x) * LOAD(up[i]));
        }
    }
}

void OF(gated_backward)(
    const NUMBER *of_result, const NUMBER *gate_up, NUMBER *of_gate_up, int64_t rows,
    int64_t width) {
#pragma omp parallel for if (rows * width > FEW_NUMBERS)
    for (int64_t row = 0; row < rows; row++) {
        const NUMBER *gate = gate_up + row * 2 * width, *up = gate + width;
        const NUMBER *g = of_result + row * width;
        NUMBER *of_gate = of_gate_up + row * 2 * width, *of_up = of_gate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float x = LOAD(gate[i]), share = logistic(x);
            of_up[i] = STORE(LOAD(g[i]) * x * share);
            of_gate[i] = STORE(LOAD(g[i]) * LOAD(up[i]) * share * (1.0f + x * (1.0f - share)));
        }
    }
}

/* Rotates the first `heads` heads of every row of [rows, width] in place: each number times its
 * cosine, plus the number half a head away times its sine and `direction`; both [rows, size]. */
void OF(rotate)(
    NUMBER *values, const NUMBER *cosines, const NUMBER *sines, float direction, int64_t rows,
    int64_t width, int64_t heads, int64_t size) {
    int64_t half = size / 2;
#pragma omp parallel for if (rows * heads * size > FEW_NUMBERS)
    for (int64_t row = 0; row < rows; row++) {
        const NUMBER *cosine = cosines + row * size, *sine = sines + row * size;
        for (int64_t head = 0; head < heads; head++) {
            NUMBER *first = values + row * width + head * size, *second = first + half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = LOAD(first[i]), b = LOAD(second[i]);
                first[i] = STORE(a * LOAD(cosine[i]) + b * direction * LOAD(sine[i]));
                second[i] =
                    STORE(b * LOAD(cosine[half + i]) + a * direction * LOAD(sine[half + i]));
            }
        }
    }
}

/* Keys and values [count, size] of tokens that a query sees. */
typedef struct {
    const NUMBER *keys, *values;
    int64_t count;
} OF(context);

/* Attention of queries [heads, size] of one token, which see a beginning that all sequences have and
 * what their own sequence has so far; result [heads, size]. */
static void OF(attend_heads)(
    const NUMBER *asking, OF(context) beginning, OF(context) own, NUMBER *result, float scale,
    int64_t heads, int64_t size);

#ifndef HAS_FASTER_ATTEND_HEADS
/* Running softmax over the keys that one query has seen so far. */
typedef struct {
    float top, total;
    float mixed[MOST_HEAD_NUMBERS];
} OF(seen);

static inline void OF(look_at)(
    OF(seen) *seen, const float *query, const OF(context) context, int64_t size) {
    float scores[KEY_BLOCK];
    for (int64_t start = 0; start < context.count; start += KEY_BLOCK) {
        int64_t left = context.count - start, some = left < KEY_BLOCK ? left : KEY_BLOCK;
        float top = seen->top;
        for (int64_t k = 0; k < some; k++) {
            const NUMBER *key = context.keys + (start + k) * size;
            float score = 0;
#pragma omp simd reduction(+ : score)
            for (int64_t i = 0; i < size; i++) score += query[i] * LOAD(key[i]);
            scores[k] = score;
            top = score > top ? score : top;
        }
        float shrink = exponential(seen->top - top), total = seen->total * shrink;
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < some; k++) {
            scores[k] = exponential(scores[k] - top);
            total += scores[k];
        }
#pragma omp simd
        for (int64_t i = 0; i < size; i++) seen->mixed[i] *= shrink;
        for (int64_t k = 0; k < some; k++) {
            const NUMBER *value = context.values + (start + k) * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) seen->mixed[i] += scores[k] * LOAD(value[i]);
        }
        seen->top = top;
        seen->total = total;
    }
}

static void OF(attend_heads)(
    const NUMBER *asking, OF(context) beginning, OF(context) own, NUMBER *result, float scale,
    int64_t heads, int64_t size) {
    for (int64_t head = 0; head < heads; head++) {
        float query[MOST_HEAD_NUMBERS];
        OF(seen) seen = {-INFINITY, 0, {0}};
#pragma omp simd
        for (int64_t i = 0; i < size; i++) query[i] = LOAD(asking[head * size + i]) * scale;
        OF(look_at)(&seen, query, beginning, size);
        OF(look_at)(&seen, query, own, size);
        NUMBER *mixed = result + head * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) mixed[i] = STORE(seen.mixed[i] / seen.total);
    }
}
#endif

/* Attention of one more token of every sequence, whose keys and values it keeps.
 *
 * heads [rows, queries + 2·groups, size], rotated; shared_* [groups, shared, size], of a beginning
 * that all sequences have; own_* [rows, groups, room, size], of which lengths[row] are in use
 * before the call; result [rows, queries · size]. size is at most MOST_HEAD_NUMBERS. */
void OF(attend_next)(
    const NUMBER *heads, const NUMBER *shared_keys, const NUMBER *shared_values, NUMBER *own_keys,
    NUMBER *own_values, const int64_t *lengths, NUMBER *result, float scale, int64_t rows,
    int64_t queries, int64_t groups, int64_t size, int64_t shared, int64_t room) {
    int64_t each = queries / groups;
#pragma omp parallel for collapse(2)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t group = 0; group < groups; group++) {
            const NUMBER *all = heads + row * (queries + 2 * groups) * size;
            int64_t before = group * shared * size, place = (row * groups + group) * room * size;
            int64_t length = lengths[row];
            OF(context) beginning = {shared_keys + before, shared_values + before, shared};
            OF(context) own = {own_keys + place, own_values + place, length + 1};
            memcpy(
                own_keys + place + length * size, all + (queries + group) * size,
                size * sizeof(NUMBER));
            memcpy(
                own_values + place + length * size, all + (queries + groups + group) * size,
                size * sizeof(NUMBER));
            OF(attend_heads)(
                all + group * each * size, beginning, own,
                result + (row * queries + group * each) * size, scale, each, size);
        }
    }
}

/* Softmax, in place, of scale · scores [rows, keys] over the keys that a query may see: `prefix` of
 * them, and of its own row of `columns` tokens those up to its own place, row modulo columns. There
 * are at most MOST_KEYS. */
void OF(causal_softmax)(
    NUMBER *scores, float scale, int64_t rows, int64_t keys, int64_t columns, int64_t prefix) {
#pragma omp parallel for if (rows * keys > FEW_NUMBERS)
    for (int64_t row = 0; row < rows; row++) {
        NUMBER *y = scores + row * keys;
        int64_t seen = prefix + row % columns + 1;
        float held[MOST_KEYS];
#pragma omp simd
        for (int64_t i = 0; i < seen; i++) held[i] = scale * LOAD(y[i]);
        float share = weigh_seen(held, seen);
#pragma omp simd
        for (int64_t i = 0; i < seen; i++) y[i] = STORE(share * held[i]);
        memset(y + seen, 0, (keys - seen) * sizeof(NUMBER));
    }
}

/* Takes scores [rows, entries] of the vocabulary's entries from `start` on into running sums.
 *
 * sums [5, rows]: highest score so far; Σ exp(z − top); Σ exp(z − top)·(z − top); score of the
 * chosen token; and, if there are scores of others, Σ exp(z − top)·(z − other). shift [rows] is the
 * highest score before less the one now, 0 for the first block. `plain` exp(z − top) and `weighted`
 * exp(z − top)·(z − top) are 0 for the chosen token; each may be absent. */
void OF(take_in)(
    const float *scores, const float *others, const int64_t *chosen, float *sums, float *shift,
    NUMBER *plain, NUMBER *weighted, int64_t rows, int64_t entries, int64_t start) {
#pragma omp parallel for if (rows * entries > FEW_NUMBERS)
    for (int64_t row = 0; row < rows; row++) {
        const float *z = scores + row * entries;
        float *all_top = sums + row, *all_total = sums + rows + row;
        float *all_spread = sums + 2 * rows + row, *all_lead = sums + 4 * rows + row;
        int64_t place = chosen[row] - start;
        float top = *all_top, total = 0, spread = 0, lead = 0;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < entries; i++) top = z[i] > top ? z[i] : top;
        const float *other = others == NULL ? NULL : others + row * entries;
        NUMBER *p = plain == NULL ? NULL : plain + row * entries;
        NUMBER *w = weighted == NULL ? NULL : weighted + row * entries;
        for (int64_t first = 0; first < entries; first += CHUNK) {
            int64_t some = entries - first < CHUNK ? entries - first : CHUNK;
            float weights[CHUNK];
            weigh(z + first, top, some, weights, &total, &spread);
            if (other != NULL) {
#pragma omp simd reduction(+ : lead)
                for (int64_t i = 0; i < some; i++) {
                    lead += weights[i] * (z[first + i] - other[first + i]);
                }
            }
            if (p != NULL) {
#pragma omp simd
                for (int64_t i = 0; i < some; i++) p[first + i] = STORE(weights[i]);
            }
            if (w != NULL) {
#pragma omp simd
                for (int64_t i = 0; i < some; i++) {
                    w[first + i] = STORE(weights[i] * (z[first + i] - top));
                }
            }
        }
        if (place >= 0 && place < entries) {
            sums[3 * rows + row] = z[place];
            if (p != NULL) p[place] = STORE(0);
            if (w != NULL) w[place] = STORE(0);
        }
        float moved = *all_total > 0 ? *all_top - top : 0, scale = expf(moved);
        *all_spread = scale * (*all_spread + moved * *all_total) + spread;
        *all_total = scale * *all_total + total;
        *all_lead = scale * *all_lead + lead;
        *all_top = top;
        shift[row] = moved;
    }
}

#undef LOAD
#undef STORE
