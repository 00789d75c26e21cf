/* CachedAttention: com.microsoft.GroupQueryAttention over float32 states, with its inputs and attributes.
 * CodedAttention: the same over int8 codes.
 *
 * Inputs: query (B, S, H D), or (B, S, (H + 2 Hk) D) with key and value absent; key, value (B, S, Hk D); past keys and
 * values (B, Hk, C, D); lengths less one (B,) int32; their maximum (unused); cos and sin tables (rows, F) or none;
 * positions (B, S) int64; unused; sinks (H,) or none; of codes, scales (Hk,) of keys and of values. Rows may as well
 * come as (1, B S, ·): B is that of the lengths.
 * Outputs: the query's shape with H D columns, and the states with the S new rows behind each sequence's past, in place
 * where past and present are one buffer. Slots past a sequence's length are not read.
 *
 * Every key and value is read once for all the heads that share it. Keys go by blocks of 32 that begin at multiples of
 * 32 with a running softmax, so a row's result does not depend on its batch or on how a prompt was cut into chunks.
 *
 * Floor at decode: the states' bytes over the memory's bandwidth.
 */
#include "attention.h"

/* x (D) with its first 2 F elements rotated: pairs (i, i + F), or (2 i, 2 i + 1) when interleaved. */
AVX2_INLINE void rotate(const Pass *p, const float *x, int64_t position, float *out) {
    const Attention *a = p->a;
    const int64_t half = p->cos ? p->rotary : 0;
    const float *cos = p->cos + position * half, *sin = p->sin + position * half;
    for (int64_t i = 0; i < half; i++) {
        const int64_t first = a->interleaved ? 2 * i : i, second = a->interleaved ? 2 * i + 1 : i + half;
        const float u = x[first], v = x[second];
        out[first] = u * cos[i] - v * sin[i];
        out[second] = v * cos[i] + u * sin[i];
    }
    for (int64_t i = 2 * half; i < p->width; i++) out[i] = x[i];
}

/* x (D) as row `row` of a state: as it is, or the nearest codes under its head's scale, ties to even. */
AVX2_INLINE void store(const Pass *p, char *state, int64_t row, const float *x, const float *scales, int64_t head) {
    char *to = state + row * p->width * p->element;
    if (!scales) {
        for (int64_t i = 0; i < p->width; i++) ((float *)to)[i] = x[i];
        return;
    }
    const __m256 scale = _mm256_set1_ps(scales[head]), most = _mm256_set1_ps(127), least = _mm256_set1_ps(-127);
    for (int64_t i = 0; i < p->width; i += 8) {
        const __m256 value = _mm256_div_ps(_mm256_loadu_ps(x + i), scale);
        const __m256i code = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(value, least), most));
        const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        _mm_storel_epi64((__m128i *)(to + i), _mm_packs_epi16(half, half));
    }
}

/* Write the new keys and values of one sequence and head into the states. */
AVX2 static void append(void *data, size_t item) {
    const Pass *p = data;
    const int64_t kv = p->a->kv_heads, batch = (int64_t)item / kv, head = (int64_t)item % kv;
    const int64_t past = p->lengths[batch] + 1 - p->rows;
    for (int64_t r = 0; r < p->rows; r++) {
        const int64_t row = batch * p->rows + r, from = row * p->key_stride + head * p->width;
        const int64_t to = (int64_t)item * p->capacity + past + r;
        float key[MAX_WIDTH];
        rotate(p, p->key + from, p->positions ? p->positions[row] : past + r, key);
        store(p, p->keys, to, key, p->key_scales, head);
        store(p, p->values, to, p->value + from, p->value_scales, head);
    }
}

/* Sums over the lanes of eight vectors, as the lanes of one. */
AVX2_INLINE __m256 add_lanes(const __m256 *v) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* Products of q with the keys k to k + 7; those past `last` repeat it. */
AVX2_INLINE __m256 score_eight(const float *q, const float *keys, int64_t k, int64_t last, int64_t width) {
    const float *key[8];
    __m256 sums[8];
    for (int j = 0; j < 8; j++) {
        key[j] = keys + (k + j < last ? k + j : last) * width;
        sums[j] = _mm256_setzero_ps();
    }
    for (int64_t d = 0; d < width; d += 8) {
        const __m256 x = _mm256_loadu_ps(q + d);
        for (int j = 0; j < 8; j++) sums[j] = _mm256_fmadd_ps(_mm256_loadu_ps(key[j] + d), x, sums[j]);
    }
    return add_lanes(sums);
}

/* Ask for some more lines of the block after the one at hand. */
AVX2_INLINE void ask(Next *next) {
    for (int64_t i = 0; i < next->step && next->left > 0; i++, next->left--) {
        _mm_prefetch(next->keys, _MM_HINT_T1);
        _mm_prefetch(next->values, _MM_HINT_T1);
        next->keys += LINE;
        next->values += LINE;
    }
}

/* Scores of a block of keys that begins at `start`, -inf where the query may not look; returns the largest. */
AVX2_INLINE float score_block(const Pass *p, const Query *query, const float *keys, int64_t start, float *scores,
                              Next *next) {
    const float softcap = p->a->softcap;
    const __m256 scale = _mm256_set1_ps(p->a->scale), none = _mm256_set1_ps(-__builtin_inff());
    __m256 largest = none;
    for (int64_t j = 0; j < KEYS; j += 8) {
        const int64_t k = start + j;
        __m256 s = none;
        ask(next);
        if (k <= query->last && k + 8 > query->first) {
            s = _mm256_mul_ps(score_eight(query->q, keys, j, query->last - start, p->width), scale);
            if (softcap > 0) s = soft_cap(s, softcap);
            const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)(query->first - k)), lane);
            const __m256i above = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32((int32_t)(query->last - k)));
            s = _mm256_blendv_ps(s, none, _mm256_castsi256_ps(_mm256_or_si256(below, above)));
        }
        _mm256_storeu_ps(scores + j, s);
        largest = _mm256_max_ps(largest, s);
    }
    float lanes[8], result = -__builtin_inff();
    _mm256_storeu_ps(lanes, largest);
    for (int j = 0; j < 8; j++) result = lanes[j] > result ? lanes[j] : result;
    return result;
}

/* out[0 .. 8 n) += weights (first to last) times rows of values. */
AVX2_INLINE void add_values(const float *weights, const float *values, int64_t count, int64_t width, float *out,
                            int n) {
    __m256 sums[8];
    for (int i = 0; i < n; i++) sums[i] = _mm256_loadu_ps(out + 8 * i);
    for (int64_t k = 0; k < count; k++) {
        const __m256 weight = _mm256_set1_ps(weights[k]);
        for (int i = 0; i < n; i++)
            sums[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(values + k * width + 8 * i), sums[i]);
    }
    for (int i = 0; i < n; i++) _mm256_storeu_ps(out + 8 * i, sums[i]);
}

/* Take a block of keys and values that begins at `start` into a query's running softmax and weighted sum. */
AVX2_INLINE void take_block(const Pass *p, Query *query, const float *keys, const float *values, int64_t start,
                            Next *next) {
    const int64_t width = p->width;
    float weights[KEYS], total[8];
    const float best = score_block(p, query, keys, start, weights, next), top = best > query->top ? best : query->top;
    const float keep = exponential(query->top - top);
    __m256 sum = _mm256_setzero_ps();
    for (int j = 0; j < KEYS; j += 8) {
        const __m256 weight = exponentials(_mm256_sub_ps(_mm256_loadu_ps(weights + j), _mm256_set1_ps(top)));
        _mm256_storeu_ps(weights + j, weight);
        sum = _mm256_add_ps(sum, weight);
    }
    _mm256_storeu_ps(total, sum);
    query->sum *= keep;
    for (int j = 0; j < 8; j++) query->sum += total[j];
    query->top = top;
    for (int64_t d = 0; d < width; d++) query->out[d] *= keep;
    const int64_t begin = start > query->first ? start : query->first,
                  end = start + KEYS <= query->last ? start + KEYS : query->last + 1;
    const float *row = values + (begin - start) * width, *weight = weights + (begin - start);
    int64_t d = 0;
    for (; d + 64 <= width; d += 64) add_values(weight, row + d, end - begin, width, query->out + d, 8);
    for (; d < width; d += 8) add_values(weight, row + d, end - begin, width, query->out + d, 1);
}

/* Prepare the query of one row and head. */
AVX2_INLINE void begin_query(const Pass *p, Query *query, int64_t batch, int64_t r, int64_t head) {
    const int64_t row = batch * p->rows + r, window = p->a->window;
    query->last = p->lengths[batch] + 1 - p->rows + r;
    query->first = window > 0 && query->last >= window ? query->last - window + 1 : 0;
    rotate(p, p->query + row * p->query_stride + head * p->width, p->positions ? p->positions[row] : query->last,
           query->q);
    if (p->key_scales) {
        const float scale = p->key_scales[head / (p->a->heads / p->a->kv_heads)];
        for (int64_t d = 0; d < p->width; d++) query->q[d] *= scale;
    }
    query->top = p->sinks ? p->sinks[head] : -__builtin_inff();
    query->sum = p->sinks ? 1 : 0;
    query->to = p->out + (row * p->a->heads + head) * p->width;
    for (int64_t d = 0; d < p->width; d++) query->out[d] = 0;
}

/* The lines of the block of keys at `start`, of which the last is `high`. */
AVX2_INLINE Next next_block(const Pass *p, int64_t state, int64_t start, int64_t high) {
    const int64_t row = p->width * p->element, at = state + start * row, rows = high < start ? 0 : high - start + 1;
    const int64_t bytes = (rows < KEYS ? rows : KEYS) * row;
    return (Next){p->keys + at, p->values + at, (bytes + LINE - 1) / LINE, 0};
}

/* Rows start to high of a state, at most a block, as numbers: where they lie, or codes, unscaled, in `unpacked`. */
AVX2_INLINE const float *numbers(const Pass *p, const char *state, int64_t start, int64_t high, float *unpacked) {
    const char *rows = state + start * p->width * p->element;
    if (!p->key_scales) return (const float *)rows;
    const int64_t count = (high - start + 1 < KEYS ? high - start + 1 : KEYS) * p->width;
    for (int64_t i = 0; i < count; i += 8) {
        const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(rows + i)));
        _mm256_storeu_ps(unpacked + i, _mm256_cvtepi32_ps(codes));
    }
    return unpacked;
}

/* Rows first to end of one sequence, for the query heads that share a key head, MAX_QUERIES at a time. */
AVX2_INLINE void attend(const Pass *p, int64_t batch, int64_t head, int64_t first, int64_t end) {
    Query queries[MAX_QUERIES];
    float unpacked_keys[KEYS * MAX_WIDTH], unpacked_values[KEYS * MAX_WIDTH];
    const int64_t group = p->a->heads / p->a->kv_heads, all = (end - first) * group;
    const int64_t state = (batch * p->a->kv_heads + head) * p->capacity * p->width * p->element;
    const float scale = p->value_scales ? p->value_scales[head] : 1;
    for (int64_t at = 0; at < all; at += MAX_QUERIES) {
        const int64_t count = all - at < MAX_QUERIES ? all - at : MAX_QUERIES;
        int64_t low = INT64_MAX, high = 0;
        for (int64_t i = 0; i < count; i++) {
            Query *query = &queries[i];
            begin_query(p, query, batch, first + (at + i) / group, head * group + (at + i) % group);
            low = query->first < low ? query->first : low;
            high = query->last > high ? query->last : high;
        }
        for (int64_t start = low / KEYS * KEYS; start <= high; start += KEYS) {
            Next next = next_block(p, state, start + KEYS, high);
            const float *keys = numbers(p, p->keys + state, start, high, unpacked_keys);
            const float *values = numbers(p, p->values + state, start, high, unpacked_values);
            const int64_t step = count > 1 ? next.left / (count - 1) / (KEYS / 8) + 1 : 0;
            for (int64_t i = 0; i < count; i++) {
                next.step = i ? step : 0; /* the first query waits for this block itself */
                if (start <= queries[i].last && start + KEYS > queries[i].first)
                    take_block(p, &queries[i], keys, values, start, &next);
            }
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < p->width; d++) queries[i].to[d] = queries[i].out[d] / queries[i].sum * scale;
    }
}

/* One sequence and key head at decode: its write, then its attention. */
AVX2 static void decode_item(void *data, size_t item) {
    const Pass *p = data;
    append(data, item);
    attend(p, (int64_t)item / p->a->kv_heads, (int64_t)item % p->a->kv_heads, 0, 1);
}

/* A tile of rows of a prompt; late rows cost more than early ones, so early and late tiles alternate. */
AVX2 static void prompt_item(void *data, size_t item) {
    const Pass *p = data;
    const int64_t tiles = (p->rows + p->tile - 1) / p->tile, i = (int64_t)item % tiles, unit = (int64_t)item / tiles;
    const int64_t first = (i % 2 ? tiles - 1 - i / 2 : i / 2) * p->tile, end = first + p->tile;
    attend(p, unit / p->a->kv_heads, unit % p->a->kv_heads, first, end < p->rows ? end : p->rows);
}

OrtStatus *run_pass(const OrtApi *api, const OrtContext *context, Pass *p, int64_t batch) {
    const int64_t units = batch * p->a->kv_heads, group = p->a->heads / p->a->kv_heads;
    if (p->rows == 1) return api->KernelContext_ParallelFor(context, decode_item, (size_t)units, 0, p);
    p->tile = group < MAX_QUERIES ? MAX_QUERIES / group : 1;
    TRY(api->KernelContext_ParallelFor(context, append, (size_t)units, 0, p));
    const int64_t tiles = (p->rows + p->tile - 1) / p->tile;
    return api->KernelContext_ParallelFor(context, prompt_item, (size_t)(units * tiles), 0, p);
}
