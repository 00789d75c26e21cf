/* QuantizedLinear: y (…, N) = x (…, K) @ w (N, K)^T for weights of 4 or 8 bits in blocks of a multiple of 32 columns.
 *
 * Inputs are those of com.microsoft.MatMulNBits: x float32; codes (N, blocks, bytes) uint8, low bits first; scales
 * (N, blocks) float32; zero points (N, packed) uint8, absent for 2^(bits - 1). As at its accuracy level 4, each row of
 * x is rounded to int8 by blocks of 32 columns with one scale each, max / 127, and codes are multiplied as integers.
 *
 * Weights are packed once, in tiles of 8 rows by 32 columns: a vector holds four columns of eight rows, so that one
 * multiply-add of bytes meets four broadcast columns of x and no sum ever crosses lanes. Products of a 4-bit code and
 * an int8 fit 16 bits eight times over, which is a whole block. 8-bit codes are stored less 128 and multiplied as
 * |code| and x with the code's sign, whose pairs just fit 16 bits. A row's result is the same sequence of operations
 * whatever the number of rows: batches do not change answers.
 *
 * Floor at one row: the weights' bytes over the memory's bandwidth. At eight rows and more: 16-bit multiply-adds,
 * 64 products in two instructions.
 */
#include <immintrin.h>

#include "operator.h"

enum { AHEAD = 8192, LANES = 8, BLOCK = 32, ROWS = 8, HALF = ROWS / 2, ITEM_TILES = 8, CHUNK = 32 };
enum { X, CODES, SCALES, ZEROS };

typedef struct Linear {
    const OrtApi *api;
    int64_t n, k, bits, tiles, blocks, group_blocks, groups;
    uint8_t *codes; /* (tiles, blocks, vectors of 32 bytes): at 4 bits columns 16 to 31 are the high halves */
    float *scales;  /* (tiles, groups, LANES) */
    int32_t *zeros; /* (tiles, groups, LANES), of 8-bit codes less 128, or NULL for 2^(bits - 1) */
} Linear;

/* Activations of a call: int8 codes (rows, 32 * blocks), scales and sums of codes (rows, blocks). `starts` are -4 times
 * the sum twice, in 16 bits each: where products of 4-bit codes start when every zero point is 8. Their total fits,
 * since |sum of (code - 4) x over 16 columns - 4 times the rest of x| <= 30480. */
typedef struct Call {
    const Linear *w;
    const float *x;
    float *y, *scales;
    int8_t *codes;
    int32_t *sums, *starts;
    int64_t rows;
} Call;

static int64_t tile_bytes(const Linear *w) { return LANES * BLOCK * w->bits / 8; }

/* Code of row `row` (zero past the last) and column `column` of MatMulNBits' packed codes. */
static uint8_t code_at(const Linear *w, const uint8_t *codes, int64_t row, int64_t column) {
    if (row >= w->n) return 0;
    const int64_t at = row * w->group_blocks * BLOCK * w->groups + column;
    return w->bits == 8 ? codes[at] : (uint8_t)(codes[at / 2] >> (4 * (at & 1)) & 15);
}

static void pack_codes(const Linear *w, const uint8_t *codes) {
    uint8_t *out = w->codes;
    for (int64_t tile = 0; tile < w->tiles; tile++)
        for (int64_t block = 0; block < w->blocks; block++)
            for (int64_t i = 0; i < tile_bytes(w); i++) {
                const int64_t row = tile * LANES + i % 32 / 4, column = block * BLOCK + i / 32 * 4 + i % 4;
                const uint8_t code = code_at(w, codes, row, column);
                *out++ = w->bits == 8 ? code ^ 128 : (uint8_t)(code | code_at(w, codes, row, column + 16) << 4);
            }
}

static void pack_groups(const Linear *w, const float *scales, const uint8_t *zeros) {
    const int64_t row_bytes = w->bits == 8 ? w->groups : (w->groups + 1) / 2;
    for (int64_t tile = 0; tile < w->tiles; tile++)
        for (int64_t group = 0; group < w->groups; group++)
            for (int64_t lane = 0; lane < LANES; lane++) {
                const int64_t row = tile * LANES + lane, at = (tile * w->groups + group) * LANES + lane;
                w->scales[at] = row < w->n ? scales[row * w->groups + group] : 0;
                if (!zeros) continue;
                const int64_t source = row * row_bytes + (w->bits == 8 ? group : group / 2);
                w->zeros[at] = row >= w->n    ? 0
                               : w->bits == 8 ? zeros[source] - 128
                                              : zeros[source] >> (4 * (group & 1)) & 15;
            }
}

/* The largest of eight unsigned numbers below 2^31. */
AVX2_INLINE int32_t largest_lane(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

AVX2_INLINE int32_t add_lanes(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

/* x (32 columns) as codes and their scale; returns the sum of the codes. Sizes are compared as integers, whose order
 * is theirs and where a NaN is the largest; its codes are 0 and its scale stays NaN. */
AVX2_INLINE int32_t round_block(const float *x, int8_t *codes, float *scale) {
    __m256i sizes = _mm256_setzero_si256(), byte[4];
    for (int i = 0; i < 4; i++) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)x + i);
        sizes = _mm256_max_epi32(sizes, _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MAX)));
    }
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest_lane(sizes))));
    const __m256 inverse = _mm256_set1_ps(largest == 0 ? 0 : 127.0f / largest);
    for (int i = 0; i < 4; i++) {
        const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
        byte[i] = _mm256_and_si256(code, _mm256_set1_epi32(255));
    }
    const __m256i mixed =
        _mm256_packus_epi16(_mm256_packus_epi32(byte[0], byte[1]), _mm256_packus_epi32(byte[2], byte[3]));
    const __m256i all = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)codes, all);
    *scale = largest / 127.0f;
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), all);
    return add_lanes(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

AVX2 static void round_row(void *data, size_t row) {
    const Call *c = data;
    const int64_t blocks = c->w->blocks, k = c->w->k;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = (int64_t)row * blocks + b, count = k - b * BLOCK;
        const float *x = c->x + (int64_t)row * k + b * BLOCK;
        float edge[BLOCK] = {0};
        for (int64_t i = 0; count < BLOCK && i < count; i++) edge[i] = x[i];
        c->sums[at] = round_block(count < BLOCK ? edge : x, c->codes + at * BLOCK, c->scales + at);
        c->starts[at] = (-4 * c->sums[at] & 0xffff) * 0x10001;
    }
}

/* Integer products of a tile of 4-bit codes with `rows` rows of x, 32 columns of each, from `starts`. The codes of all
 * rows stay in eight registers. */
AVX2_INLINE void multiply_4(const uint8_t *tile, const int8_t *x, int64_t stride, int rows, __m256i *starts) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i low[4], high[4];
    for (int p = 0; p < 4; p++) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)(tile + p * 32));
        low[p] = _mm256_and_si256(both, nibble);
        high[p] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    }
    for (int r = 0; r < rows; r++) {
        const int32_t *four = (const int32_t *)(x + r * stride);
        __m256i sum = starts[r], other = _mm256_setzero_si256();
        for (int p = 0; p < 4; p++) {
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(low[p], _mm256_set1_epi32(four[p])));
            other = _mm256_add_epi16(other, _mm256_maddubs_epi16(high[p], _mm256_set1_epi32(four[p + 4])));
        }
        starts[r] = _mm256_madd_epi16(_mm256_add_epi16(sum, other), ones);
    }
}

/* The same for 8-bit codes less 128. */
AVX2_INLINE void multiply_8(const uint8_t *tile, const int8_t *x, int64_t stride, int rows, __m256i *starts) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma clang loop unroll(full)
    for (int p = 0; p < 8; p++) {
        const __m256i code = _mm256_loadu_si256((const __m256i *)(tile + p * 32)), size = _mm256_abs_epi8(code);
        for (int r = 0; r < rows; r++) {
            const __m256i four = _mm256_set1_epi32(((const int32_t *)(x + r * stride))[p]);
            const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four, code));
            starts[r] = _mm256_add_epi32(starts[r], _mm256_madd_epi16(pairs, ones));
        }
    }
}

/* `rows` rows of y for the 8 columns of a tile. */
AVX2_INLINE void tile_rows(const Call *c, int64_t tile, int64_t row, int rows, int wide, int has_zeros, float *y,
                           int64_t stride) {
    const Linear *w = c->w;
    const int64_t blocks = w->blocks, size = LANES * BLOCK / (wide ? 1 : 2);
    const uint8_t *codes = w->codes + tile * blocks * size;
    const float *scales = w->scales + tile * w->groups * LANES;
    const int32_t *zeros = has_zeros ? w->zeros + tile * w->groups * LANES : NULL;
    const int8_t *x = c->codes + row * blocks * BLOCK;
    __m256 sums[ROWS];
    for (int r = 0; r < rows; r++) sums[r] = _mm256_setzero_ps();
    const int64_t ahead = blocks < AHEAD / size ? blocks : AHEAD / size; /* the next tile, or what fits beside this */
    int64_t left = w->group_blocks;
    for (int64_t b = 0; b < blocks; b++, codes += size, x += BLOCK) {
        __m256i product[ROWS];
        for (int64_t line = 0; line < size; line += 64)
            _mm_prefetch((const char *)codes + ahead * size + line, _MM_HINT_T0);
        _mm_prefetch((const char *)(scales + ahead / w->group_blocks * LANES), _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * blocks + b;
            product[r] = wide || has_zeros ? _mm256_setzero_si256() : _mm256_set1_epi32(c->starts[at]);
        }
        if (wide)
            multiply_8(codes, x, blocks * BLOCK, rows, product);
        else
            multiply_4(codes, x, blocks * BLOCK, rows, product);
        const __m256 scale = _mm256_loadu_ps(scales);
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * blocks + b;
            if (has_zeros) {
                const __m256i zero = _mm256_loadu_si256((const __m256i *)zeros);
                product[r] = _mm256_sub_epi32(product[r], _mm256_mullo_epi32(zero, _mm256_set1_epi32(c->sums[at])));
            }
            const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(c->scales[at]));
            sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product[r]), factor, sums[r]);
        }
        if (--left == 0) {
            left = w->group_blocks;
            scales += LANES;
            if (has_zeros) zeros += LANES;
        }
    }
    for (int r = 0; r < rows; r++) _mm256_storeu_ps(y + r * stride, sums[r]);
}

/* The same, with the number of rows and the form of the weights known to the compiler. */
AVX2_INLINE void tile_form(const Call *c, int64_t tile, int64_t row, int rows, float *out, int64_t stride) {
    const int form = (c->w->bits == 8) * 2 + (c->w->zeros != NULL);
    switch (form) {
        case 0:
            tile_rows(c, tile, row, rows, 0, 0, out, stride);
            break;
        case 1:
            tile_rows(c, tile, row, rows, 0, 1, out, stride);
            break;
        case 2:
            tile_rows(c, tile, row, rows, 1, 0, out, stride);
            break;
        default:
            tile_rows(c, tile, row, rows, 1, 1, out, stride);
    }
}

AVX2 static void tile_at(const Call *c, int64_t tile, int64_t row, int64_t rows) {
    const int64_t n = c->w->n, whole = n - tile * LANES;
    float edge[ROWS * LANES], *out = c->y + row * n + tile * LANES;
    const int64_t stride = whole < LANES ? LANES : n;
    float *to = whole < LANES ? edge : out;
    switch (rows) {
        case 1:
            tile_form(c, tile, row, 1, to, stride);
            break;
        case 2:
            tile_form(c, tile, row, 2, to, stride);
            break;
        case 3:
            tile_form(c, tile, row, 3, to, stride);
            break;
        case HALF:
            tile_form(c, tile, row, HALF, to, stride);
            break;
        default:
            tile_form(c, tile, row, ROWS, to, stride);
    }
    if (whole >= LANES) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < whole; i++) out[r * n + i] = edge[r * LANES + i];
}

/* One part of the work: up to ITEM_TILES tiles, rows of x in chunks that stay in the cache beside them. */
AVX2 static void multiply_item(void *data, size_t item) {
    const Call *c = data;
    const int64_t first = (int64_t)item * ITEM_TILES, end = first + ITEM_TILES,
                  last = end < c->w->tiles ? end : c->w->tiles;
    for (int64_t chunk = 0; chunk < c->rows; chunk += CHUNK) {
        const int64_t stop = chunk + CHUNK < c->rows ? chunk + CHUNK : c->rows;
        for (int64_t tile = first; tile < last; tile++)
            for (int64_t row = chunk, rows; row < stop; row += rows) {
                rows = stop - row >= ROWS ? ROWS : stop - row >= HALF ? HALF : stop - row;
                tile_at(c, tile, row, rows);
            }
    }
}

static void destroy(void *kernel) {
    Linear *w = kernel;
    release(w->api, w->codes);
    release(w->api, w->scales);
    release(w->api, w->zeros);
    release(w->api, w);
}

static OrtStatus *constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, Tensor *tensor) {
    size_t count;
    int is_constant = 0;
    const OrtValue *value = NULL;
    tensor->data = NULL;
    TRY(api->KernelInfo_GetInputCount(info, &count));
    if (index >= count) return NULL;
    TRY(api->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
    if (value) return read_value(api, value, tensor);
    return index == ZEROS ? NULL : api->CreateStatus(ORT_FAIL, "QuantizedLinear: the weights must be initializers");
}

static OrtStatus *fill(Linear *w, const OrtKernelInfo *info) {
    const OrtApi *api = w->api;
    int64_t block = 0;
    Tensor codes, scales, zeros;
    TRY(api->KernelInfoGetAttribute_int64(info, "N", &w->n));
    TRY(api->KernelInfoGetAttribute_int64(info, "K", &w->k));
    TRY(api->KernelInfoGetAttribute_int64(info, "bits", &w->bits));
    TRY(api->KernelInfoGetAttribute_int64(info, "block_size", &block));
    TRY(constant(api, info, CODES, &codes));
    TRY(constant(api, info, SCALES, &scales));
    TRY(constant(api, info, ZEROS, &zeros));
    if ((w->bits != 4 && w->bits != 8) || block % BLOCK || block <= 0 || w->n <= 0 || w->k <= 0)
        return api->CreateStatus(ORT_FAIL, "QuantizedLinear: bits must be 4 or 8, block_size a multiple of 32");
    w->group_blocks = block / BLOCK;
    w->groups = (w->k + block - 1) / block;
    w->blocks = (w->k + BLOCK - 1) / BLOCK;
    w->tiles = (w->n + LANES - 1) / LANES;
    const size_t groups = (size_t)(w->tiles * w->groups * LANES);
    TRY(allocate(api, (size_t)(w->tiles * w->blocks * tile_bytes(w)), (void **)&w->codes));
    TRY(allocate(api, groups * sizeof(float), (void **)&w->scales));
    if (zeros.data) TRY(allocate(api, groups * sizeof(int32_t), (void **)&w->zeros));
    pack_codes(w, codes.data);
    pack_groups(w, scales.data, zeros.data);
    return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    (void)op;
    Linear *w;
    TRY(allocate(api, sizeof(Linear), (void **)&w));
    *w = (Linear){.api = api};
    OrtStatus *status = fill(w, info);
    if (status)
        destroy(w);
    else
        *kernel = w;
    return status;
}

static OrtStatus *compute(void *kernel, OrtContext *context) {
    const Linear *w = kernel;
    const OrtApi *api = w->api;
    Tensor x;
    void *scratch;
    TRY(read_input(api, context, X, &x));
    if (!x.rank || x.dims[x.rank - 1] != w->k)
        return api->CreateStatus(ORT_FAIL, "QuantizedLinear: the input's last dimension is not K");
    Call call = {.w = w, .x = x.data, .rows = row_count(&x)};
    x.dims[x.rank - 1] = w->n;
    TRY(make_output(api, context, 0, &x, (void **)&call.y));
    if (!call.rows) return NULL;
    const size_t blocks = (size_t)(call.rows * w->blocks);
    TRY(allocate(api, blocks * (BLOCK + sizeof(float) + 2 * sizeof(int32_t)), &scratch));
    call.codes = scratch;
    call.scales = (float *)(call.codes + blocks * BLOCK);
    call.sums = (int32_t *)(call.scales + blocks);
    call.starts = call.sums + blocks;
    OrtStatus *status = each_row(api, context, round_row, call.rows, w->k, &call);
    const size_t items = (size_t)((w->tiles + ITEM_TILES - 1) / ITEM_TILES);
    if (!status) status = api->KernelContext_ParallelFor(context, multiply_item, items, 0, &call);
    release(api, scratch);
    return status;
}

Operator quantized_linear = {
    .abi = {.CreateKernelV2 = create, .KernelComputeV2 = compute, .KernelDestroy = destroy},
    .name = "QuantizedLinear",
    .inputs = 4,
    .required = 3,
    .outputs = 1,
    .types = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT, ORT_UINT8},
    .made = {ORT_FLOAT},
};
