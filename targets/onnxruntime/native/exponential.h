/* Exponentials of vectors. */
#pragma once
#include <immintrin.h>

#include "operator.h"

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
