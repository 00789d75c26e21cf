/* CachedAttention and CodedAttention as operators: their attributes, inputs and outputs. */
#include "attention.h"

enum { QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LENGTHS, LONGEST, COS, SIN, POSITIONS, BIAS, SINKS };
enum { KEY_SCALE = SINKS + 1, VALUE_SCALE };

static OrtStatus *read_attributes(Attention *a, const OrtKernelInfo *info) {
    const OrtApi *api = a->api;
    TRY(api->KernelInfoGetAttribute_int64(info, "num_heads", &a->heads));
    TRY(api->KernelInfoGetAttribute_int64(info, "kv_num_heads", &a->kv_heads));
    TRY(api->KernelInfoGetAttribute_int64(info, "local_window_size", &a->window));
    TRY(api->KernelInfoGetAttribute_int64(info, "rotary_interleaved", &a->interleaved));
    TRY(api->KernelInfoGetAttribute_float(info, "scale", &a->scale));
    TRY(api->KernelInfoGetAttribute_float(info, "softcap", &a->softcap));
    if (a->heads <= 0 || a->kv_heads <= 0 || a->heads % a->kv_heads)
        return api->CreateStatus(ORT_FAIL, "CachedAttention: num_heads must be a multiple of kv_num_heads");
    return NULL;
}

static void destroy(void *kernel) {
    Attention *a = kernel;
    release(a->api, a);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    Attention *a;
    TRY(allocate(api, sizeof(Attention), (void **)&a));
    *a = (Attention){.api = api, .coded = (const Operator *)op == &coded_attention};
    OrtStatus *status = read_attributes(a, info);
    if (status)
        destroy(a);
    else
        *kernel = a;
    return status;
}

/* The state as an output: past and present are one buffer when the caller binds both to it, else past is copied. */
static OrtStatus *present(const OrtApi *api, OrtContext *context, size_t index, const Tensor *past, int64_t element,
                          char **data) {
    TRY(make_output(api, context, index, past, (void **)data));
    const char *from = past->data;
    if (*data == from) return NULL;
    const int64_t size = past->dims[0] * past->dims[1] * past->dims[2] * past->dims[3] * element;
    for (int64_t i = 0; i < size; i++) (*data)[i] = from[i];
    return NULL;
}

static OrtStatus *fill(Pass *p, const Tensor *in, const OrtApi *api) {
    const Attention *a = p->a;
    const int packed = in[KEY].data == NULL;
    const int64_t batch = in[LENGTHS].dims[0], all = row_count(&in[QUERY]);
    if (batch <= 0 || all % batch)
        return api->CreateStatus(ORT_FAIL, "CachedAttention: every sequence must have as many rows");
    p->rows = all / batch;
    p->width = in[PAST_KEY].dims[3];
    p->capacity = in[PAST_KEY].dims[2];
    p->query_stride = in[QUERY].dims[2];
    p->key_stride = packed ? p->query_stride : in[KEY].dims[2];
    if (in[QUERY].rank != 3 || in[PAST_KEY].rank != 4 || p->width % 8 || p->width > MAX_WIDTH ||
        p->query_stride != (a->heads + (packed ? 2 * a->kv_heads : 0)) * p->width ||
        in[PAST_KEY].dims[1] != a->kv_heads)
        return api->CreateStatus(ORT_FAIL, "CachedAttention: heads must be of one width, a multiple of 8 up to 256");
    p->query = in[QUERY].data;
    p->key = packed ? p->query + a->heads * p->width : in[KEY].data;
    p->value = packed ? p->key + a->kv_heads * p->width : in[VALUE].data;
    p->lengths = in[LENGTHS].data;
    p->cos = in[COS].data;
    p->sin = in[SIN].data;
    p->rotary = p->cos ? in[COS].dims[1] : 0;
    p->positions = in[POSITIONS].data;
    p->sinks = in[SINKS].data;
    p->key_scales = in[KEY_SCALE].data;
    p->value_scales = in[VALUE_SCALE].data;
    p->element = a->coded ? sizeof(int8_t) : sizeof(float);
    if (a->coded && (!p->key_scales || !p->value_scales || in[KEY_SCALE].dims[0] != a->kv_heads ||
                     in[VALUE_SCALE].dims[0] != a->kv_heads))
        return api->CreateStatus(ORT_FAIL, "CodedAttention: keys and values need a scale a head");
    for (int64_t b = 0; b < batch; b++)
        if (p->lengths[b] + 1 < p->rows || p->lengths[b] >= p->capacity)
            return api->CreateStatus(ORT_FAIL, "CachedAttention: a length outside its state");
    return NULL;
}

static OrtStatus *compute(void *kernel, OrtContext *context) {
    const Attention *a = kernel;
    const OrtApi *api = a->api;
    Tensor in[MAX_INPUTS];
    Pass p = {.a = a};
    for (size_t i = 0; i < MAX_INPUTS; i++) TRY(read_input(api, context, i, &in[i]));
    TRY(fill(&p, in, api));
    Tensor shape = {.dims = {in[QUERY].dims[0], in[QUERY].dims[1], a->heads * p.width}, .rank = 3};
    TRY(make_output(api, context, 0, &shape, (void **)&p.out));
    TRY(present(api, context, 1, &in[PAST_KEY], p.element, &p.keys));
    TRY(present(api, context, 2, &in[PAST_VALUE], p.element, &p.values));
    return p.rows ? run_pass(api, context, &p, in[LENGTHS].dims[0]) : NULL;
}

/* The operator over states of a type; its last inputs are the scales of codes. */
#define ATTENTION(title, count, state)                                                                       \
    {                                                                                                        \
        .abi = {.CreateKernelV2 = create, .KernelComputeV2 = compute, .KernelDestroy = destroy},             \
        .name = title,                                                                                       \
        .inputs = count,                                                                                     \
        .required = 1,                                                                                       \
        .outputs = 3,                                                                                        \
        .types = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, state, state, ORT_INT32, ORT_INT32, ORT_FLOAT, ORT_FLOAT, \
                  ORT_INT64, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT},                                    \
        .made = {ORT_FLOAT, state, state},                                                                   \
    }

Operator cached_attention = ATTENTION("CachedAttention", SINKS + 1, ORT_FLOAT);
Operator coded_attention = ATTENTION("CodedAttention", VALUE_SCALE + 1, ORT_INT8);
