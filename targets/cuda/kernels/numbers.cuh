// What every kernel in CUDA C++ shares: types, pairs of bfloat16, codes as numbers, activations.
// FORM: INT4, INT8 or FP8, of weights' codes, NUMBERS, or FP8_BY_FP8 where x is codes too; SCALES: the type of scales.

typedef unsigned short u16;
typedef unsigned int u32;

enum { INT4, INT8, FP8, NUMBERS, FP8_BY_FP8 };
enum { NONE, SILU, GELU, GELU_TANH, RELU };
enum { FLOAT32, BFLOAT16, FLOAT16 };

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ uint4 take(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
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
// A number of 16 bits of a type.
template <int KIND>
__device__ __forceinline__ float number(u16 v) {
    float f = low(v);
    if (KIND == FLOAT16) asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
__device__ __forceinline__ float scale_of(const void *p, long long i) {
    return SCALES == FLOAT32 ? ((const float *)p)[i] : number<SCALES>(((const u16 *)p)[i]);
}
// Codes number P of two elements, as subnormal bfloat16: nibbles of odd parts are 16 times as large.
template <int P>
__device__ __forceinline__ u32 numbers(u32 w) {
    if (FORM == INT4) return (P >= 2 ? w >> 8 : w) & (P % 2 ? 0x00f000f0u : 0x000f000fu);
    if (FORM == INT8) return ((P ? w >> 8 : w) & 0x00ff00ffu) ^ 0x00800080u;
    return ((P ? w : w << 8) & 0x80008000u) | ((P ? w >> 4 : w << 4) & 0x07f007f0u);
}
__device__ __forceinline__ float activation(float v, int kind) {
    if (kind == SILU) return __fdividef(v, 1.f + __expf(-v));
    if (kind == GELU) return 0.5f * v * (1.f + erff(v * 0.7071067811865476f));
    if (kind == GELU_TANH) return 0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
    return fmaxf(v, 0.f);
}
