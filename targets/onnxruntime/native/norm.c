/* AddRmsNorm: for x and residual (…, C) and gamma (C,) their sum s, and s / sqrt(mean(s^2) + epsilon) * gamma.
 *
 * Outputs: the norm, then s. Floor: reads and writes of the rows, from the cache. A row's squares are summed in one
 * order, by 8 lanes.
 */
#include <immintrin.h>

#include "operator.h"

enum { X, RESIDUAL, GAMMA };

typedef struct Norm {
    const OrtApi *api;
    float epsilon;
} Norm;

typedef struct Rows {
    const float *x, *residual, *gamma;
    float *y, *sum, epsilon;
    int64_t width;
} Rows;

AVX2 static void norm_row(void *data, size_t row) {
    const Rows *n = data;
    const int64_t width = n->width, at = (int64_t)row * width;
    const float *x = n->x + at, *residual = n->residual + at;
    float *sum = n->sum + at, *y = n->y + at, lanes[8], total = 0;
    __m256 squares = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= width; i += 8) {
        const __m256 s = _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(residual + i));
        _mm256_storeu_ps(sum + i, s);
        squares = _mm256_fmadd_ps(s, s, squares);
    }
    for (; i < width; i++) {
        sum[i] = x[i] + residual[i];
        total += sum[i] * sum[i];
    }
    _mm256_storeu_ps(lanes, squares);
    for (int j = 0; j < 8; j++) total += lanes[j];
    const __m128 root = _mm_sqrt_ss(_mm_set_ss(total / (float)width + n->epsilon));
    const float factor = 1 / _mm_cvtss_f32(root);
    for (i = 0; i < width; i++) y[i] = sum[i] * factor * n->gamma[i];
}

static void destroy(void *kernel) {
    Norm *norm = kernel;
    release(norm->api, norm);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    (void)op;
    Norm *norm;
    TRY(allocate(api, sizeof(Norm), (void **)&norm));
    *norm = (Norm){.api = api};
    OrtStatus *status = api->KernelInfoGetAttribute_float(info, "epsilon", &norm->epsilon);
    if (status)
        destroy(norm);
    else
        *kernel = norm;
    return status;
}

static OrtStatus *compute(void *kernel, OrtContext *context) {
    const Norm *norm = kernel;
    const OrtApi *api = norm->api;
    Tensor x, residual, gamma;
    TRY(read_input(api, context, X, &x));
    TRY(read_input(api, context, RESIDUAL, &residual));
    TRY(read_input(api, context, GAMMA, &gamma));
    const int64_t width = x.rank ? x.dims[x.rank - 1] : 0;
    if (!same_shape(&x, &residual) || gamma.rank != 1 || gamma.dims[0] != width)
        return api->CreateStatus(ORT_FAIL, "AddRmsNorm: x and residual must be of one shape, gamma of its last axis");
    Rows rows = {x.data, residual.data, gamma.data, NULL, NULL, norm->epsilon, width};
    TRY(make_output(api, context, 0, &x, (void **)&rows.y));
    TRY(make_output(api, context, 1, &x, (void **)&rows.sum));
    return each_row(api, context, norm_row, row_count(&x), width, &rows);
}

Operator add_rms_norm = {
    .abi = {.CreateKernelV2 = create, .KernelComputeV2 = compute, .KernelDestroy = destroy},
    .name = "AddRmsNorm",
    .inputs = 3,
    .required = 3,
    .outputs = 2,
    .types = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT},
    .made = {ORT_FLOAT, ORT_FLOAT},
};
