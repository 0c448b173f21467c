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
#if defined(__clang__) || __GNUC__ >= 12
#define INTERLEAVED(a, b, h) __builtin_shufflevector(a, b, h, h + 16, h + 1, h + 17, h + 2, h + 18, h + 3, h + 19, \
                                                     h + 4, h + 20, h + 5, h + 21, h + 6, h + 22, h + 7, h + 23)
#else
#define INTERLEAVED(a, b, h) __builtin_shuffle(a, b, (u32x16){h, h + 16, h + 1, h + 17, h + 2, h + 18, h + 3, h + 19, \
                                                              h + 4, h + 20, h + 5, h + 21, h + 6, h + 22, h + 7, h + 23})
#endif
/* Each pass turns the bits of a value's place, row before column, round by one: after four they have changed
 * places. */
static inline void transpose_tile(f32x16 *tile) {
    for (int pass = 0; pass < 4; pass++) {
        f32x16 next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = INTERLEAVED(tile[i], tile[i + LANES / 2], 0);
            next[2 * i + 1] = INTERLEAVED(tile[i], tile[i + LANES / 2], 8);
        }
        memcpy(tile, next, sizeof next);
    }
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

#define NAME transpose_float_float
#define FROM float
#define LOAD load_float
#define ONE one_float
#define TO float
#define STORE store_float
#define SET set_float
#include "transpose_to_type.h"
#define NAME transpose_float_bf16
#define FROM float
#define LOAD load_float
#define ONE one_float
#define TO bf16
#define STORE store_bf16
#define SET set_bf16
#include "transpose_to_type.h"
#define NAME transpose_bf16_float
#define FROM bf16
#define LOAD load_bf16
#define ONE one_bf16
#define TO float
#define STORE store_float
#define SET set_float
#include "transpose_to_type.h"
#define NAME transpose_bf16_bf16
#define FROM bf16
#define LOAD load_bf16
#define ONE one_bf16
#define TO bf16
#define STORE store_bf16
#define SET set_bf16
#include "transpose_to_type.h"
