/* What attention works on. */
#pragma once
#include "exponential.h"

enum { KEYS = 32, MAX_QUERIES = 8, MAX_WIDTH = 256, LINE = 64 };

/* The operator's attributes, and whether its states are codes. */
typedef struct Attention {
    const OrtApi *api;
    int coded;
    int64_t heads, kv_heads, window, interleaved;
    float scale, softcap;
} Attention;

/* One call: `rows` new rows a sequence, heads of `width`, states of `capacity` slots with elements of `element` bytes,
 * float32 or, with scales (Hk,), int8 codes. */
typedef struct Pass {
    const Attention *a;
    const float *query, *key, *value, *cos, *sin, *sinks, *key_scales, *value_scales;
    const int32_t *lengths;
    const int64_t *positions;
    float *out;
    char *keys, *values;
    int64_t rows, width, capacity, element, rotary, query_stride, key_stride, tile;
} Pass;

/* A row and head on its way through the keys first to last: largest score, sum and weighted values so far. */
typedef struct Query {
    float q[MAX_WIDTH], out[MAX_WIDTH], top, sum, *to;
    int64_t first, last;
} Query;

/* Lines of the next block of keys and of values left to ask for, `step` with each eight keys of the block at hand. */
typedef struct Next {
    const char *keys, *values;
    int64_t left, step;
} Next;

OrtStatus *run_pass(const OrtApi *api, const OrtContext *context, Pass *p, int64_t batch);

/* cap tanh(x / cap), with tanh(z) = 1 - 2 / (exp(2 z) + 1). */
AVX2_INLINE __m256 soft_cap(__m256 x, float cap) {
    const __m256 two = _mm256_set1_ps(2), one = _mm256_set1_ps(1), limit = _mm256_set1_ps(40);
    const __m256 z = _mm256_min_ps(limit, _mm256_mul_ps(x, _mm256_set1_ps(2 / cap)));
    const __m256 tanh = _mm256_sub_ps(one, _mm256_div_ps(two, _mm256_add_ps(exponentials(z), one)));
    return _mm256_mul_ps(tanh, _mm256_set1_ps(cap));
}
