/* Send columns of error down linear layers; on the way add their squares up for each layer: √D.
 *
 * Below a layer with weight W an error X is (X W) * f', f' the derivative of the function between.
 * All columns of a few cases go the whole way while they are in the cache. WIDTH columns of a
 * weight are put side by side first, so that a product reads one contiguous stream.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A tile of T rows by WIDTH columns, a row of the panel and an entry fill the registers. */
#if defined __AVX512F__
enum { LANES = 16, VECTORS = 4 };
#elif defined __AVX__
enum { LANES = 8, VECTORS = 2 };
#else
enum { LANES = 4, VECTORS = 2 };
#endif
enum { T = 6, WIDTH = VECTORS * LANES };

typedef float lanes __attribute__((vector_size(4 * LANES)));

typedef struct { /* as in cascade.py */
    const float *weight, *derivative; /* n by inputs, of what it receives; none: 1 */
    float *root;                      /* √D: n by units, its rows `stride` apart */
    int64_t units, inputs, stride;
} Layer;

typedef struct {
    const Layer *layers; /* from the last to the first */
    const float *columns; /* r by n by the last layer's units */
    int64_t count, r, widest, together, u, taken; /* u: cases, so many together */
} Task;

typedef struct {
    float *X, *below, *panel;
    double *D; /* of a case */
    int64_t first, cases, rows; /* row i is of case first + i % cases */
} Block;

#define INLINE static inline __attribute__((always_inline))
#define EACH(i, end) _Pragma("GCC unroll 8") for (int i = 0; i < (end); i++)

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void take(Block *b, const Task *t) {
    int64_t units = t->layers->units;
    b->rows = t->r * b->cases;
    for (int64_t i = 0; i < b->rows; i++) {
        int64_t row = i / b->cases * t->u + b->first + i % b->cases;
        memcpy(b->X + i * units, t->columns + row * units, units * sizeof(float));
    }
}

INLINE void add(double *restrict D, const float *x, int64_t units) {
    for (int64_t j = 0; j < units; j++) D[j] += (double)x[j] * x[j];
}

/* In double precision, or the squares of small errors vanish. */
static void add_squares(const Block *b, const Layer *l) {
    for (int64_t i = 0; i < b->cases; i++) {
        float *root = l->root + (b->first + i) * l->stride;
        memset(b->D, 0, l->units * sizeof(double));
        add(b->D, root, l->units);
        for (int64_t row = i; row < b->rows; row += b->cases)
            add(b->D, b->X + row * l->units, l->units);
        for (int64_t j = 0; j < l->units; j++) root[j] = __builtin_sqrt(b->D[j]);
    }
}

/* Columns of a weight from `first` on; zeros where there are no more */
static void pack(float *panel, const Layer *l, int64_t first, int64_t width) {
    const float *from = l->weight + first;
    for (int64_t k = 0; k < l->units; k++, panel += WIDTH, from += l->inputs) {
        if (width == WIDTH) memcpy(panel, from, sizeof(float[WIDTH]));
        else for (int64_t j = 0; j < WIDTH; j++) panel[j] = j < width ? from[j] : 0;
    }
}

INLINE void multiply(lanes to[T][VECTORS], const float *const X[T], const lanes *panel, int64_t K) {
    lanes sums[T][VECTORS] = {};
    for (int64_t k = 0; k < K; k++, panel += VECTORS)
        EACH(i, T) EACH(v, VECTORS) sums[i][v] += X[i][k] * panel[v];
    memcpy(to, sums, sizeof sums);
}

/* Part of a row times that of the derivative, if there is one */
INLINE void give(float *to, lanes x[VECTORS], const float *derivative, int64_t width) {
    lanes f[VECTORS];
    if (derivative) {
        memcpy(f, derivative, width * sizeof(float));
        EACH(v, VECTORS) x[v] *= f[v];
    }
    memcpy(to, x, width * sizeof(float));
}

/* Up to T rows; the last again and again where there are fewer */
static void send_tile(Block *b, const Layer *l, int64_t row, int64_t first, int64_t width) {
    int64_t rows = least(T, b->rows - row);
    const float *X[T];
    lanes product[T][VECTORS];
    EACH(i, T) X[i] = b->X + (row + least(i, rows - 1)) * l->units;
    multiply(product, X, (const lanes *)b->panel, l->units);
    for (int64_t i = 0, at = row % b->cases; i < rows; i++, at = at + 1 < b->cases ? at + 1 : 0) {
        float *to = b->below + (row + i) * l->inputs + first;
        const float *derivative = l->derivative;
        if (derivative) derivative += (b->first + at) * l->inputs + first;
        if (width == WIDTH) give(to, product[i], derivative, WIDTH);
        else give(to, product[i], derivative, width);
    }
}

static void send(Block *b, const Layer *l) {
    for (int64_t first = 0; first < l->inputs; first += WIDTH) {
        int64_t width = least(WIDTH, l->inputs - first);
        pack(b->panel, l, first, width);
        for (int64_t row = 0; row < b->rows; row += T) send_tile(b, l, row, first, width);
    }
    float *sent = b->below;
    b->below = b->X, b->X = sent;
}

/* What every thread runs until no cases are left; one without memory leaves them to the others. */
void cascade(Task *t) {
    int64_t rows = t->together * t->r;
    int64_t numbers = t->widest * (WIDTH + 2 * rows + sizeof(double) / sizeof(float));
    float *memory = aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64);
    if (!memory) return;
    Block b = {.panel = memory, .D = (double *)(memory + t->widest * WIDTH)};
    b.X = (float *)(b.D + t->widest), b.below = b.X + t->widest * rows;
    while ((b.first = __atomic_fetch_add(&t->taken, t->together, __ATOMIC_RELAXED)) < t->u) {
        b.cases = least(t->together, t->u - b.first);
        take(&b, t);
        for (const Layer *l = t->layers; l < t->layers + t->count; l++) {
            if (l > t->layers) send(&b, l - 1);
            add_squares(&b, l);
        }
    }
    free(memory);
}
