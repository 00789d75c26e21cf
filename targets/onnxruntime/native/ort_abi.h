/* The part of onnxruntime's C ABI that a library of custom operators needs, so that no header has to be installed.
 *
 * onnxruntime only ever appends to these structures. The positions below are those of its API version 24, the oldest
 * version that llmopt runs on; the assertions hold them. Types that are only passed on are left opaque.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define ORT_VERSION 24
#define ORT_FAIL 1
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7 };
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtContext OrtContext;
typedef struct OrtDomain OrtDomain;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOp OrtCustomOp;

typedef struct OrtApi {
    OrtStatus *(*CreateStatus)(int code, const char *message);
    void *unused_1[25];
    OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtDomain **domain);
    OrtStatus *(*CustomOpDomain_Add)(OrtDomain *domain, const OrtCustomOp *op);
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtDomain *domain);
    void *unused_29[22];
    OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **data);
    void *unused_52[9];
    OrtStatus *(*GetDimensionsCount)(const OrtShape *shape, size_t *count);
    OrtStatus *(*GetDimensions)(const OrtShape *shape, int64_t *dims, size_t count);
    void *unused_63[2];
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtShape **shape);
    void *unused_66[9];
    OrtStatus *(*AllocatorAlloc)(OrtAllocator *allocator, size_t size, void **data);
    OrtStatus *(*AllocatorFree)(OrtAllocator *allocator, void *data);
    void *unused_77[1];
    OrtStatus *(*GetAllocatorWithDefaultOptions)(OrtAllocator **allocator);
    void *unused_79[6];
    OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name, float *value);
    OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name, int64_t *value);
    void *unused_87[1];
    OrtStatus *(*KernelContext_GetInputCount)(const OrtContext *context, size_t *count);
    void *unused_89[1];
    OrtStatus *(*KernelContext_GetInput)(const OrtContext *context, size_t index, const OrtValue **value);
    OrtStatus *(*KernelContext_GetOutput)(OrtContext *context, size_t index, const int64_t *dims, size_t count,
                                          OrtValue **value);
    void *unused_92[7];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtShape *shape);
    void *unused_100[130];
    OrtStatus *(*KernelInfo_GetInputCount)(const OrtKernelInfo *info, size_t *count);
    void *unused_231[18];
    OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info, size_t index, int *is_constant,
                                                    const OrtValue **value);
    void *unused_250[24];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtContext *context, void (*body)(void *, size_t), size_t total,
                                            size_t batches, void *data);
} OrtApi;

#define ORT_AT(member, index) _Static_assert(offsetof(OrtApi, member) == (index) * sizeof(void *), #member)
ORT_AT(CreateCustomOpDomain, 26);
ORT_AT(GetTensorMutableData, 51);
ORT_AT(GetDimensionsCount, 61);
ORT_AT(GetTensorTypeAndShape, 65);
ORT_AT(AllocatorAlloc, 75);
ORT_AT(GetAllocatorWithDefaultOptions, 78);
ORT_AT(KernelInfoGetAttribute_float, 85);
ORT_AT(KernelContext_GetInputCount, 88);
ORT_AT(KernelContext_GetInput, 90);
ORT_AT(ReleaseTensorTypeAndShapeInfo, 99);
ORT_AT(KernelInfo_GetInputCount, 230);
ORT_AT(KernelInfoGetConstantInput_tensor, 249);
ORT_AT(KernelContext_ParallelFor, 274);

typedef struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
    const char *(*GetName)(const OrtCustomOp *op);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *op);
    int (*GetInputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp *op);
    int (*GetOutputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
    void (*KernelCompute)(void *kernel, OrtContext *context);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index);
    int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtContext *context);
    void *InferOutputShapeFn;
    int (*GetStartVersion)(const OrtCustomOp *op);
    int (*GetEndVersion)(const OrtCustomOp *op);
    void *unused_aliasing[4];
};
