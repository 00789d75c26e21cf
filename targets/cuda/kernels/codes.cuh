// What kernels over codes share: memory, numbers, tensor cores, activations (CUDA C++).
// FORM: INT4, INT8 or FP8, of weights' codes; ROUND: of activations', or NOT_ROUNDED; SCALES: the type of scales.

typedef unsigned short u16;
typedef unsigned int u32;

enum { INT4, INT8, FP8 };
enum { NONE, SILU, GELU, GELU_TANH, RELU };
enum { FLOAT32, BFLOAT16, FLOAT16 };

// Powers of two: of integers' products (2^-133 of the code, 2^64 of x), and of FP8's (2^-120, 2^60).
constexpr float UP = FORM == FP8 ? 0x1p60f : 0x1p64f;
constexpr float UNDO = FORM == FP8 ? 0x1p60f : 0x1p69f;

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

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
__device__ __forceinline__ uint4 take(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
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
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u32 pair(float l, float h) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(h), "f"(l));
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
__device__ __forceinline__ float half_scale(u16 v) {
    float f = low(v);
    if (SCALES == FLOAT16) asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
__device__ __forceinline__ float scale_of(const void *p, long long i) {
    return SCALES == FLOAT32 ? ((const float *)p)[i] : half_scale(((const u16 *)p)[i]);
}
__device__ __forceinline__ float shared_scale(u32 at) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
    return half_scale(v);
}
// c (16 rows, 8 columns) += a (16, 16) · b (16, 8); a's columns and b's rows are named alike.
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Codes number P of two elements, as subnormal bfloat16: nibbles of odd parts are 16 times as large.
template <int P>
__device__ __forceinline__ u32 numbers(u32 w) {
    if (FORM == INT4) return (P >= 2 ? w >> 8 : w) & (P % 2 ? 0x00f000f0u : 0x000f000fu);
    if (FORM == INT8) return ((P ? w >> 8 : w) & 0x00ff00ffu) ^ 0x00800080u;
    return ((P ? w : w << 8) & 0x80008000u) | ((P ? w >> 4 : w << 4) & 0x07f007f0u);
}
__device__ __forceinline__ float activation(float v, int kind) {
    if (kind == SILU) return v / (1.f + __expf(-v));
    if (kind == GELU) return 0.5f * v * (1.f + erff(v * 0.7071067811865476f));
    if (kind == GELU_TANH) return 0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
    return fmaxf(v, 0.f);
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
