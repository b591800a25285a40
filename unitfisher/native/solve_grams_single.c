/* The same in single precision: a vector holds twice the units, so a factor takes half the time. */

#define SINGLE
#include "solve_grams.c"
