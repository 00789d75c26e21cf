/* Entry point of the library: registers the operators of domain "llmopt" with a session. */
#include "operator.h"

OrtStatus *read_value(const OrtApi *api, const OrtValue *value, Tensor *tensor) {
    OrtShape *shape;
    TRY(api->GetTensorMutableData((OrtValue *)value, &tensor->data));
    TRY(api->GetTensorTypeAndShape(value, &shape));
    OrtStatus *status = api->GetDimensionsCount(shape, &tensor->rank);
    if (!status && tensor->rank > 4) status = api->CreateStatus(ORT_FAIL, "a tensor of more than four dimensions");
    if (!status) status = api->GetDimensions(shape, tensor->dims, tensor->rank);
    api->ReleaseTensorTypeAndShapeInfo(shape);
    return status;
}

OrtStatus *read_input(const OrtApi *api, const OrtContext *context, size_t index, Tensor *tensor) {
    size_t count;
    const OrtValue *value = NULL;
    tensor->data = NULL;
    tensor->rank = 0;
    TRY(api->KernelContext_GetInputCount(context, &count));
    if (index < count) TRY(api->KernelContext_GetInput(context, index, &value));
    return value ? read_value(api, value, tensor) : NULL;
}

OrtStatus *make_output(const OrtApi *api, OrtContext *context, size_t index, const Tensor *shape, void **data) {
    OrtValue *value = NULL;
    TRY(api->KernelContext_GetOutput(context, index, shape->dims, shape->rank, &value));
    return api->GetTensorMutableData(value, data);
}

OrtStatus *allocate(const OrtApi *api, size_t size, void **data) {
    OrtAllocator *allocator;
    *data = NULL;
    TRY(api->GetAllocatorWithDefaultOptions(&allocator));
    return api->AllocatorAlloc(allocator, size, data);
}

void release(const OrtApi *api, void *data) {
    OrtAllocator *allocator;
    if (data && !api->GetAllocatorWithDefaultOptions(&allocator)) api->AllocatorFree(allocator, data);
}

int64_t row_count(const Tensor *tensor) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < tensor->rank; i++) rows *= tensor->dims[i];
    return rows;
}

int same_shape(const Tensor *a, const Tensor *b) {
    int same = a->rank == b->rank;
    for (size_t i = 0; same && i < a->rank; i++) same = a->dims[i] == b->dims[i];
    return same;
}

OrtStatus *each_row(const OrtApi *api, const OrtContext *context, void (*body)(void *, size_t), int64_t rows,
                    int64_t work, void *data) {
    enum { ALONE = 1 << 15 }; /* floats that take less time than waking other threads and waiting for them */
    if (rows * work > ALONE) return api->KernelContext_ParallelFor(context, body, (size_t)rows, 0, data);
    for (int64_t row = 0; row < rows; row++) body(data, (size_t)row);
    return NULL;
}

OrtStatus *create_plain(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    (void)op, (void)info;
    TRY(allocate(api, sizeof(api), kernel));
    *(const OrtApi **)*kernel = api;
    return NULL;
}

void destroy_plain(void *kernel) { release(*(const OrtApi **)kernel, kernel); }

static const char *name_of(const OrtCustomOp *op) { return ((const Operator *)op)->name; }
static const char *provider(const OrtCustomOp *op) {
    (void)op;
    return NULL;
}
static int input_type(const OrtCustomOp *op, size_t index) { return ((const Operator *)op)->types[index]; }
static size_t input_count(const OrtCustomOp *op) { return (size_t)((const Operator *)op)->inputs; }
static int output_type(const OrtCustomOp *op, size_t index) { return ((const Operator *)op)->made[index]; }
static size_t output_count(const OrtCustomOp *op) { return (size_t)((const Operator *)op)->outputs; }
static int memory_type(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return 0;
}
static int output_kind(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_REQUIRED;
}
static int input_kind(const OrtCustomOp *op, size_t index) {
    return (int)index < ((const Operator *)op)->required ? ORT_REQUIRED : ORT_OPTIONAL;
}

static void complete(OrtCustomOp *abi) {
    abi->version = ORT_VERSION;
    abi->GetName = name_of;
    abi->GetExecutionProviderType = provider;
    abi->GetInputType = input_type;
    abi->GetInputTypeCount = input_count;
    abi->GetOutputType = output_type;
    abi->GetOutputTypeCount = output_count;
    abi->GetInputCharacteristic = input_kind;
    abi->GetOutputCharacteristic = output_kind;
    abi->GetInputMemoryType = memory_type;
}

static void cpuid(uint32_t leaf, uint32_t words[4]) {
    __asm__ volatile("cpuid" : "=a"(words[0]), "=b"(words[1]), "=c"(words[2]), "=d"(words[3]) : "a"(leaf), "c"(0));
}

/* 1 when this processor and its operating system run AVX2 and FMA, which every operator here is compiled for. */
int llmopt_supported(void) {
    uint32_t words[4], state, high;
    cpuid(0, words);
    if (words[0] < 7) return 0;
    cpuid(1, words);
    const uint32_t fma_osxsave_avx = 1u << 12 | 1u << 27 | 1u << 28;
    if ((words[2] & fma_osxsave_avx) != fma_osxsave_avx) return 0;
    __asm__ volatile("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
    if ((state & 6) != 6) return 0;
    cpuid(7, words);
    return (int)(words[1] >> 5 & 1);
}

/* Called by onnxruntime when a session registers this library. */
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static OrtDomain *domain;
    OrtCustomOp *const operators[] = {&quantized_linear.abi, &cached_attention.abi, &coded_attention.abi,
                                      &gated_silu.abi, &add_rms_norm.abi};
    const OrtApi *api = base->GetApi(ORT_VERSION);
    if (!domain) {
        OrtDomain *made;
        TRY(api->CreateCustomOpDomain("llmopt", &made));
        for (size_t i = 0; i < sizeof(operators) / sizeof(*operators); i++) {
            complete(operators[i]);
            TRY(api->CustomOpDomain_Add(made, operators[i]));
        }
        domain = made;
    }
    return api->AddCustomOpDomain(options, domain);
}
