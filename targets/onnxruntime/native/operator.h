/* What both operators share: reading inputs, attributes and shapes, and passing errors on. */
#pragma once
#include "ort_abi.h"

#define MAX_INPUTS 12
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) static inline

/* Leave the function with the status of a call that failed. */
#define TRY(call)                    \
    do {                             \
        OrtStatus *status_ = (call); \
        if (status_) return status_; \
    } while (0)

/* An operator and the types of its tensors; inputs from `required` on may be absent. */
typedef struct Operator {
    OrtCustomOp abi;
    const char *name;
    int inputs, required, outputs;
    int types[MAX_INPUTS];
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

extern Operator quantized_linear, cached_attention;
