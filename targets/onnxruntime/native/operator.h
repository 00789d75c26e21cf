/* What the operators share: reading inputs, attributes and shapes, rows in parallel, and passing errors on. */
#pragma once
#include "ort_abi.h"

#define MAX_INPUTS 14
#define MAX_OUTPUTS 3
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) static inline

/* Leave the function with the status of a call that failed. */
#define TRY(call)                    \
    do {                             \
        OrtStatus *status_ = (call); \
        if (status_) return status_; \
    } while (0)

/* An operator and the types of its inputs and of what it made; inputs from `required` on may be absent. */
typedef struct Operator {
    OrtCustomOp abi;
    const char *name;
    int inputs, required, outputs;
    int types[MAX_INPUTS], made[MAX_OUTPUTS];
} Operator;

/* A tensor: its data, or NULL for an absent input, and its shape. */
typedef struct Tensor {
    void *data;
    int64_t dims[4];
    size_t rank;
} Tensor;

OrtStatus *read_value(const OrtApi *api, const OrtValue *value, Tensor *tensor);
OrtStatus *read_input(const OrtApi *api, const OrtContext *context, size_t index, Tensor *tensor);
OrtStatus *make_output(const OrtApi *api, OrtContext *context, size_t index, const Tensor *shape, void **data);
OrtStatus *allocate(const OrtApi *api, size_t size, void **data);
void release(const OrtApi *api, void *data);

/* Rows of a tensor: the product of all dimensions but the last. */
int64_t row_count(const Tensor *tensor);

int same_shape(const Tensor *a, const Tensor *b);

/* body(data, row) for each of `rows` rows of `work` floats; few are left to the calling thread. */
OrtStatus *each_row(const OrtApi *api, const OrtContext *context, void (*body)(void *, size_t), int64_t rows,
                    int64_t work, void *data);

/* Creation of an operator without attributes: its kernel is a pointer to the API. */
OrtStatus *create_plain(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
void destroy_plain(void *kernel);

extern Operator quantized_linear, cached_attention, coded_attention, gated_silu, add_rms_norm;
