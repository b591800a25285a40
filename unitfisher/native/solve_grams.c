/* Solve (diag(v_u) K diag(v_u) - x_u x_u' + diag(own_u)) Y_u = rhs_u for units u that share a K.
 * Right-hand sides and solutions are rows; their inner products are returned if asked for.
 *
 * One unit's system is too small to fill a processor. So every lane of a vector holds another
 * unit, and each operation below acts on LANES units at once. Lanes never mix: the result of a
 * unit depends neither on its neighbours nor on the number of threads.
 *
 * The Cholesky factor L is kept in panels of T rows: panel I is tiles (I, 0) .. (I, I) of T by T,
 * column after column, so that the product of two panels reads two contiguous streams. The
 * diagonal holds 1 / L_jj. Sizes that T or LANES do not divide are padded with the identity.
 *
 * With SINGLE defined this is solve_grams_single, in floats.
 */

#include <float.h>
#include <stdbool.h>
#include <stdlib.h>

#include "kernels.h"

/* A tile, and a column of each of the two panels that are multiplied, fill the registers: one
 * vector too many doubles the time, vectors wider than a register take ten times as long. */
enum { T = BYTES == 64 ? 4 : 3 };
#ifdef SINGLE
typedef float real;
typedef int32_t whole;
#define solve_grams solve_grams_single
#define EPSILON FLT_EPSILON
#else
typedef double real;
typedef int64_t whole;
#define EPSILON DBL_EPSILON
#endif
enum { LANES = BYTES / sizeof(real) };
enum { BLOCK = 16 }; /* tiles that fit into the first cache; BLOCK² of them fit into the second */

typedef real lanes __attribute__((vector_size(BYTES)));
typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)))); /* unaligned */
typedef whole mask __attribute__((vector_size(BYTES)));

typedef struct { /* as in gram.py */
    const real *K, *v, *own, *rhs, *x, *noise;
    real *Y, *products, *L; /* of Y with rhs and Y, or NULL; the factors, or NULL */
    bool *regular;
    int64_t u, n, r, group, known, taken; /* units that share a K; are the factors known? */
} Task;

typedef struct { /* up to LANES units: weights, solutions, factor */
    lanes *v, *own, *x, *noise, *y, *L;
    mask regular;
    const real *K[LANES];
    int64_t n, panels, first, units;
} Block;

#define APART static __attribute__((noinline)) /* keeps its registers out of the inner loop */

INLINE int64_t above(int64_t I) { return T * T * I * (I + 1) / 2; }
INLINE lanes *tile(const Block *b, int64_t I, int64_t J) { return b->L + above(I) + T * T * J; }

INLINE lanes gram(const Block *b, int64_t i, int64_t j) {
    int64_t at = b->n * min64(i, b->n - 1) + min64(j, b->n - 1);
    lanes K = (lanes){} + b->K[0][at];
    if (b->K[0] != b->K[LANES - 1]) EACH(l, 1, LANES) K[l] = b->K[l][at];
    return K;
}

INLINE lanes weighted(const Block *b, int64_t i, int64_t j) {
    return b->v[i] * b->v[j] * gram(b, i, j);
}

INLINE void build(lanes C[T][T], const Block *b, int64_t I, int64_t J) {
    EACH(i, 0, T) {
        int64_t row = T * I + i;
        EACH(j, 0, T) {
            int64_t column = T * J + j;
            C[i][j] = weighted(b, row, column) - b->x[row] * b->x[column];
        }
        if (I == J) C[i][i] += row < b->n ? b->own[row] : (lanes){} + 1;
    }
}

/* C -= A B' */
INLINE void subtract(lanes C[T][T], const lanes *A, const lanes *B, int64_t columns) {
    for (int64_t k = 0; k < columns; k++, A += T, B += T) {
        lanes a[T], b[T];
        EACH(i, 0, T) a[i] = A[i], b[i] = B[i]; /* loaded once: C might alias A or B */
        EACH(i, 0, T) EACH(j, 0, T) C[i][j] -= a[i] * b[j];
    }
}

/* A pivot must be larger than what rounding can make of 0: see factored in solvers.py. The bound is
 * relative to the diagonal entry before x x' was subtracted: what is left after may be rounding. */
APART void factor_tile(Block *b, int64_t J) {
    lanes C[T][T], root, *at = tile(b, J, J);
    EACH(j, 0, T) {
        int64_t row = T * J + j;
        lanes rounding = b->noise[row] + 64 * EPSILON * (weighted(b, row, row) + b->own[row]);
        EACH(i, j, T) C[i][j] = at[T * j + i];
        EACH(k, 0, j) EACH(i, j, T) C[i][j] -= C[i][k] * C[j][k];
        EACH(l, 0, LANES) root[l] = __builtin_sqrt(C[j][j][l]);
        C[j][j] = 1 / root;
        b->regular &= rounding * C[j][j] * C[j][j] < 1;
        EACH(i, j + 1, T) C[i][j] *= C[j][j];
        EACH(i, j, T) at[T * j + i] = C[i][j];
    }
}

/* Update tile (I, J) by the products of tiles first .. last - 1 of panels I and J. */
INLINE void update(const Block *b, int64_t I, int64_t J, int64_t first, int64_t last) {
    lanes C[T][T], *at = tile(b, I, J), *D = tile(b, J, J);
    if (first == 0) build(C, b, I, J);
    else EACH(j, 0, T) EACH(i, 0, T) C[i][j] = at[T * j + i];
    subtract(C, tile(b, I, first), tile(b, J, first), T * (min64(J, last) - first));
    if (J < min64(I, last)) EACH(j, 0, T) EACH(i, 0, T) {
        EACH(k, 0, j) C[i][j] -= C[i][k] * D[T * k + j];
        C[i][j] *= D[T * j + j];
    }
    EACH(j, 0, T) EACH(i, 0, T) at[T * j + i] = C[i][j];
}

static void factor(Block *b) {
    b->regular = (mask){} == 0;
    for (int64_t first = 0; first < b->panels; first += BLOCK)
        for (int64_t left = first; left < b->panels; left += BLOCK)
            for (int64_t I = left; I < b->panels; I++) {
                for (int64_t J = left; J < min64(I + 1, left + BLOCK); J++)
                    update(b, I, J, first, first + BLOCK);
                if (I < first + BLOCK) factor_tile(b, I);
            }
}

/* y = L'^-1 L^-1 y for R right-hand sides at once */
INLINE void substitute(const Block *b, int R) {
    lanes x[T][2], *y = b->y;
    for (int64_t I = 0; I < b->panels; I++) {
        const lanes *A = tile(b, I, 0), *D = tile(b, I, I);
        EACH(i, 0, T) EACH(c, 0, R) x[i][c] = y[R * (T * I + i) + c];
        for (int64_t k = 0; k < T * I; k++)
            EACH(i, 0, T) EACH(c, 0, R) x[i][c] -= A[T * k + i] * y[R * k + c];
        EACH(i, 0, T) EACH(c, 0, R) {
            EACH(k, 0, i) x[i][c] -= D[T * k + i] * x[k][c];
            y[R * (T * I + i) + c] = x[i][c] *= D[T * i + i];
        }
    }
    for (int64_t I = b->panels - 1; I >= 0; I--) {
        const lanes *A = tile(b, I, 0), *D = tile(b, I, I);
        for (int i = T - 1; i >= 0; i--) EACH(c, 0, R) {
            x[i][c] = y[R * (T * I + i) + c];
            EACH(k, i + 1, T) x[i][c] -= D[T * i + k] * x[k][c];
            y[R * (T * I + i) + c] = x[i][c] *= D[T * i + i];
        }
        for (int64_t k = 0; k < T * I; k++)
            EACH(i, 0, T) EACH(c, 0, R) y[R * k + c] -= A[T * k + i] * x[i][c];
    }
}

INLINE void gather(lanes *x, const Block *b, const real *from, int64_t r, int R) {
    for (int64_t i = 0; i < T * b->panels * R; i++) x[i] = (lanes){};
    for (int64_t l = 0; l < b->units; l++)
        for (int64_t i = 0; i < b->n; i++)
            EACH(c, 0, R) x[R * i + c][l] = from[(l * r + c) * b->n + i];
}

INLINE void solve(const Block *b, const Task *t, int64_t column, int R) {
    int64_t at = (b->first * t->r + column) * t->n;
    gather(b->y, b, t->rhs + at, t->r, R);
    substitute(b, R);
    for (int64_t l = 0; l < b->units; l++, at += t->r * t->n)
        for (int64_t i = 0; i < t->n; i++) EACH(c, 0, R)
            t->Y[at + c * t->n + i] = b->regular[l] ? b->y[R * i + c][l] : __builtin_nan("");
}

INLINE real product(const real *x, const real *y, int64_t n) {
    lanes sums = {};
    real sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += *(const loose *)(x + i) * *(const loose *)(y + i);
    EACH(l, 0, LANES) sum += sums[l];
    for (; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static void multiply(const Task *t, int64_t unit) {
    int64_t n = t->n, r = t->r;
    const real *Y = t->Y + unit * r * n, *rhs = t->rhs + unit * r * n;
    real *to = t->products + unit * 2 * r * r;
    for (int64_t i = 0; i < r; i++, to += 2 * r)
        for (int64_t j = 0; j < r; j++) {
            to[j] = product(Y + i * n, rhs + j * n, n);
            to[r + j] = product(Y + i * n, Y + j * n, n);
        }
}

static void factor_block(Block *b, const Task *t) {
    EACH(l, 0, LANES)
        b->K[l] = t->K + t->n * t->n * (min64(b->first + l, t->u - 1) / t->group);
    gather(b->v, b, t->v + b->first * t->n, 1, 1);
    gather(b->own, b, t->own + b->first * t->n, 1, 1);
    gather(b->x, b, t->x + b->first * t->n, 1, 1);
    gather(b->noise, b, t->noise + b->first * t->n, 1, 1);
    for (int64_t i = 0; i < b->n; i++)
        for (int64_t l = b->units; l < LANES; l++) b->own[i][l] = 1;
    factor(b);
    for (int64_t l = 0; l < b->units; l++) t->regular[b->first + l] = b->regular[l];
}

static void solve_block(Block *b, const Task *t) {
    int64_t column = 0;
    b->units = min64(LANES, t->u - b->first);
    if (t->L) b->L = (lanes *)t->L + b->first / LANES * above(b->panels);
    if (!t->known) factor_block(b, t);
    for (int64_t l = 0; l < b->units; l++) b->regular[l] = t->regular[b->first + l];
    for (; column + 1 < t->r; column += 2) solve(b, t, column, 2);
    if (column < t->r) solve(b, t, column, 1);
    if (t->products)
        for (int64_t l = 0; l < b->units; l++) multiply(t, b->first + l);
}

/* Run by every thread until no units are left; one that gets no memory returns at once. */
void solve_grams(Task *t) {
    int64_t panels = (t->n + T - 1) / T, rows = T * panels, L = t->L ? 0 : above(panels);
    lanes *memory = aligned_alloc(sizeof(lanes), (6 * rows + L + 1) * sizeof(lanes));
    if (!memory) return;
    Block b = {.n = t->n, .panels = panels, .v = memory};
    b.own = b.v + rows, b.x = b.own + rows, b.noise = b.x + rows, b.y = b.noise + rows;
    b.L = b.y + 2 * rows;
    while ((b.first = __atomic_fetch_add(&t->taken, LANES, __ATOMIC_RELAXED)) < t->u)
        solve_block(&b, t);
    free(memory);
}
