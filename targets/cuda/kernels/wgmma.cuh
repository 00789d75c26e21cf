// sm_90's copies of boxes, barriers they arrive at, and products of 64 rows by four warps, over numbers.cuh.
// ELEMENT: what a product's operands are made of, "bf16", "f16" or "e4m3"; DEPTH: its columns, 32 bytes; MAJOR: how its
// text says that columns are neighbours, where it must.

typedef unsigned long long u64;

struct __align__(64) Map {
    u64 words[16];
};
// A parameter that is a descriptor, as llmopt's launcher passes it: followed by extents and strides.
#define DESCRIPTOR(name) const __grid_constant__ Map name, int, int, long long, long long

__device__ __forceinline__ void init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
    asm volatile(
        "{ .reg .pred p;\nagain: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again; }" ::"r"(barrier),
        "r"(phase)
        : "memory");
}
// Which lines leave L2 first: those read once; or last.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ u64 read_again() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void prefetch(const Map *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box at a column and a row, to shared memory; its bytes arrive at the barrier.
__device__ __forceinline__ void fetch(u32 to, const Map *map, int column, int row, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
        "{%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void fetch(u32 to, const Map *map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// The same to that place of the cluster's programs in ``mask``, at whose barriers of that place it arrives.
__device__ __forceinline__ void fetch_for(u16 mask, u32 to, const Map *map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
        : "memory");
}
// At a barrier of program ``rank`` of the cluster. No release of the cluster's scope: that is a fence of the whole GPU,
// as long as a unit's products, and what the barrier frees was read by the tensor cores, which have been waited for.
__device__ __forceinline__ void arrive_at(int rank, u32 barrier) {
    asm volatile(
        "{ .reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [a]; }" ::"r"(
            barrier),
        "r"(rank)
        : "memory");
}
// All threads of a cluster's programs that are still there have arrived. A release would be a fence of the whole GPU,
// as long as many a product: nothing written before an arrival is read after it.
__device__ __forceinline__ void arrive_in_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Four numbers to place ``to`` of program ``rank`` of the cluster; their bytes arrive at its ``barrier``.
__device__ __forceinline__ void send(int rank, u32 to, float4 v, u32 barrier) {
    asm volatile(
        "{ .reg .b32 a, b;\nmapa.shared::cluster.u32 a, %0, %2;\nmapa.shared::cluster.u32 b, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {%3, %4, %5, %6}, [b]; }" ::"r"(to),
        "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
        : "memory");
}
// What the cluster sent is there.
__device__ __forceinline__ void wait_for_sent(u32 barrier) {
    asm volatile(
        "{ .reg .pred p;\nagain: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n@!p bra again; "
        "}" ::"r"(barrier)
        : "memory");
}
__device__ __forceinline__ float4 sent(u32 at) {
    const uint4 v = take(at);
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// Four matrices of 8 rows of 16 bytes: a lane names a row, and gets 4 bytes of a row of each.
__device__ __forceinline__ uint4 matrices(u32 at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}
// A matrix of 8 by 8 of which a lane holds two neighbours of a row, turned.
__device__ __forceinline__ u32 turned(u32 v) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// Products are started by four warps together, and done when they are waited for.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Rows of 128 bytes in shared memory, swizzled; ``place``: their address over 16.
__device__ __forceinline__ u64 rows_at(u32 place) {
    u64 v;
    asm("mov.b64 %0, {%1, %2};" : "=l"(v) : "r"(place), "r"(0x40000040));
    return v;
}

#define TWO(c, i) "+f"(c[i]), "+f"(c[i + 1])
#define FOUR(c, i) TWO(c, i), TWO(c, i + 2)
#define EIGHT(c, i) FOUR(c, i), FOUR(c, i + 4)
#define SIXTEEN(c, i) EIGHT(c, i), EIGHT(c, i + 8)
#define THIRTY_TWO(c, i) SIXTEEN(c, i), SIXTEEN(c, i + 16)
#define SIXTY_FOUR(c, i) THIRTY_TWO(c, i), THIRTY_TWO(c, i + 32)
#define FIRST4 "%0, %1, %2, %3"
#define FIRST8 FIRST4 ", %4, %5, %6, %7"
#define FIRST16 FIRST8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FIRST32 FIRST16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FIRST48 FIRST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FIRST64 FIRST48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FIRST72 FIRST64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FIRST80 FIRST72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FIRST96 FIRST80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FIRST104 FIRST96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FIRST112 FIRST104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FIRST128 \
    FIRST112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" #n DEPTH ".f32." ELEMENT "." ELEMENT
#define OF_REGISTERS(n, first, a, b, c, d, x, ...)                                                     \
    asm volatile(PRODUCT(n) " {" first "}, {%" #a ", %" #b ", %" #c ", %" #d "}, %" #x ", 1, 1, 1, 0;" \
                 : __VA_ARGS__                                                                         \
                 : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(rows_at(x_place)))
#define OF_SHARED(n, first, w, x, ...)                                          \
    asm volatile(PRODUCT(n) " {" first "}, %" #w ", %" #x ", 1, 1, 1" MAJOR ";" \
                 : __VA_ARGS__                                                  \
                 : "l"(rows_at(tall_place)), "l"(rows_at(wide_place)))

constexpr int ROWS_PLACE = 64 * 128 / 16;  // from 64 rows to the next

// sums (64 rows of the weight, COUNT rows of x, from sum FROM on) += columns of the weight, in registers, · x.
template <int COUNT, int FROM, int SUMS>
__device__ __forceinline__ void multiply(float (&sums)[SUMS], const u32 (&w)[4], u32 x_place) {
    if constexpr (COUNT == 8) OF_REGISTERS(8, FIRST4, 4, 5, 6, 7, 8, FOUR(sums, FROM));
    if constexpr (COUNT == 16) OF_REGISTERS(16, FIRST8, 8, 9, 10, 11, 12, EIGHT(sums, FROM));
    if constexpr (COUNT == 32) OF_REGISTERS(32, FIRST16, 16, 17, 18, 19, 20, SIXTEEN(sums, FROM));
    if constexpr (COUNT == 64)
        OF_REGISTERS(64, FIRST32, 32, 33, 34, 35, 36, SIXTEEN(sums, FROM), SIXTEEN(sums, FROM + 16));
    if constexpr (COUNT > 64) {
        multiply<64, FROM>(sums, w, x_place);
        multiply<COUNT - 64, FROM + 32>(sums, w, x_place + ROWS_PLACE);
    }
}
// The same of a weight in shared memory.
template <int COUNT, int FROM, int SUMS>
__device__ __forceinline__ void multiply(float (&sums)[SUMS], u32 tall_place, u32 wide_place) {
    if constexpr (COUNT == 8) OF_SHARED(8, FIRST4, 4, 5, FOUR(sums, FROM));
    if constexpr (COUNT == 16) OF_SHARED(16, FIRST8, 8, 9, EIGHT(sums, FROM));
    if constexpr (COUNT == 32) OF_SHARED(32, FIRST16, 16, 17, SIXTEEN(sums, FROM));
    if constexpr (COUNT == 64) OF_SHARED(64, FIRST32, 32, 33, SIXTEEN(sums, FROM), SIXTEEN(sums, FROM + 16));
    if constexpr (COUNT > 64) {
        multiply<64, FROM>(sums, tall_place, wide_place);
        multiply<COUNT - 64, FROM + 32>(sums, tall_place, wide_place + ROWS_PLACE);
    }
}
// sums (64 rows of the tall side, COUNT of the wide one) += their products, both in shared memory, in one instruction.
template <int COUNT>
__device__ __forceinline__ void multiply_wide(float (&sums)[COUNT / 2], u32 tall_place, u32 wide_place) {
    if constexpr (COUNT == 96) OF_SHARED(96, FIRST48, 48, 49, THIRTY_TWO(sums, 0), SIXTEEN(sums, 32));
    if constexpr (COUNT == 128) OF_SHARED(128, FIRST64, 64, 65, SIXTY_FOUR(sums, 0));
    if constexpr (COUNT == 144) OF_SHARED(144, FIRST72, 72, 73, SIXTY_FOUR(sums, 0), EIGHT(sums, 64));
    if constexpr (COUNT == 160) OF_SHARED(160, FIRST80, 80, 81, SIXTY_FOUR(sums, 0), SIXTEEN(sums, 64));
    if constexpr (COUNT == 192) OF_SHARED(192, FIRST96, 96, 97, SIXTY_FOUR(sums, 0), THIRTY_TWO(sums, 64));
    if constexpr (COUNT == 208)
        OF_SHARED(208, FIRST104, 104, 105, SIXTY_FOUR(sums, 0), THIRTY_TWO(sums, 64), EIGHT(sums, 96));
    if constexpr (COUNT == 224)
        OF_SHARED(224, FIRST112, 112, 113, SIXTY_FOUR(sums, 0), THIRTY_TWO(sums, 64), SIXTEEN(sums, 96));
    if constexpr (COUNT == 256) OF_SHARED(256, FIRST128, 128, 129, SIXTY_FOUR(sums, 0), SIXTY_FOUR(sums, 64));
}
