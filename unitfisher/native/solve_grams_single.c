/* The same in single precision: twice the units to a vector, for half the time of a factor. */

#define SINGLE
#include "solve_grams.c"
