/* Sum w² (a - o)(a - o)' and w² (a - o) over cases, each of many units u with its own w and o.
 *
 * Rows w (a - o) and the sums over up to ROWS of them are in single precision, which is exact
 * enough there; these sums are added up in double precision. The ROWS cases and the sums that a
 * unit needs at a time stay in the cache.
 *
 * Rows lie in panels of WIDTH columns, row after row, so that a product of two panels reads two
 * contiguous streams. Sizes that WIDTH does not divide are padded with zeros.
 */

#include <stdlib.h>
#include <string.h>

#include "kernels.h"

/* A tile of T rows by WIDTH columns, a row of the panel and an entry fill the registers. */
enum { LANES = BYTES / sizeof(float) };
enum { T = 4, VECTORS = 3, WIDTH = VECTORS * LANES, ROWS = 64 };

typedef float lanes __attribute__((vector_size(BYTES)));

typedef struct { /* as in second_moments.py */
    const float *a, *w, *origin;
    const double *scale; /* of each unit's w² */
    double *first, *second;
    int64_t u, n, d, group, own, taken; /* group: units that share a; own: each has an origin */
} Task;

typedef struct {
    lanes *X;
    float w[ROWS];
    double *first, *second; /* their rows have `columns` entries */
    int64_t columns;
} Sums;

INLINE float *panel(const Sums *s, int64_t J) { return (float *)(s->X + J * ROWS * VECTORS); }

/* C += A' B, T columns of one panel with all of another */
INLINE void add_tile(double *C, int64_t columns, const float *A, const lanes *B, int64_t rows) {
    lanes s[T][VECTORS] = {};
    for (int64_t n = 0; n < rows; n++, A += WIDTH, B += VECTORS)
        EACH(i, 0, T) EACH(v, 0, VECTORS) s[i][v] += A[i] * B[v];
    EACH(i, 0, T) {
        float row[WIDTH];
        memcpy(row, s[i], sizeof row);
        for (int64_t j = 0; j < WIDTH; j++) C[i * columns + j] += row[j];
    }
}

/* Load up to ROWS cases of nonzero weight, from `n` on; return how many. */
static int64_t take(Sums *s, const Task *t, const float *a, const float *w, const float *o,
                    int64_t *n) {
    int64_t rows = 0;
    for (; *n < t->n && rows < ROWS; ++*n) {
        if (w[*n] == 0) continue;
        const float *case_n = a + *n * t->d;
        for (int64_t j = 0; j < t->d; j += WIDTH) {
            float *x = panel(s, j / WIDTH) + rows * WIDTH;
            int64_t width = min64(WIDTH, t->d - j);
            for (int64_t l = 0; l < width; l++) x[l] = w[*n] * (case_n[j + l] - o[j + l]);
        }
        s->w[rows++] = w[*n];
    }
    return rows;
}

static void add_rows(Sums *s, int64_t d, int64_t rows) {
    for (int64_t J = 0; J * WIDTH < d; J++) {
        const float *x = panel(s, J);
        float sum[WIDTH] = {};
        for (int64_t n = 0; n < rows; n++)
            for (int64_t l = 0; l < WIDTH; l++) sum[l] += s->w[n] * x[WIDTH * n + l];
        for (int64_t l = 0; l < WIDTH; l++) s->first[J * WIDTH + l] += sum[l];
        for (int64_t i = J * WIDTH; i < d; i += T)
            add_tile(s->second + i * s->columns + J * WIDTH, s->columns,
                     panel(s, i / WIDTH) + i % WIDTH, (const lanes *)x, rows);
    }
}

/* Store both triangles of the sums, of which only the lower was computed. */
static void give(const Sums *s, const Task *t, int64_t u) {
    double *second = t->second + u * t->d * t->d, scale = t->scale[u];
    for (int64_t i = 0; i < t->d; i++) t->first[u * t->d + i] = scale * s->first[i];
    for (int64_t i = 0; i < t->d; i++)
        for (int64_t j = 0; j <= i; j++)
            second[i * t->d + j] = second[j * t->d + i] = scale * s->second[i * s->columns + j];
}

static void add_unit(Sums *s, const Task *t, int64_t u) {
    const float *a = t->a + u / t->group * t->n * t->d, *w = t->w + u * t->n;
    const float *origin = t->origin + (t->own ? u * t->d : 0);
    memset(s->first, 0, (s->columns + 1) * s->columns * sizeof(double));
    for (int64_t n = 0; n < t->n;) {
        int64_t rows = take(s, t, a, w, origin, &n);
        add_rows(s, t->d, rows);
    }
    give(s, t, u);
}

/* Run by every thread until no units are left; one that gets no memory returns at once. */
void second_moments(Task *t) {
    int64_t panels = (t->d + WIDTH - 1) / WIDTH, columns = panels * WIDTH;
    int64_t X = ROWS * columns * sizeof(float), sums = (columns + 1) * columns * sizeof(double);
    char *memory = aligned_alloc(64, (X + sums + 63) / 64 * 64);
    if (!memory) return;
    memset(memory, 0, X);
    Sums s = {.X = (lanes *)memory, .columns = columns, .first = (double *)(memory + X)};
    s.second = s.first + columns;
    for (int64_t u; (u = __atomic_fetch_add(&t->taken, 1, __ATOMIC_RELAXED)) < t->u;)
        add_unit(&s, t, u);
    free(memory);
}
