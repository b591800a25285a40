/* Average what each of many units u gives in cases (n, t), and its squared distance from that mean.
 *
 * One pass, in double precision and about the first case, so that a large mean costs no digits.
 */

#include <stdint.h>

#if defined __AVX512F__
enum { LANES = 8 };
#elif defined __AVX__
enum { LANES = 4 };
#else
enum { LANES = 2 };
#endif
enum { VECTORS = 2, UNITS = VECTORS * LANES }; /* whose sums fill the registers */

typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef float narrow __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct { /* as in averages.py; to_n: from a case to the next, in numbers */
    const float *y;
    double *mean, *var;
    int64_t u, n, t, to_n, to_t, to_u, taken;
} Task;

typedef struct {
    lanes origin, sum, squares;
} Sums;

#define INLINE static inline __attribute__((always_inline))
#define EACH(i, end) _Pragma("GCC unroll 8") for (int i = 0; i < (end); i++)

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE lanes wide(const float *y) { return __builtin_convertvector(*(const narrow *)y, lanes); }

INLINE void add(Sums *s, lanes y) {
    lanes about = y - s->origin;
    s->sum += about, s->squares += about * about;
}

INLINE void give(const Task *t, int64_t u, double origin, double sum, double squares) {
    double cases = t->n * t->t, shift = sum / cases;
    t->mean[u] = origin + shift;
    t->var[u] = squares / cases - shift * shift; /* not below zero: the first case is the origin */
}

/* Units side by side, each in its lane. */
static void average_several(const Task *t, int64_t u) {
    const float *y = t->y + u;
    Sums s[VECTORS];
    EACH(v, VECTORS) s[v] = (Sums){wide(y + v * LANES), {}, {}};
    for (int64_t n = 0; n < t->n; n++)
        for (int64_t k = 0; k < t->t; k++)
            EACH(v, VECTORS) add(s + v, wide(y + n * t->to_n + k * t->to_t + v * LANES));
    EACH(v, VECTORS)
        EACH(i, LANES) give(t, u + v * LANES + i, s[v].origin[i], s[v].sum[i], s[v].squares[i]);
}

/* One unit, its cases in each lane in turn. */
static void average_one(const Task *t, int64_t u) {
    const float *y = t->y + u * t->to_u;
    double origin = *y, sum = 0, squares = 0;
    Sums s[VECTORS];
    EACH(v, VECTORS) s[v] = (Sums){(lanes){} + origin, {}, {}};
    for (int64_t n = 0; n < t->n; n++, y += t->to_n) {
        int64_t k = 0;
        if (t->to_t == 1)
            for (; k + UNITS <= t->t; k += UNITS) EACH(v, VECTORS) add(s + v, wide(y + k + v * LANES));
        for (; k < t->t; k++) {
            double about = y[k * t->to_t] - origin;
            sum += about, squares += about * about;
        }
    }
    EACH(v, VECTORS) EACH(i, LANES) sum += s[v].sum[i], squares += s[v].squares[i];
    give(t, u, origin, sum, squares);
}

/* What every thread runs until no units are left. */
void averages(Task *t) {
    for (int64_t u; (u = __atomic_fetch_add(&t->taken, UNITS, __ATOMIC_RELAXED)) < t->u;) {
        int64_t end = least(u + UNITS, t->u);
        if (t->to_u == 1 && end == u + UNITS) average_several(t, u);
        else
            while (u < end) average_one(t, u++);
    }
}
