/* LoRA for a few rows per adapter (decode): y[row] += B . (A . x[row]) for many adapters in one call.
 *
 * Each adapter's matrices are read once, at their true rank; rows are picked by index, so nothing is gathered
 * and no zero is multiplied. Sums are float32, rounded once into y. Compiled once for float and once for
 * bfloat16, by `few_rows.py`, for the machine it runs on.
 */
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t bf16;

#define LANES 16
#define BLOCK 4           /* rows and rank rows that one inner loop keeps in registers */
#define COLUMNS 64        /* outputs that one inner loop keeps in registers */
#define RANKS_PER_ITEM 8  /* rank rows in one piece of parallel work */
#define COLUMNS_PER_ITEM 512
#define PARALLEL_BYTES (96 * 1024) /* below this, waking the other threads costs more than they save */

typedef struct { int64_t begin, end, left, right; const void *b; } Slice;
typedef struct { const void *a; int64_t ranks, num_slices; Slice slices[]; } Layer;
typedef struct { int64_t slot, start, stop; } Span;

static inline f32x16 load_float(const float *p) { f32x16 v; memcpy(&v, p, sizeof v); return v; }
static inline void store_float(float *p, f32x16 v) { memcpy(p, &v, sizeof v); }
static inline float one_float(const float *p) { return *p; }
static inline void set_float(float *p, float v) { *p = v; }

static inline f32x16 load_bf16(const bf16 *p) {
    u16x16 v; memcpy(&v, p, sizeof v);
    return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
}
static inline void store_bf16(bf16 *p, f32x16 v) {
    u32x16 u = (u32x16)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16; /* to nearest, ties to even */
    u16x16 r = __builtin_convertvector(u, u16x16); memcpy(p, &r, sizeof r);
}
static inline float one_bf16(const bf16 *p) {
    uint32_t u = (uint32_t)*p << 16; float f; memcpy(&f, &u, 4); return f;
}
static inline void set_bf16(bf16 *p, float v) {
    uint32_t u; memcpy(&u, &v, 4); *p = (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline float sum16(f32x16 v) {
    float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s;
}
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#define T float
#define NAME(x) x##_float
#include "few_rows_of_type.h"
#undef T
#undef NAME
#define T bf16
#define NAME(x) x##_bf16
#include "few_rows_of_type.h"
