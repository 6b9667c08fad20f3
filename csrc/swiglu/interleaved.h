// SwiGLU of bf16 at the AVX2 level: the products of one block of columns and the exponentials of the next as one stream of instructions.
//
// Sixteen columns take 42 instructions, two of them divisions, in two chains of dependent ones: exponentials and products. In loops of their own, or left to
// the compiler's order, a scheduler of 64 entries sees one chain at a time. Zen 4, in L1, cycles per 16 columns: loops of their own 13.8, this order 11.4,
// without the divisions 10.1; 32 columns ahead instead of 64 12.6, 128 as 64; constants from memory, which fill both load ports, 11.6; a reciprocal estimate
// instead of the division 11.1.
#pragma once

#include <array>

#include "swiglu/math.h"

namespace astrobiogen::swiglu {

#if defined(ASTRO_HAS_LEVELS)
template <typename T, Level L>
inline constexpr bool kInterleaved = std::is_same_v<T, c10::BFloat16> && L == Level::kAvx2;
#else
template <typename T, Level L>
inline constexpr bool kInterleaved = false;
#endif

#if defined(ASTRO_HAS_LEVELS)
// Clamps of `one_plus_exp` on bf16 as it is: signed words cut positive gates at 88, unsigned ones negative gates at -89, whose power of two is Inf.
struct alignas(32) Words {
  std::array<uint16_t, 16> value;
  explicit constexpr Words(uint16_t v) : value{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v} {}
};
struct alignas(32) Lanes8 {
  std::array<uint32_t, 8> value;
  explicit constexpr Lanes8(uint32_t v) : value{v, v, v, v, v, v, v, v} {}
};
inline constexpr Words kHighestGate(0x42b0), kLowestGate(0xc2b2);
inline constexpr Lanes8 kOne(0x3f800000), kHalfUnit(0x8000);

// Sixteen products gate / e * up, `e` as `store_pair<8>` leaves it, and 1 + exp(-gate_ahead) of the sixteen columns at `gate_ahead` to `ahead`. The same
// operations in the same order as `product_of` and `one_plus_exp`: the same bits.
template <bool Streamed>
ASTRO_INLINE void interleaved_step(const c10::BFloat16* gate, const c10::BFloat16* up, const float* e, c10::BFloat16* product, const c10::BFloat16* gate_ahead,
                                   float* ahead) {
  using F = simd::F<8>;
  const F scale = simd::broadcast<8>(-kLog2e), round = simd::broadcast<8>(kRound);
  const F c3 = simd::broadcast<8>(kCubic[0]), c2 = simd::broadcast<8>(kCubic[1]), c1 = simd::broadcast<8>(kCubic[2]);
  const F c0 = simd::broadcast<8>(kCubic[3]), odd = (F)(simd::Lanes<8>::U{} + 0xffff0000u);
  F g0, g1, u, x0, x1, t0, t1, p0, p1;
  asm volatile(
      "vmovdqu (%[gate]), %[g0]\n\t"
      "vmovdqu (%[from]), %[x0]\n\t"
      "vpand %[g0], %[odd], %[g1]\n\t"
      "vpslld $16, %[g0], %[g0]\n\t"
      "vpminsw %[highest], %[x0], %[x0]\n\t"
      "vdivps (%[e]), %[g0], %[g0]\n\t"
      "vpminuw %[lowest], %[x0], %[x0]\n\t"
      "vdivps 32(%[e]), %[g1], %[g1]\n\t"
      "vpand %[x0], %[odd], %[x1]\n\t"
      "vpslld $16, %[x0], %[x0]\n\t"
      "vmovaps %[round], %[t0]\n\t"
      "vmovaps %[round], %[t1]\n\t"
      "vfmadd231ps %[scale], %[x0], %[t0]\n\t"
      "vfmadd231ps %[scale], %[x1], %[t1]\n\t"
      "vsubps %[round], %[t0], %[p0]\n\t"
      "vsubps %[round], %[t1], %[p1]\n\t"
      "vmovdqu (%[up]), %[u]\n\t"
      "vfmsub213ps %[p0], %[scale], %[x0]\n\t"
      "vfmsub213ps %[p1], %[scale], %[x1]\n\t"
      "vpslld $16, %[u], %[u]\n\t"
      "vmovaps %[c2], %[p0]\n\t"
      "vmovaps %[c2], %[p1]\n\t"
      "vfmadd231ps %[c3], %[x0], %[p0]\n\t"
      "vfmadd231ps %[c3], %[x1], %[p1]\n\t"
      "vmulps %[u], %[g0], %[g0]\n\t"
      "vpslld $23, %[t0], %[t0]\n\t"
      "vpslld $23, %[t1], %[t1]\n\t"
      "vfmadd213ps %[c1], %[x0], %[p0]\n\t"
      "vfmadd213ps %[c1], %[x1], %[p1]\n\t"
      "vpand (%[up]), %[odd], %[u]\n\t"
      "vpaddd %[half], %[g0], %[g0]\n\t"
      "vmulps %[u], %[g1], %[g1]\n\t"
      "vfmadd213ps %[c0], %[x0], %[p0]\n\t"
      "vfmadd213ps %[c0], %[x1], %[p1]\n\t"
      "vpsrld $16, %[g0], %[g0]\n\t"
      "vpaddd %[half], %[g1], %[g1]\n\t"
      "vfmadd213ps %[one], %[t0], %[p0]\n\t"
      "vfmadd213ps %[one], %[t1], %[p1]\n\t"
      "vpblendw $0xaa, %[g1], %[g0], %[g0]\n\t"
      "vmovaps %[p0], (%[ahead])\n\t"
      "vmovaps %[p1], 32(%[ahead])\n\t"
      : [g0] "=&x"(g0), [g1] "=&x"(g1), [u] "=&x"(u), [x0] "=&x"(x0), [x1] "=&x"(x1), [t0] "=&x"(t0), [t1] "=&x"(t1), [p0] "=&x"(p0), [p1] "=&x"(p1)
      : [gate] "r"(gate), [up] "r"(up), [e] "r"(e), [from] "r"(gate_ahead), [ahead] "r"(ahead), [scale] "x"(scale), [round] "x"(round), [c3] "x"(c3),
        [c2] "x"(c2), [c1] "x"(c1), [c0] "x"(c0), [odd] "x"(odd), [highest] "m"(kHighestGate), [lowest] "m"(kLowestGate), [one] "m"(kOne),
        [half] "m"(kHalfUnit)
      : "memory");
  if constexpr (Streamed) simd::stream_bytes<Level::kAvx2>(product, (simd::u32x8)g0);
  else *reinterpret_cast<typename simd::Lanes<8>::WordMemory*>(product) = (typename simd::Lanes<8>::U)g0;
}
#endif

}  // namespace astrobiogen::swiglu
