// Linears whose weights stream through a ring in shared memory into sm_90's tensor cores (gemm_ring.py, ADR 38).
//
// One thread asks for boxes of weights, x and scales; warpgroups multiply: 64 rows of the weight by BM rows of x.
// Codes become numbers in the registers the instruction takes its tall side from; numbers stay in shared memory.
// FORM, N, K, BM, BN and the other capitals are given by gemm_ring.py.

#include "numbers.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

constexpr bool CODES = FORM < NUMBERS;  // that become weights in registers
constexpr bool BY_CODES = FORM == FP8_BY_FP8;
constexpr bool GATED = GATE != NONE;
constexpr bool BESIDE = GATED && CODES;  // 8 rows of gates and 8 of ups in a fragment
constexpr bool APART = GATED && !CODES;  // gates and ups in two blocks
constexpr int CODES_OF_WORD = FORM == INT4 ? 8 : FORM == NUMBERS ? 2 : 4;
constexpr int X_SIZE = BY_CODES ? 1 : 2;          // bytes
constexpr int COLUMNS = ROW / 4 * CODES_OF_WORD;  // of a unit, ROW bytes of each row of the weight
constexpr int UNITS = (K + COLUMNS - 1) / COLUMNS;
constexpr int PARTS = CODES_OF_WORD / 2;                    // codes of an element of 16 bits
constexpr int PIECES = ROW / 32;                            // of 16 elements
constexpr int BATCH = CODES ? CHUNK / PARTS / 16 : PIECES;  // of a chunk
constexpr bool GROUPED = CODES && (GROUP < K || ZEROS);
constexpr int LINES = !GROUPED ? 0 : GROUP < COLUMNS ? COLUMNS / GROUP : 1;  // of the table of scales, of a unit
constexpr bool AHEAD = BM <= 64;  // whether the next piece is read before a piece's products: 3% of few rows' time
constexpr int PER_LINE = PIECES / (LINES ? LINES : 1);                 // pieces
constexpr int BLOCKS = BN / 64 / WARPGROUPS;                           // of 64 rows, of a warpgroup
constexpr int OUTPUTS = GATED ? N / 2 : N, OWN = GATED ? BN / 2 : BN;  // of all, of a tile
constexpr int SUMS = BM / 2;
constexpr int FRAGMENTS = BN / 16, ROW_TILES = BM / 8;  // a fragment: 16 rows of the weight, 8 of x
constexpr int THREADS = 128 * WARPGROUPS;               // that multiply
static_assert(!APART || BLOCKS == 2);

// A slot of the ring, in bytes. Boxes begin at multiples of 128, also where entries are bytes.
constexpr int X_BYTES = BM * COLUMNS * X_SIZE, W_BYTES = BN * ROW;
constexpr int HALF_LINE = (OWN * 2 + 255) / 256 * 256, LINE = GATED ? 2 * HALF_LINE : HALF_LINE;
constexpr int SCALES_AT = X_BYTES + W_BYTES, ZEROS_AT = SCALES_AT + LINES * LINE;
constexpr int SLOT = (ZEROS_AT + (ZEROS ? LINES * LINE : 0) + 1023) / 1024 * 1024;
constexpr int ARRIVING = X_BYTES + W_BYTES + LINES * BN * (ZEROS ? 3 : 2);

struct Operands {
    const Map *x, *weight, *scales_of_groups, *zeros_of_groups;
    const void *scales;
    const float *x_scales;
    const u16 *bias, *residual;
    u16 *out;
    float4 *partial;
    u32 *counter;
    int rows, row, tile, rank;  // of x, and the first of the program's; its tile of the weight, and its part of K
};

// Where the parts P of piece S of a unit lie among its columns (see pack.py).
constexpr int column(int piece, int part) {
    return piece / BATCH * CHUNK + part * (CHUNK / PARTS) + piece % BATCH * 16;
}
// Parts P and on of a piece of 64 rows as weights.
template <int P = 0>
__device__ __forceinline__ void convert(u32 (&a)[PARTS][4], const uint4 &w, const Factors (&f)[2]) {
    if constexpr (P < PARTS) {
        a[P][0] = weights<P>(w.x, f[0]), a[P][1] = weights<P>(w.y, f[1]);
        a[P][2] = weights<P>(w.z, f[0]), a[P][3] = weights<P>(w.w, f[1]);
        convert<P + 1>(a, w, f);
    }
}

// Asks for weights, scales and x of units; one thread.
struct Filler {
    const Operands &o;
    u32 ring, full;
    u64 once, again;

    __device__ __forceinline__ void table(const Map *map, int unit, u32 at, int bytes, u32 barrier) const {
        const int first = (long long)unit * COLUMNS / GROUP;
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            fetch(at + i * LINE, map, o.tile * OWN, first + i, barrier, once);
            if (GATED)
                fetch(at + i * LINE + HALF_LINE / 2 * bytes, map, OUTPUTS + o.tile * OWN, first + i, barrier, once);
        }
    }
    __device__ __forceinline__ void weight(int unit, int slot) const {
        const u32 barrier = full + 8 * slot, at = ring + slot * SLOT;
        const int column = unit * (ROW / 2);  // elements of 16 bits
        expect(barrier, ARRIVING);
        if (APART) {
#pragma unroll
            for (int b = 0; b < BN / 64; b++)
                fetch(at + X_BYTES + b * 64 * ROW, o.weight, column, b % 2 * OUTPUTS + o.tile * OWN + b / 2 * 64,
                      barrier, once);
        } else {
            fetch(at + X_BYTES, o.weight, column, o.tile * OWN, barrier, once);
            if (GATED) fetch(at + X_BYTES + OWN * ROW, o.weight, column, OUTPUTS + o.tile * OWN, barrier, once);
        }
        if (GROUPED) table(o.scales_of_groups, unit, at + SCALES_AT, 2, barrier);
        if (ZEROS) table(o.zeros_of_groups, unit, at + ZEROS_AT, 1, barrier);
    }
    __device__ __forceinline__ void inputs(int unit, int slot) const {
#pragma unroll
        for (int c = 0; c < COLUMNS * X_SIZE / 128; c++)
            fetch(ring + slot * SLOT + c * BM * 128, o.x, unit * COLUMNS + c * (128 / X_SIZE), o.row, full + 8 * slot,
                  again);
    }
    // As many units' weights as there are slots before the wait for x.
    __device__ __forceinline__ void run(int begin, int end, u32 freed) const {
        for (int i = 0; i < STAGES && begin + i < end; i++) weight(begin + i, i);
        asm volatile("griddepcontrol.wait;" ::: "memory");
        for (int i = 0; i < STAGES && begin + i < end; i++) inputs(begin + i, i);
        int slot = 0, phase = 0;
        for (int unit = begin + STAGES; unit < end; unit++) {
            wait(freed + 8 * slot, phase);
            weight(unit, slot), inputs(unit, slot);
            if (++slot == STAGES) slot = 0, phase ^= 1;
        }
    }
};

// A row of the weight's scale and zero point in a slot.
__device__ __forceinline__ Factors factors_at(u32 slot, int line, int row) {
    u16 scale;
    u32 zero = FORM == INT4 ? 8 : 128;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale) : "r"(slot + SCALES_AT + line * LINE + row * 2) : "memory");
    if (ZEROS)
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(zero) : "r"(slot + ZEROS_AT + line * LINE + row) : "memory");
    return factors(scale, zero);
}

// The tensor cores sum FP8 products with fewer bits: sums leave them after LONG units.
constexpr bool PROMOTED = BY_CODES && INTERVAL;
constexpr int LONG = PROMOTED ? INTERVAL / COLUMNS : 1;
template <int SIZE>
__device__ __forceinline__ float (&pick(float (&found)[SIZE], float (&sums)[SUMS])) [SUMS] {
    if constexpr (PROMOTED)
        return found;
    else
        return sums;
} template <int SIZE>
                                                                                    __device__ __forceinline__
    void promote(float (&sums)[BLOCKS][SUMS], float (&found)[BLOCKS][SIZE]) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            asm volatile("" : "+f"(found[b][i])::"memory");  // not before the products are done
            sums[b][i] += found[b][i];
            found[b][i] = 0.f;
        }
}

// Sums of a program's units, by its warpgroups.
struct Multiplier {
    u32 ring, full, freed;
    int begin, end;

    __device__ __forceinline__ void run(float (&sums)[BLOCKS][SUMS]) const {
        const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4;
        // where the lane's row of four matrices begins: 8 rows, 8 more, then the same 16 bytes on
        u32 line[BLOCKS];
        int row[BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int fragment = (group * BLOCKS + b) * 4 + warp, half = lane / 8 % 2;
            const int own = BESIDE ? half * OWN + fragment * 8 + lane % 8 : fragment * 16 + half * 8 + lane % 8;
            line[b] = X_BYTES + own * ROW + ((lane / 16) ^ (ROW == 64 ? own / 2 % 4 : own % 8)) * 16;
            row[b] = BESIDE ? fragment * 8 + g : fragment * 16 + g;
            asm volatile("" : "+r"(line[b]), "+r"(row[b]));  // not to be computed again
        }
        float found[BLOCKS][PROMOTED ? SUMS : 1] = {};
        u32 at = ring, barrier = full, phase = 0, before = 0;
#pragma unroll 1
        for (int unit = begin; unit < end; unit++) {
            wait(barrier, phase);
            const u32 place = (at & 0x3ffff) / 16;
            auto leave = [&] {
                if (unit > begin && lane == 0) arrive(before);
            };
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                if constexpr (CODES) {
                    Factors f[2] = {factors(TYPE == FLOAT16 ? 0x3c00 : 0x3f80, FORM == INT4 ? 8 : 128)};
                    f[1] = f[0];
                    uint4 next = matrices(at + line[b]);
                    // one piece's products are under way while the next one's codes become weights
#pragma unroll
                    for (int piece = 0; piece < PIECES; piece++) {
                        const uint4 w = next;
                        if (AHEAD && piece + 1 < PIECES) next = matrices((at + line[b]) ^ (piece + 1) * 32);
                        if (GROUPED && piece % PER_LINE == 0) {
                            f[0] = factors_at(at, piece / PER_LINE, row[b]);
                            f[1] = factors_at(at, piece / PER_LINE, row[b] + (BESIDE ? HALF_LINE / 2 : 8));
                        }
                        u32 a[PARTS][4];
                        convert(a, w, f);
                        begin_products();
#pragma unroll
                        for (int p = 0; p < PARTS; p++) {
                            const int c = column(piece, p);
                            multiply<BM, 0>(sums[b], a[p], place + (c / 64 * BM * 128 + c % 64 * 2) / 16);
                        }
                        end_products();
                        wait_products<1>();
                        if (!AHEAD && piece + 1 < PIECES) next = matrices((at + line[b]) ^ (piece + 1) * 32);
                        if (b == 0 && piece == 0) leave();  // no other unit's products are under way
                    }
                } else {
                    auto &to = pick(found[b], sums[b]);
                    begin_products();
#pragma unroll
                    for (int s = 0; s < PIECES; s++)
                        multiply<BM, 0>(to, place + X_BYTES / 16 + (group * BLOCKS + b) * ROWS_PLACE + 2 * s,
                                        place + 2 * s);
                    end_products();
                }
            }
            if (PROMOTED && ((unit - begin) % LONG == LONG - 1 || unit + 1 == end)) {
                wait_products<0>();
                promote(sums, found);
            }
            if (!CODES) {
                wait_products<BLOCKS>();
                leave();
            }
            before = barrier + (freed - full);
            at += SLOT, barrier += 8;
            if (barrier == freed) at = ring, barrier = full, phase ^= 1;
        }
        wait_products<0>();
    }
};

// Two neighbouring rows of x's sums of output ``n + lane / 4`` to memory, by 8 outputs and 8 rows.
__device__ __forceinline__ void store(const Operands &o, float l, float r, int n, int tile_of_rows) {
    const int lane = threadIdx.x % 32, row = o.row + tile_of_rows * 8 + lane / 4, output = n + lane % 4 * 2;
    u32 v = turned(joined(l, r));
    if (row < o.rows && output < OUTPUTS) {
        const long long spot = (long long)row * OUTPUTS + output;
        if (o.residual) {
            const u32 rest = *(const u32 *)(o.residual + spot);
            v = joined(number<TYPE>(v) + number<TYPE>(rest), number<TYPE>(v >> 16) + number<TYPE>(rest >> 16));
        }
        *(u32 *)(o.out + spot) = v;
    }
}
// The epilogue of a fragment, of which a lane holds two rows of x of rows ``lane / 4`` and 8 more of the weight;
// ``up``: of the ups, where they are in another block.
__device__ __forceinline__ void finish(const Operands &o, float4 v, float4 up, int fragment, int tile_of_rows) {
    const int n = o.tile * OWN + fragment * (BESIDE ? 8 : 16), g = threadIdx.x % 32 / 4;
    float of_l = 1.f, of_r = 1.f;
    if (BY_CODES) {
        const int row = o.row + tile_of_rows * 8 + threadIdx.x % 4 * 2;
        of_l = o.x_scales[STATIC || row >= o.rows ? 0 : row],
        of_r = o.x_scales[STATIC || row + 1 >= o.rows ? 0 : row + 1];
    }
    const auto complete = [&](float &l, float &r, int row) {
        float factor = UNDO, addend = 0.f;
        if (FORM != NUMBERS && !GROUPED && row < N) factor *= scale_of(o.scales, row / SHARED);
        if (o.bias && row < N) addend = number<TYPE>(o.bias[row]);
        l = l * of_l * factor + addend, r = r * of_r * factor + addend;
    };
    complete(v.x, v.y, n + g);
    complete(v.z, v.w, BESIDE ? OUTPUTS + n + g : n + 8 + g);
    if (BESIDE)
        store(o, activation(v.x, GATE) * v.z, activation(v.y, GATE) * v.w, n, tile_of_rows);
    else {
        if (GATED) {
            complete(up.x, up.y, OUTPUTS + n + g);
            complete(up.z, up.w, OUTPUTS + n + 8 + g);
            v.x = activation(v.x, GATE) * up.x, v.y = activation(v.y, GATE) * up.y;
            v.z = activation(v.z, GATE) * up.z, v.w = activation(v.w, GATE) * up.w;
        }
        store(o, v.x, v.y, n, tile_of_rows);
        store(o, v.z, v.w, n + 8, tile_of_rows);
    }
}

// Fragments as parts of K leave them: of blocks of gates before those of ups.
constexpr int WIDE = APART ? FRAGMENTS / 2 : FRAGMENTS;  // that ``finish`` takes
__device__ __forceinline__ int fragment_of(int b) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
    return APART ? b * WIDE + group * 4 + warp : (group * BLOCKS + b) * 4 + warp;
}
template <typename Each>
__device__ __forceinline__ void each_fragment(const float (&sums)[BLOCKS][SUMS], Each each) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int j = 0; j < ROW_TILES; j++) {
            const float *v = sums[b] + 4 * j;
            each(fragment_of(b) + j * FRAGMENTS, float4{v[0], v[1], v[2], v[3]});
        }
}
// Adds up what SPLIT parts left of fragments number ``from`` to ``to``, in order, and finishes them.
template <typename Part>
__device__ __forceinline__ void gather(const Operands &o, int from, int to, Part part) {
    const auto total = [&](int fragment) {
        float4 v[SPLIT], sum{};
#pragma unroll
        for (int r = 0; r < SPLIT; r++) v[r] = part(r, fragment);
#pragma unroll
        for (int r = 0; r < SPLIT; r++) sum.x += v[r].x, sum.y += v[r].y, sum.z += v[r].z, sum.w += v[r].w;
        return sum;
    };
#pragma unroll 2
    for (int i = from + threadIdx.x / 32; i < to; i += THREADS / 32) {
        const int at = i / WIDE * FRAGMENTS + i % WIDE;
        const float4 v = total(at), up = APART ? total(at + WIDE) : float4{};
        finish(o, v, up, i % WIDE, i / WIDE);
    }
}
__device__ __forceinline__ void meet_warpgroups() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Parts of K in memory; who comes last adds them up.
__device__ __forceinline__ void through_memory(const Operands &o, const float (&sums)[BLOCKS][SUMS], u32 *came) {
    const int of_tile = blockIdx.x / SPLIT, lane = threadIdx.x % 32;
    float4 *const all = o.partial + (long long)of_tile * SPLIT * FRAGMENTS * ROW_TILES * 32 + lane;
    each_fragment(sums, [&](int i, float4 v) { __stcg(all + (o.rank * FRAGMENTS * ROW_TILES + i) * 32, v); });
    __threadfence();
    meet_warpgroups();
    if (threadIdx.x == 0) *came = atomicAdd(o.counter + of_tile, 1);
    meet_warpgroups();
    if (*came != SPLIT - 1) return;
    __threadfence();
    if (threadIdx.x == 0) o.counter[of_tile] = 0;
    gather(o, 0, WIDE * ROW_TILES, [&](int r, int i) { return __ldcg(all + (r * FRAGMENTS * ROW_TILES + i) * 32); });
}
// Parts of K in the shared memory of a cluster's programs: each sends the others their shares, behind its ring, or
// where the ring was when nobody reads it any more (not BEHIND).
constexpr int OUT = WIDE * ROW_TILES, SIDES = FRAGMENTS / WIDE, MOST = (OUT + SPLIT - 1) / SPLIT;
__device__ __forceinline__ int share(int rank) { return rank * OUT / SPLIT; }
__device__ __forceinline__ void through_cluster(const Operands &o, const float (&sums)[BLOCKS][SUMS], u32 place,
                                                u32 met) {
    const auto number = [](int i) { return i / FRAGMENTS * WIDE + i % FRAGMENTS % WIDE; };
    const auto spot = [&](int rank, int side, int in_share) {
        return place + ((rank * SIDES + side) * MOST + in_share) * 512 + threadIdx.x % 32 * 16;
    };
    if (!BEHIND) arrive_in_cluster();
    wait_for_cluster();
    each_fragment(sums, [&](int i, float4 v) {
        const int to = ((number(i) + 1) * SPLIT - 1) / OUT;
        send(to, spot(o.rank, i % FRAGMENTS / WIDE, number(i) - share(to)), v, met);
    });
    wait_for_sent(met);
    gather(o, share(o.rank), share(o.rank + 1),
           [&](int r, int i) { return sent(spot(r, i % FRAGMENTS / WIDE, number(i) - share(o.rank))); });
}

extern "C" __global__ void __cluster_dims__(CLUSTERED ? SPLIT : 1, 1, 1) __launch_bounds__(THREADS + 128, PROGRAMS)
    gemm_ring(PARAMETERS, int rows, void *, void *) {
    extern __shared__ __align__(1024) char memory[];
    const u32 ring = shared_address(memory), full = ring + STAGES * SLOT, freed = full + 8 * STAGES;
    const u32 met = ring + STAGES * (SLOT + 16);
    u32 *const came = (u32 *)(memory + STAGES * (SLOT + 16));
    Operands o{&x,       &weight, SCALES_OF_GROUPS, ZEROS_OF_GROUPS, SCALES_OF_ROWS, SCALES_OF_X, BIAS,
               RESIDUAL, out,     PARTIAL,          COUNTER};
    const int of_rows = blockIdx.x / SPLIT;  // tiles of rows are neighbours, parts of K nearer ones
    o.rows = BOUNDS ? min(rows, BOUNDS[LAST]) : rows;
    o.row = of_rows % TILES_OF_ROWS * BM, o.tile = of_rows / TILES_OF_ROWS, o.rank = blockIdx.x % SPLIT;
    const int begin = o.rank * UNITS / SPLIT, end = (o.rank + 1) * UNITS / SPLIT;
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == THREADS) {
        prefetch(o.weight), prefetch(o.x);
        if (GROUPED) prefetch(o.scales_of_groups);
        for (int i = 0; i < STAGES; i++) init(full + 8 * i, 1), init(freed + 8 * i, THREADS / 32);
        if (CLUSTERED) init(met, 1), expect(met, SPLIT * SIDES * 512 * (share(o.rank + 1) - share(o.rank)));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (CLUSTERED && BEHIND) arrive_in_cluster();
    if (o.row >= o.rows) {  // nothing but padding
        asm volatile("griddepcontrol.wait;" ::: "memory");
        return;
    }
    if (threadIdx.x >= THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x == THREADS) Filler{o, ring, full, read_once(), read_again()}.run(begin, end, freed);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    asm volatile("griddepcontrol.wait;" ::: "memory");
    float sums[BLOCKS][SUMS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) sums[b][i] = 0.f;
    Multiplier{ring, full, freed, begin, end}.run(sums);
    if constexpr (SPLIT == 1) {
#pragma unroll
        for (int j = 0; j < ROW_TILES; j++)
#pragma unroll
            for (int b = 0; b < (APART ? 1 : BLOCKS); b++) {
                const float *v = sums[b] + 4 * j, *u = sums[BLOCKS - 1] + 4 * j;
                finish(o, float4{v[0], v[1], v[2], v[3]}, float4{u[0], u[1], u[2], u[3]}, fragment_of(b), j);
            }
    } else if constexpr (CLUSTERED)
        through_cluster(o, sums, BEHIND ? met + 16 : ring, met);
    else
        through_memory(o, sums, came);
}
