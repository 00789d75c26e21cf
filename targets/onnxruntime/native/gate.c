/* GatedSilu: y (…, N) = silu(first half) * second half of the last axis of x (…, 2 N).
 *
 * One pass in place of a split, an activation and a product. Floor: a read of x and a write of y, from the cache.
 */
#include "exponential.h"
#include "operator.h"

typedef struct Gate {
    const float *x;
    float *y;
    int64_t width;
} Gate;

/* a / (1 + exp(-a)) * b, by exp(-|a|), which cannot overflow; a NaN stays. */
AVX2_INLINE __m256 gated(__m256 a, __m256 b) {
    const __m256 one = _mm256_set1_ps(1), e = exponentials(_mm256_or_ps(a, _mm256_set1_ps(-0.0f)));
    const __m256 sigmoid = _mm256_div_ps(_mm256_blendv_ps(one, e, a), _mm256_add_ps(one, e));
    return _mm256_mul_ps(_mm256_mul_ps(a, sigmoid), b);
}

AVX2 static void gate_row(void *data, size_t row) {
    const Gate *g = data;
    const int64_t width = g->width;
    const float *a = g->x + (int64_t)row * 2 * width, *b = a + width;
    float *y = g->y + (int64_t)row * width;
    int64_t i = 0;
    for (; i + 8 <= width; i += 8) _mm256_storeu_ps(y + i, gated(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i)));
    for (; i < width; i++) y[i] = _mm256_cvtss_f32(gated(_mm256_set1_ps(a[i]), _mm256_set1_ps(b[i])));
}

static OrtStatus *compute(void *kernel, OrtContext *context) {
    const OrtApi *api = *(const OrtApi **)kernel;
    Tensor x;
    TRY(read_input(api, context, 0, &x));
    if (!x.rank || x.dims[x.rank - 1] % 2)
        return api->CreateStatus(ORT_FAIL, "GatedSilu: the input's last dimension must be even");
    x.dims[x.rank - 1] /= 2;
    Gate gate = {.x = x.data, .width = x.dims[x.rank - 1]};
    TRY(make_output(api, context, 0, &x, (void **)&gate.y));
    return each_row(api, context, gate_row, row_count(&x), 4 * gate.width, &gate);
}

Operator gated_silu = {
    .abi = {.CreateKernelV2 = create_plain, .KernelComputeV2 = compute, .KernelDestroy = destroy_plain},
    .name = "GatedSilu",
    .inputs = 1,
    .required = 1,
    .outputs = 1,
    .types = {ORT_FLOAT},
    .made = {ORT_FLOAT},
};
