// Linears of many rows on sm_90: the programs of a cluster share boxes of the weight by multicast (gemm_cluster.py,
// ADR 39).
//
// One thread asks for boxes of x and of the weight; two warpgroups multiply 64 rows of x each by BN rows of the weight.
// Programs stay and walk the tiles; or K is divided among a cluster's programs, which have a tile together.
// N, K, BN and the other capitals are given by gemm_cluster.py.

#include "numbers.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

constexpr bool GATED = GATE != NONE;
constexpr int BM = 128, BK = 64, THREADS = 256;  // rows of a tile, columns of a unit, threads that multiply
constexpr int UNITS = (K + BK - 1) / BK;
constexpr int OUTPUTS = GATED ? N / 2 : N, OWN = GATED ? BN / 2 : BN;  // of all, of a tile
constexpr int COLUMN_TILES = (OUTPUTS + OWN - 1) / OWN;
constexpr int CLUSTER = SHARE * SPLIT;                       // programs: SHARE tiles of rows, SPLIT parts of K
constexpr int BOX = BN / (GATED && SHARE == 1 ? 2 : SHARE);  // rows of the weight
constexpr int X_BYTES = BM * 128, W_BYTES = BN * 128, SLOT = X_BYTES + W_BYTES;
constexpr int COUNT = OWN / 8 / SPLIT;  // blocks of 8 outputs that a program finishes
constexpr int PITCH = 144;              // bytes from a row of 64 results to the next, apart in banks
constexpr int STAGED = STAGES * SLOT, BARRIERS = STAGED + THREADS / 32 * 16 * PITCH;

// Which tile of rows of its cluster a program has; the first program of those that share its boxes.
__device__ __forceinline__ int place() { return blockIdx.x % SHARE; }
__device__ __forceinline__ int leader() { return blockIdx.x % CLUSTER / SHARE * SHARE; }

// Visits a program's tiles, by first row and number of columns' tile; those that follow each other share weights.
template <typename Visit>
__device__ __forceinline__ void walk(int rows, Visit visit) {
    const int high = (rows + BM * SHARE - 1) / (BM * SHARE);
    for (int tile = blockIdx.x / CLUSTER; tile < high * COLUMN_TILES; tile += gridDim.x / CLUSTER)
        visit((tile % high * SHARE + place()) * BM, tile / high);
}

// The slots of the ring in turn.
struct Turn {
    int slot = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
};

// Asks for boxes; one thread. Programs whose rows are padding still bring their share of the weight.
struct Filler {
    const Map &x, &weight;
    u32 ring, full, freed;
    int begin, end, rows;

    __device__ __forceinline__ void weights(int unit, int row, int tile, int slot) const {
        const u32 barrier = full + 8 * slot, at = ring + slot * SLOT + X_BYTES;
        expect(barrier, row < rows ? SLOT : W_BYTES);
#pragma unroll
        for (int i = 0; i < BN / BOX / SHARE; i++) {
            const int from = (place() * (BN / BOX / SHARE) + i) * BOX;
            const int line = tile * OWN + from + (GATED && from >= OWN ? OUTPUTS - OWN : 0);
            if (SHARE == 1)
                fetch(at + from * 128, &weight, unit * BK, line, barrier);
            else
                fetch_for(((1 << SHARE) - 1) << leader(), at + from * 128, &weight, unit * BK, line, barrier);
        }
    }
    __device__ __forceinline__ void inputs(int unit, int row, int slot) const {
        if (row < rows) fetch(ring + slot * SLOT, &x, unit * BK, row, full + 8 * slot);
    }
    // As many units' weights as there are slots before the wait for x.
    __device__ __forceinline__ void run() const {
        Turn turn;
        int filled = 0, early = 0;
        walk(rows, [&](int row, int tile) {
            if (!filled) {
                for (; early < STAGES && begin + early < end; early++) weights(begin + early, row, tile, early);
                asm volatile("griddepcontrol.wait;" ::: "memory");
            }
            for (int unit = begin; unit < end; unit++, filled++, turn.next()) {
                if (filled >= STAGES) wait(freed + 8 * turn.slot, turn.phase ^ 1);
                if (filled >= early) weights(unit, row, tile, turn.slot);
                inputs(unit, row, turn.slot);
            }
        });
    }
};

// Sums of a tile's units, by the warpgroups.
struct Multiplier {
    u32 ring, full, freed;
    int units;

    __device__ __forceinline__ void release(int slot) const {
        const int lane = threadIdx.x % 32;
        if (SHARE > 1 && lane < SHARE) arrive_at(leader() + lane, freed + 8 * slot);
        if (SHARE == 1 && lane == 0) arrive(freed + 8 * slot);
    }
    __device__ __forceinline__ void run(Turn &turn, float (&sums)[BN / 2]) const {
        const u32 of_group = __shfl_sync(~0u, threadIdx.x / 128, 0) * ROWS_PLACE;
        int before = -1;
#pragma unroll 1
        for (int unit = 0; unit < units; unit++, turn.next()) {
            wait(full + 8 * turn.slot, turn.phase);
            const u32 place = ((ring + turn.slot * SLOT) & 0x3ffff) / 16;
            begin_products();
#pragma unroll
            for (int s = 0; s < BK / 16; s++)
                multiply_wide<BN>(sums, place + of_group + 2 * s, place + X_BYTES / 16 + 2 * s);
            end_products();
            wait_products<1>();
            if (before >= 0) release(before);
            before = turn.slot;
        }
        wait_products<0>();
        release(before);
    }
    __device__ __forceinline__ void skip(Turn &turn) const {
        for (int unit = 0; unit < units; unit++, turn.next()) {
            wait(full + 8 * turn.slot, turn.phase);
            release(turn.slot);
        }
    }
};

struct Results {
    const u16 *bias;
    u16 *out;
    int rows, row, column;  // of x, the warp's first, and its first output
    u32 staged;             // the warp's shared memory

    __device__ __forceinline__ void add_bias(float4 &v, int n) const {
        if (!bias || n >= N) return;
        const u32 two = *(const u32 *)(bias + n);
        const float l = number<TYPE>(two), r = number<TYPE>(two >> 16);
        v.x += l, v.y += r, v.z += l, v.w += r;
    }
    // Eight of a row.
    __device__ __forceinline__ void store(uint4 v, int row, int column) const {
        if (row < rows && column < OUTPUTS) *(uint4 *)(out + (long long)row * OUTPUTS + column) = v;
    }
    // 16 rows of ``sums(i, half)``, of block ``i`` of 8 outputs and of gates or ups: 64 outputs at a time pass through
    // shared memory, so that rows are stored in long pieces.
    template <typename Sums>
    __device__ __forceinline__ void finish(Sums sums) const {
        const int lane = threadIdx.x % 32, piece = lane % 8;
#pragma unroll
        for (int from = 0; from < COUNT; from += 8) {
#pragma unroll
            for (int i = from; i < min(COUNT, from + 8); i++) {
                const int n = column + i * 8 + lane % 4 * 2;
                float4 v = sums(i, 0);
                add_bias(v, n);
                if (GATED) {
                    float4 up = sums(i, 1);
                    add_bias(up, OUTPUTS + n);
                    v = {activation(v.x, GATE) * up.x, activation(v.y, GATE) * up.y, activation(v.z, GATE) * up.z,
                         activation(v.w, GATE) * up.w};
                }
                const u32 at = staged + lane / 4 * PITCH + (i - from) * 16 + lane % 4 * 4;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(joined(v.x, v.y)) : "memory");
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + 8 * PITCH), "r"(joined(v.z, v.w)) : "memory");
            }
            __syncwarp();
#pragma unroll
            for (int down = 0; down < 16; down += 4) {
                const uint4 v = take(staged + (down + lane / 8) * PITCH + piece * 16);
                if (from + piece < COUNT) store(v, row + down + lane / 8, column + (from + piece) * 8);
            }
            __syncwarp();
        }
    }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS + 128, 1)
    gemm_cluster(PARAMETERS, int all_rows, void *, void *) {
    extern __shared__ __align__(1024) char memory[];
    const u32 ring = shared_address(memory), full = ring + BARRIERS, freed = full + 8 * STAGES,
              met = freed + 8 * STAGES;
    const int part = blockIdx.x % CLUSTER / SHARE, begin = part * UNITS / SPLIT, end = (part + 1) * UNITS / SPLIT;
    const int rows = BOUNDS ? min(all_rows, BOUNDS[LAST]) : all_rows;
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == THREADS) {
        prefetch(&weight), prefetch(&x);
        for (int i = 0; i < STAGES; i++) init(full + 8 * i, 1), init(freed + 8 * i, SHARE * THREADS / 32);
        if (SPLIT > 1) init(met, 1), expect(met, BM * BN * 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (CLUSTER > 1)
        arrive_in_cluster(), wait_for_cluster();
    else
        __syncthreads();
    if (threadIdx.x >= THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == THREADS) Filler{x, weight, ring, full, freed, begin, end, rows}.run();
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const Multiplier multiplier{ring, full, freed, end - begin};
    const int warp = threadIdx.x / 32;
    Turn turn;
    walk(rows, [&](int row, int tile) {
        if (row >= rows && SPLIT == 1) return multiplier.skip(turn);
        float sums[BN / 2];
#pragma unroll
        for (int i = 0; i < BN / 2; i++) sums[i] = 0.f;
        multiplier.run(turn, sums);
        const Results results{
            BIAS, out, rows, row + warp * 16, tile * OWN + part * COUNT * 8, ring + STAGED + warp * 16 * PITCH};
        if constexpr (SPLIT == 1)
            results.finish([&](int i, int half) {
                const float *v = sums + 4 * (i + half * OWN / 8);
                return float4{v[0], v[1], v[2], v[3]};
            });
        else {  // parts send each other their shares, where nobody reads a ring any more; each adds up its own, in
                // order
            const auto spot = [&](int p, int half, int i) {
                return ring + (((p * (GATED + 1) + half) * COUNT + i) * THREADS + threadIdx.x) * 16;
            };
            arrive_in_cluster();
            wait_for_cluster();
#pragma unroll
            for (int i = 0; i < BN / 8; i++) {
                const int half = i / (OWN / 8), to = i % (OWN / 8) / COUNT;
                const float *v = sums + 4 * i;
                send(to * SHARE + place(), spot(part, half, i % COUNT), float4{v[0], v[1], v[2], v[3]}, met);
            }
            wait_for_sent(met);
            results.finish([&](int i, int half) {
                float4 sum{};
#pragma unroll
                for (int p = 0; p < SPLIT; p++) {
                    const float4 v = sent(spot(p, half, i));
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                return sum;
            });
        }
    });
    if (SHARE > 1) arrive_in_cluster(), wait_for_cluster();  // nobody arrives at this program's barriers
}
