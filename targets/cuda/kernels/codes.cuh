// What linears of one row over codes are made of, over numbers.cuh: copies, waits, the tensor cores, rounding.
// ROUND: the format of activations' codes, or NOT_ROUNDED.

// Powers of two: of integers' products (2^-133 of the code, 2^64 of x), and of FP8's (2^-120, 2^60).
constexpr float UP = FORM == FP8 ? 0x1p60f : 0x1p64f;
constexpr float UNDO = FORM == FP8 ? 0x1p60f : 0x1p69f;

// Weights pass through L2 and are not kept there.
__device__ __forceinline__ void copy(u32 to, const void *from) {
    unsigned long long once;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(once)
                 : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// What other programs of this launch may have written.
__device__ __forceinline__ uint4 fresh(const u16 *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ float rounded(float v) { return low(pair(v, 0.f)); }
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
    u32 v;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
__device__ __forceinline__ float fresh_one(const u16 *p) {
    u16 v;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
    return low(v);
}
__device__ __forceinline__ float shared_scale(u32 at) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
    return number<SCALES>(v);
}
// c (16 rows, 8 columns) += a (16, 16) · b (16, 8); a's columns and b's rows are named alike.
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Rows over their scale, rounded to codes of eight bits, as numbers. Quotients are correctly rounded by the reciprocal
// and one step of correction, as in _rounding.py.
struct Rounding {
    float up, divisor, inverse;
    __device__ __forceinline__ Rounding(float scale) {
        up = scale < 0x1p-60f ? 0x1p64f : 1.f;
        divisor = scale * up;
        inverse = __fdiv_rn(1.f, divisor);
    }
    __device__ __forceinline__ float quotient(float v) const {
        const float a = v * up, q = a * inverse;
        const float better = fmaf(fmaf(-q, divisor, a), inverse, q);
        return fabsf(q) < 0x1p20f && q != 0.f ? better : q;
    }
    __device__ __forceinline__ u32 codes(u32 v) const {
        float l = quotient(low(v)), h = quotient(high(v));
        if (ROUND == FP8) {
            u32 halves;
            asm("{ .reg .b16 c;\n cvt.rn.satfinite.e4m3x2.f32 c, %1, %2;\n cvt.rn.f16x2.e4m3x2 %0, c; }"
                : "=r"(halves)
                : "f"(h), "f"(l));
            asm("{ .reg .b16 a, b;\n mov.b32 {a, b}, %2;\n cvt.f32.f16 %0, a;\n cvt.f32.f16 %1, b; }"
                : "=f"(l), "=f"(h)
                : "r"(halves));
        } else {  // adding and taking off a number whose last bit is 1 rounds to integers
            l = __fsub_rn(__fadd_rn(fminf(fmaxf(l, -127.f), 127.f), 12582912.f), 12582912.f);
            h = __fsub_rn(__fadd_rn(fminf(fmaxf(h, -127.f), 127.f), 12582912.f), 12582912.f);
        }
        return pair(l, h);
    }
};
