/* The mean and variance of each unit's output y over the cases (n, t).
 *
 * One pass, in double precision and about the first case, so that a large mean costs no digits.
 */

#include "kernels.h"

enum { LANES = BYTES / sizeof(double) };
enum { VECTORS = 2, UNITS = VECTORS * LANES }; /* whose sums fill the registers */

typedef double lanes __attribute__((vector_size(BYTES)));
typedef float narrow __attribute__((vector_size(BYTES / 2), aligned(sizeof(float))));

typedef struct { /* as in averages.py; to_n, to_t, to_u: strides of y along its axes */
    const float *y;
    double *mean, *var;
    int64_t u, n, t, to_n, to_t, to_u, taken;
} Task;

typedef struct {
    lanes origin, sum, squares;
} Sums;

INLINE lanes wide(const float *y) { return __builtin_convertvector(*(const narrow *)y, lanes); }

INLINE void add(Sums *s, lanes y) {
    lanes about = y - s->origin;
    s->sum += about, s->squares += about * about;
}

INLINE void give(const Task *t, int64_t u, double origin, double sum, double squares) {
    double cases = t->n * t->t, shift = sum / cases;
    t->mean[u] = origin + shift;
    t->var[u] = squares / cases - shift * shift; /* never below 0: the first case is the origin */
}

/* UNITS units that lie side by side, each in a lane of its own. */
static void average_several(const Task *t, int64_t u) {
    const float *y = t->y + u;
    Sums s[VECTORS];
    EACH(v, 0, VECTORS) s[v] = (Sums){wide(y + v * LANES), {}, {}};
    for (int64_t n = 0; n < t->n; n++)
        for (int64_t k = 0; k < t->t; k++)
            EACH(v, 0, VECTORS) add(s + v, wide(y + n * t->to_n + k * t->to_t + v * LANES));
    EACH(v, 0, VECTORS)
        EACH(i, 0, LANES) give(t, u + v * LANES + i, s[v].origin[i], s[v].sum[i], s[v].squares[i]);
}

/* One unit, its cases spread over the lanes. */
static void average_one(const Task *t, int64_t u) {
    const float *y = t->y + u * t->to_u;
    double origin = *y, sum = 0, squares = 0;
    Sums s[VECTORS];
    EACH(v, 0, VECTORS) s[v] = (Sums){(lanes){} + origin, {}, {}};
    for (int64_t n = 0; n < t->n; n++, y += t->to_n) {
        int64_t k = 0;
        if (t->to_t == 1)
            for (; k + UNITS <= t->t; k += UNITS)
                EACH(v, 0, VECTORS) add(s + v, wide(y + k + v * LANES));
        for (; k < t->t; k++) {
            double about = y[k * t->to_t] - origin;
            sum += about, squares += about * about;
        }
    }
    EACH(v, 0, VECTORS) EACH(i, 0, LANES) sum += s[v].sum[i], squares += s[v].squares[i];
    give(t, u, origin, sum, squares);
}

/* Run by every thread until no units are left. */
void averages(Task *t) {
    for (int64_t u; (u = __atomic_fetch_add(&t->taken, UNITS, __ATOMIC_RELAXED)) < t->u;) {
        int64_t end = min64(u + UNITS, t->u);
        if (t->to_u == 1 && end == u + UNITS) average_several(t, u);
        else
            while (u < end) average_one(t, u++);
    }
}
