/* What attention works on, and its exponentials. */
#pragma once
#include <immintrin.h>

#include "operator.h"

enum { KEYS = 32, MAX_QUERIES = 8, MAX_WIDTH = 256, LINE = 64 };

/* The operator's attributes. */
typedef struct Attention {
    const OrtApi *api;
    int64_t heads, kv_heads, window, interleaved;
    float scale, softcap;
} Attention;

/* One call: `rows` new rows a sequence, heads of `width`, states of `capacity` slots. */
typedef struct Pass {
    const Attention *a;
    const float *query, *key, *value, *cos, *sin, *sinks;
    const int32_t *lengths;
    const int64_t *positions;
    float *out, *keys, *values;
    int64_t rows, width, capacity, rotary, query_stride, key_stride, tile;
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

/* exp(x) to about 1e-7 relative for x <= 88; 0 below -87; NaN stays. The series of exp(x - n ln 2), times 2^n. */
AVX2_INLINE __m256 exponentials(__m256 x) {
    const __m256 floor = _mm256_set1_ps(-87.0f);
    const __m256 tiny = _mm256_cmp_ps(x, floor, _CMP_LT_OQ), y = _mm256_max_ps(floor, x);
    const __m256 n =
        _mm256_round_ps(_mm256_mul_ps(y, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), y); /* ln 2 in two parts, the first exact times n */
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 s = _mm256_set1_ps(1.0f / 5040);
    s = _mm256_fmadd_ps(s, r, _mm256_set1_ps(1.0f / 720));
    s = _mm256_fmadd_ps(s, r, _mm256_set1_ps(1.0f / 120));
    s = _mm256_fmadd_ps(s, r, _mm256_set1_ps(1.0f / 24));
    s = _mm256_fmadd_ps(s, r, _mm256_set1_ps(1.0f / 6));
    s = _mm256_fmadd_ps(s, r, _mm256_set1_ps(0.5f));
    s = _mm256_fmadd_ps(s, r, _mm256_set1_ps(1.0f));
    s = _mm256_fmadd_ps(s, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(tiny, _mm256_mul_ps(s, _mm256_castsi256_ps(power)));
}

AVX2_INLINE float exponential(float x) { return _mm256_cvtss_f32(exponentials(_mm256_set1_ps(x))); }

/* cap tanh(x / cap), with tanh(z) = 1 - 2 / (exp(2 z) + 1). */
AVX2_INLINE __m256 soft_cap(__m256 x, float cap) {
    const __m256 two = _mm256_set1_ps(2), one = _mm256_set1_ps(1), limit = _mm256_set1_ps(40);
    const __m256 z = _mm256_min_ps(limit, _mm256_mul_ps(x, _mm256_set1_ps(2 / cap)));
    const __m256 tanh = _mm256_sub_ps(one, _mm256_div_ps(two, _mm256_add_ps(exponentials(z), one)));
    return _mm256_mul_ps(tanh, _mm256_set1_ps(cap));
}
