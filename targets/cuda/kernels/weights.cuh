// Codes as weights of the operands' type, in registers, over numbers.cuh.
// TYPE: of x and of the result, BFLOAT16 or FLOAT16; ZEROS: whether groups have zero points of their own.

// Powers of two that codes carry as bfloat16, and what the sums take off.
constexpr bool HALVES = TYPE == FLOAT16;
constexpr float UNDO = FORM >= NUMBERS || HALVES ? 1.f : FORM == FP8 ? 0x1p20f : 0x1p33f;

// Pairs of the operands' type.
__device__ __forceinline__ u32 joined(float l, float h) {
    u32 v;
    if (!HALVES) return pair(l, h);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(h), "f"(l));
    return v;
}
__device__ __forceinline__ u32 both(u16 v) { return v * 0x10001u; }
__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 v;
    if (HALVES)
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}
__device__ __forceinline__ u32 times(u32 a, u32 b) { return multiply_add(a, b, 0x80008000u); }

// What turns codes of a row and group into its weights: code · scale + addend, or (code · one + addend) · scale.
// [1]: of odd nibbles, which are 16 times as large.
struct Factors {
    u32 scale[2], addend[2];
};
constexpr bool AT_ONCE = !HALVES && !ZEROS;  // the addend is exact after the scale
__device__ __forceinline__ Factors factors(u16 scale, int zero) {
    Factors f;
    if (HALVES) {
        f.scale[0] = f.scale[1] = FORM == FP8 ? times(both(scale), 0x5c005c00u) : both(scale);  // 2^8
        f.addend[0] = both(0xe400 + zero);                                                      // -(1024 + zero)
        f.addend[1] = both(0xd400 + 16 * zero);                                                 // -(64 + zero)
        return f;
    }
    f.scale[0] = times(both(scale), 0x71807180u);                     // 2^100
    f.scale[1] = FORM == INT4 ? times(both(scale), 0x6f806f80u) : 0;  // 2^96
    f.addend[0] = both(0x8000 + zero), f.addend[1] = both(0x8000 + 16 * zero);
    if (AT_ONCE && FORM == INT4) f.addend[0] = f.addend[1] = times(both(scale), 0xb080b080u);  // -8 · 2^-33
    if (AT_ONCE && FORM == INT8) f.addend[0] = times(both(scale), 0xb280b280u);                // -128 · 2^-33
    if (AT_ONCE && FORM == FP8) f.addend[0] = 0x80008000u;
    return f;
}
template <int P>
__device__ __forceinline__ u32 weights(u32 w, const Factors &f) {
    constexpr int ODD = FORM == INT4 ? P % 2 : 0;
    if (!HALVES) {
        if (AT_ONCE) return multiply_add(numbers<P>(w), f.scale[ODD], f.addend[ODD]);
        return times(multiply_add(numbers<P>(w), 0x3f803f80u, f.addend[ODD]), f.scale[ODD]);
    }
    if (FORM == FP8) {
        const u32 bits = (P ? w >> 1 : w << 7) & 0x3f803f80u;
        return times(bits | ((P ? w : w << 8) & 0x80008000u), f.scale[0]);
    }
    if (FORM == INT8) w ^= P ? 0x80008000u : 0x00800080u;
    const u32 mask = FORM == INT8 ? 0x00ff00ffu : ODD ? 0x00f000f0u : 0x000f000fu;
    const u32 code = ((FORM == INT8 ? P : P >= 2) ? w >> 8 : w) & mask | 0x64006400u;
    return times(multiply_add(code, ODD ? 0x2c002c00u : 0x3c003c00u, f.addend[ODD]), f.scale[ODD]);
}
