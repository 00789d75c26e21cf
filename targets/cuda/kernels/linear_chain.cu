// Linears of one row over codes, one after another in one launch (see linear_chain.py and ADR 37).
//
// Programs own outputs of every linear and meet at a barrier between two of them. Each thread streams the codes it
// multiplies through a queue of its own in shared memory: it asks for the next linears' while it waits for x.
// Warps divide K. A code in place, all around it masked off, is a subnormal bfloat16, exact in the tensor cores:
// one bit operation for two codes, and x carries the power of two that brings products back into range.
// PARAMETERS, LINKS, LINEARS and the other capitals are given by linear_chain.py.

#include "numbers.cuh"
#include "codes.cuh"

// What is known of a linear at compile time. ``tiles``: of 16 rows of the weight that a program has, with a gate as
// many of gates as of ups. ``eps`` is that of an RMSNorm before it where ``norm``.
struct Linear {
    int n, k, tiles, gate;
    bool norm, norm_in_fp32;
    float eps, offset;
};
// Its operands; x of the row before the norm, (k,); scales (k / GROUP, n), or (n,) where GROUP is 0.
struct Link {
    const char *codes;
    const void *scales;
    const u16 *bias, *x, *norm, *residual;
    const float *x_scale;
    u16 *out;
};

constexpr Linear LINEAR[COUNT] = {LINEARS};
constexpr int THREADS = 32 * WARPS;
constexpr int HALF = 512;                           // bytes of codes of 8 rows of a warp's entry
constexpr int ENTRY = 2 * HALF + (GROUP ? 32 : 0);  // 64 of each of 16 rows, and their scales of a group
constexpr int COLUMNS = FORM == INT4 ? 128 : 64;    // of an entry
constexpr int PARTS = FORM == INT4 ? 4 : 2;         // codes of an element of 16 bits
constexpr bool ZERO = FORM != FP8;                  // codes have a zero point: 8 or 128
constexpr bool GATED(int i) { return LINEAR[i].gate != NONE; }
constexpr int OUTPUTS(int i) { return GATED(i) ? LINEAR[i].n / 2 : LINEAR[i].n; }
constexpr int TILES(int i) { return GATED(i) ? LINEAR[i].tiles / 2 : LINEAR[i].tiles; }
constexpr int OWN(int i) { return LINEAR[i].tiles * (GATED(i) ? 8 : 16); }  // outputs of a program
constexpr int WIDTH(int i) { return FORM == INT4 ? LINEAR[i].k / 2 : LINEAR[i].k; }
constexpr int ENTRIES(int i) { return WIDTH(i) / 64; }
constexpr int PER_GROUP = GROUP ? GROUP / COLUMNS : 1;  // entries
constexpr int SCALES_AT(int i) { return i ? SCALES_AT(i - 1) + LINEAR[i - 1].tiles * 16 : 0; }
constexpr int largest(int a, int b) { return a > b ? a : b; }
constexpr int MOST_K(int i = COUNT - 1) { return i < 0 ? 0 : largest(LINEAR[i].k, MOST_K(i - 1)); }
constexpr int MOST_TILES(int i = COUNT - 1) { return i < 0 ? 0 : largest(TILES(i), MOST_TILES(i - 1)); }

// Shared memory of a program. ``x``: as ``prepare`` lays it out; ``zero``: an entry's sum of x times its zero point.
struct Room {
    u32 queue;
    u32 *x;
    float *zero, *sums, *few, *scales;
};

// What a thread asks for next: row tile ``r`` of entry ``e`` of a linear; of one with a gate all of the gates'
// (``half`` 0) before all of the ups', which leaves registers for as many sums as one half has.
// Its slot is also the next to take from: it is always full.
struct Queue {
    const Link *links;
    u32 first, slot;
    const char *at, *table;
    int link, half, halves, e, r, tiles, width, left, pitch;

    // The first linear from ``link`` on of which this warp has an entry.
    __device__ __forceinline__ void open() {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        r = 0;
        e = warp;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i == link && warp >= ENTRIES(i)) link++;
            if (i == link) {
                const int begin = blockIdx.x * OWN(i);
                width = WIDTH(i);
                tiles = TILES(i);
                halves = 1 + GATED(i);
                left = (OUTPUTS(i) - begin) / 16;  // tiles that exist
                at = links[i].codes + (long long)(half * OUTPUTS(i) + begin + g) * width + e * 64 + t * 16;
                pitch = 2 * LINEAR[i].n;
                table = (const char *)links[i].scales + 2 * (half * OUTPUTS(i) + begin) + threadIdx.x % 32 * 16;
            }
        }
    }
    __device__ __forceinline__ void fill() {
        if (link < COUNT) {
            if (r < left) {
                const char *from = at + (long long)(r * 16) * width;
                copy(slot, from);
                copy(slot + HALF, from + 8ll * width);
                if (GROUP && threadIdx.x % 32 < 2)  // the thread's place less its share of the codes
                    copy(slot + 2 * HALF, table + (long long)(e / PER_GROUP) * pitch + r * 32);
            }
            if (++r == tiles) {
                r = 0;
                e += WARPS;
                at += 64 * WARPS;
                if (e * 64 >= width) {
                    if (++half == halves) half = 0, link++;
                    open();
                }
            }
        }
        slot = slot == first + (DEPTH - 1) * ENTRY ? first : slot + ENTRY;
        end_group();
    }
};

// Sum, or largest, of a value of each thread.
template <bool LARGEST>
__device__ __forceinline__ float over_all(float v, float *few) {
#pragma unroll
    for (int d = 16; d; d /= 2) {
        float other = __shfl_xor_sync(~0u, v, d);
        v = LARGEST ? fmaxf(v, other) : v + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) few[threadIdx.x / 32] = v;
    __syncthreads();
    v = few[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) v = LARGEST ? fmaxf(v, few[w]) : v + few[w];
    return v;
}
// The row that linear I multiplies, normed and rounded, into shared memory as threads of the tensor cores' instruction
// take it, and the scale of its codes.
template <int I>
__device__ __forceinline__ float prepare(const Link &link, const Room &room) {
    constexpr int K = LINEAR[I].k, TURNS = (K / 8 + THREADS - 1) / THREADS;
    u32 v[TURNS][4];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int c = i * THREADS + threadIdx.x;  // of 8 columns
        uint4 found = c < K / 8 ? fresh(link.x + c * 8) : uint4{0, 0, 0, 0};
        v[i][0] = found.x, v[i][1] = found.y, v[i][2] = found.z, v[i][3] = found.w;
    }
    if (LINEAR[I].norm) {
        uint4 weight[TURNS];
        float square = 0.f;
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const int c = i * THREADS + threadIdx.x;
            weight[i] = c < K / 8 ? ((const uint4 *)link.norm)[c] : uint4{0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < 4; j++) square += low(v[i][j]) * low(v[i][j]) + high(v[i][j]) * high(v[i][j]);
        }
        const float root = rsqrtf(over_all<false>(square, room.few) / K + LINEAR[I].eps);
        auto normed = [&](float x, float w) {
            if (LINEAR[I].norm_in_fp32) return x * root * (w + LINEAR[I].offset);
            return rounded(x * root) * rounded(w + LINEAR[I].offset);
        };
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const u32 w[4] = {weight[i].x, weight[i].y, weight[i].z, weight[i].w};
#pragma unroll
            for (int j = 0; j < 4; j++)
                v[i][j] = pair(normed(low(v[i][j]), low(w[j])), normed(high(v[i][j]), high(w[j])));
        }
    }
    float scale = 1.f;
    if (ROUND != NOT_ROUNDED) {
        u32 most = 0;  // of even and of odd columns
#pragma unroll
        for (int i = 0; i < TURNS; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) most = larger(most, v[i][j] & 0x7fff7fffu);
        scale = fmaxf(low(most), high(most));
        scale = link.x_scale ? *link.x_scale : __fdiv_rn(over_all<true>(scale, room.few), ROUND == FP8 ? 448.f : 127.f);
        const Rounding rounding(scale == 0.f ? scale = 1.f : scale);
#pragma unroll
        for (int i = 0; i < TURNS; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) v[i][j] = rounding.codes(v[i][j]);
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int c = i * THREADS + threadIdx.x;
        const float up = FORM == INT4 && c / 4 % 2 ? UP / 16 : UP;
        float sum = 0.f, f[8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum += low(v[i][j]) + high(v[i][j]);
            f[2 * j] = low(v[i][j]) * up, f[2 * j + 1] = high(v[i][j]) * up;
        }
        if (ZERO) {  // an entry's columns are 16 neighbours of 8 in int4, 8 of codes in order, else twice 4, 8 apart
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (FORM == INT4 || ROUND != NOT_ROUNDED) sum += __shfl_xor_sync(~0u, sum, 4);
            if (FORM == INT4 || ROUND == NOT_ROUNDED) sum += __shfl_xor_sync(~0u, sum, 8);
        }
        if (c < K / 8) {
            if (ROUND == NOT_ROUNDED) {
                *(uint4 *)(room.x + c * 4) =
                    uint4{pair(f[0], f[1]), pair(f[2], f[3]), pair(f[4], f[5]), pair(f[6], f[7])};
            } else {  // codes in order: even and odd bytes of words are parts of elements
                u32 *to = room.x + c / 2 * 8 + c % 2 * 2;
                *(uint2 *)to = uint2{pair(f[0], f[2]), pair(f[4], f[6])};
                *(uint2 *)(to + 4) = uint2{pair(f[1], f[3]), pair(f[5], f[7])};
            }
            const float taken = sum * (FORM == INT4 ? -8.f : -128.f) / UNDO;
            if (FORM == INT4 && c % 16 == 0) room.zero[c / 16] = taken;
            if (FORM == INT8 && ROUND != NOT_ROUNDED && c % 8 == 0) room.zero[c / 8] = taken;
            if (FORM == INT8 && ROUND == NOT_ROUNDED && c % 4 == 0 && c % 16 < 8)
                room.zero[c / 16 * 2 + c / 4 % 2] = taken;
        }
    }
    __syncthreads();
    return scale;
}
// Element of x in shared memory of which a thread takes 8 for part P of entry e.
template <int P>
__device__ __forceinline__ int element(int e, int t) {
    if (ROUND != NOT_ROUNDED) return e * 64 + t * 16 + P * 8;
    return FORM == INT4 ? e * 128 + P * 32 + t * 8 : e / 2 * 128 + P * 64 + e % 2 * 32 + t * 8;
}

// What a thread takes of x for each part of entry e.
template <int P = 0>
__device__ __forceinline__ void columns(u32 (&b)[PARTS][4], const u32 *x, int e, int t) {
    if constexpr (P < PARTS) {
        const uint4 v = take(shared_address(x) + 2 * element<P>(e, t));
        b[P][0] = v.x, b[P][1] = v.y, b[P][2] = v.z, b[P][3] = v.w;
        columns<P + 1>(b, x, e, t);
    }
}
// Products of 8 rows' codes ``a``, and of the next 8 rows' ``c``, with x.
template <int P = 0>
__device__ __forceinline__ void products(float (&found)[4], const uint4 &a, const uint4 &c, const u32 (&b)[PARTS][4]) {
    if constexpr (P < PARTS) {
        multiply(found, numbers<P>(a.x), numbers<P>(c.x), numbers<P>(a.y), numbers<P>(c.y), b[P][0], b[P][1]);
        multiply(found, numbers<P>(a.z), numbers<P>(c.z), numbers<P>(a.w), numbers<P>(c.w), b[P][2], b[P][3]);
        products<P + 1>(found, a, c, b);
    }
}

// Outputs of linear I that the program owns.
template <int I>
__device__ __forceinline__ void linear(const Link &link, const Room &room, Queue &queue) {
    constexpr int ROWS = 16 * TILES(I);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int output = blockIdx.x * OWN(I) + threadIdx.x;
    const bool owner = threadIdx.x < OWN(I) && output < OUTPUTS(I);
    const float x_scale = prepare<I>(link, room);
    float value = 0.f, rest = 0.f;
    if (owner && link.residual) rest = fresh_one(link.residual + output);  // in time for the end
#pragma unroll 1
    for (int half = 0; half <= GATED(I); half++) {
        float sums[TILES(I)][2] = {};  // of rows g and g + 8; the instruction's eight columns are all x
#pragma unroll 1
        for (int e = warp; e < ENTRIES(I); e += WARPS) {
            u32 b[PARTS][4];
            columns(b, room.x, e, t);
            const float zero = ZERO ? room.zero[e] : 0.f;
#pragma unroll
            for (int r = 0; r < TILES(I); r++) {
                wait_group<DEPTH - 1>();
                if (GROUP) __syncwarp();  // scales are other threads' copies
                const uint4 a = take(queue.slot), c = take(queue.slot + HALF);
                float scale[2];
                if (GROUP) {
                    const u32 line = queue.slot - lane * 16 + 2 * HALF + 2 * g;
                    scale[0] = shared_scale(line), scale[1] = shared_scale(line + 16);
                    __syncwarp();
                }
                queue.fill();
                float found[4] = {zero, zero, zero, zero};
                if (!GROUP) found[0] += sums[r][0], found[2] += sums[r][1];
                products(found, a, c, b);
                sums[r][0] = GROUP ? sums[r][0] + found[0] * scale[0] : found[0];
                sums[r][1] = GROUP ? sums[r][1] + found[2] * scale[1] : found[2];
            }
        }
        if (half) __syncthreads();  // the gates' have been read
        if (t == 0) {
#pragma unroll
            for (int r = 0; r < TILES(I); r++) {
                float *to = room.sums + warp * ROWS + r * 16 + g;
                to[0] = sums[r][0], to[8] = sums[r][1];
            }
        }
        __syncthreads();
        if (owner) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += room.sums[w * ROWS + threadIdx.x];
            sum *= UNDO * x_scale;
            if (!GROUP) sum *= room.scales[SCALES_AT(I) + half * OWN(I) + threadIdx.x];
            if (link.bias) sum += low(link.bias[half * OUTPUTS(I) + output]);
            value = half ? activation(value, LINEAR[I].gate) * sum : sum;
        }
    }
    if (owner) {
        if (link.residual) value = rounded(value) + rest;
        link.out[output] = (u16)pair(value, 0.f);
    }
}

// Waits until every program is here; what they wrote before is seen after it.
__device__ __forceinline__ void meet(u32 *counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
        u32 here;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(here) : "l"(counter) : "memory");
        } while (here < gridDim.x);
    }
    __syncthreads();
}
template <int I>
__device__ __forceinline__ void run(const Link *links, u32 *counters, const Room &room, Queue &queue, u32 &gone) {
    if constexpr (I < COUNT) {
        if (I) meet(counters + I - 1);
        if (I == COUNT - 1 && threadIdx.x == 0)  // who waits for the answer at the end finds it there
            asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(gone) : "l"(counters + I) : "memory");
        linear<I>(links[I], room, queue);
        run<I + 1>(links, counters, room, queue, gone);
    }
}

extern "C" __global__ void linear_chain(PARAMETERS, u32 *counters, void *, void *) {
    extern __shared__ __align__(128) char memory[];
    const Link links[COUNT] = {LINKS};
    asm volatile("griddepcontrol.launch_dependents;");
    Room room;
    room.queue = shared_address(memory);
    room.x = (u32 *)(memory + WARPS * DEPTH * ENTRY);
    room.zero = (float *)(room.x + MOST_K() / 2);
    room.sums = room.zero + MOST_K() / COLUMNS;
    room.few = room.sums + WARPS * MOST_TILES() * 16;
    room.scales = room.few + WARPS;
    Queue queue{links};
    queue.first = room.queue + threadIdx.x / 32 * DEPTH * ENTRY + threadIdx.x % 32 * 16;
    queue.slot = queue.first;
    queue.link = queue.half = 0;
    queue.open();
#pragma unroll 1
    for (int i = 0; i < DEPTH; i++) queue.fill();
    if (!GROUP) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            for (int c = threadIdx.x; c < LINEAR[i].tiles * 16; c += THREADS) {
                const int row = blockIdx.x * OWN(i) + c / 16 % TILES(i) * 16 + c % 16,
                          up = c / 16 >= TILES(i) ? OUTPUTS(i) : 0;
                if (row < OUTPUTS(i)) room.scales[SCALES_AT(i) + c] = scale_of(links[i].scales, up + row);
            }
        }
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 gone = 0;
    run<0>(links, counters, room, queue, gone);
    // the last program to leave the last meeting leaves the counters zero
    if (threadIdx.x == 0 && gone == gridDim.x - 1)
        for (int i = 0; i < COUNT; i++) counters[i] = 0;
}
