/* Backpropagate columns of error through linear layers, and add their squares to the D of each
 * layer, which is stored as √D.
 *
 * Below a layer with weight W an error X becomes (X W) * f', where f' is the derivative of the
 * activation function between the layers. All columns of a few cases go through all layers while
 * they are in the cache. WIDTH columns of a weight are packed first, so that a product reads one
 * contiguous stream.
 */

#include <stdlib.h>
#include <string.h>

#include "kernels.h"

/* A tile of T rows by WIDTH columns, a row of the panel and an entry fill the registers. */
enum { LANES = BYTES / sizeof(float), VECTORS = BYTES == 64 ? 4 : 2 };
enum { T = 6, WIDTH = VECTORS * LANES };

typedef float lanes __attribute__((vector_size(BYTES)));

typedef struct { /* as in cascade.py */
    const float *weight, *derivative; /* n by inputs, of the function below; NULL: 1 */
    float *root;                      /* √D: n by units, its rows `stride` apart */
    int64_t units, inputs, stride;
} Layer;

typedef struct {
    const Layer *layers; /* from the last to the first */
    const float *columns; /* r by n by the last layer's units */
    int64_t count, r, widest, together, u, taken; /* u: cases, `together` at a time */
} Task;

typedef struct {
    float *X, *below, *panel;
    double *D; /* of one case */
    int64_t first, cases, rows; /* row i belongs to case first + i % cases */
} Block;

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

/* In double precision: in single, the squares of small errors would underflow. */
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

/* Pack WIDTH columns of a weight from `first` on; zeros where it has no more. */
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
        EACH(i, 0, T) EACH(v, 0, VECTORS) sums[i][v] += X[i][k] * panel[v];
    memcpy(to, sums, sizeof sums);
}

/* Store part of a row, times the derivative if there is one. */
INLINE void give(float *to, lanes x[VECTORS], const float *derivative, int64_t width) {
    lanes f[VECTORS];
    if (derivative) {
        memcpy(f, derivative, width * sizeof(float));
        EACH(v, 0, VECTORS) x[v] *= f[v];
    }
    memcpy(to, x, width * sizeof(float));
}

/* T rows; where fewer are left, the last one is repeated and not stored. */
static void send_tile(Block *b, const Layer *l, int64_t row, int64_t first, int64_t width) {
    int64_t rows = min64(T, b->rows - row);
    const float *X[T];
    lanes product[T][VECTORS];
    EACH(i, 0, T) X[i] = b->X + (row + min64(i, rows - 1)) * l->units;
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
        int64_t width = min64(WIDTH, l->inputs - first);
        pack(b->panel, l, first, width);
        for (int64_t row = 0; row < b->rows; row += T) send_tile(b, l, row, first, width);
    }
    float *sent = b->below;
    b->below = b->X, b->X = sent;
}

/* Run by every thread until no cases are left; one that gets no memory returns at once. */
void cascade(Task *t) {
    int64_t rows = t->together * t->r;
    int64_t numbers = t->widest * (WIDTH + 2 * rows + sizeof(double) / sizeof(float));
    float *memory = aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64);
    if (!memory) return;
    Block b = {.panel = memory, .D = (double *)(memory + t->widest * WIDTH)};
    b.X = (float *)(b.D + t->widest), b.below = b.X + t->widest * rows;
    while ((b.first = __atomic_fetch_add(&t->taken, t->together, __ATOMIC_RELAXED)) < t->u) {
        b.cases = min64(t->together, t->u - b.first);
        take(&b, t);
        for (const Layer *l = t->layers; l < t->layers + t->count; l++) {
            if (l > t->layers) send(&b, l - 1);
            add_squares(&b, l);
        }
    }
    free(memory);
}
