// silu and the sigmoid in fp32, for the kernels of `swiglu` and `swiglu_mlp`.
#pragma once

#include "common/math.h"
#include "common/simd.h"

namespace astrobiogen::simd {

// e^-|g|, 0 from |g| = 104 on. The clamp is an integer one: of two negative floats the larger is the smaller unsigned
// word. It turns some NaN into numbers; every result below is also multiplied by g.
template <int N>
ASTRO_INLINE F<N> exp_negative(F<N> g) {
  using U = typename Lanes<N>::U;
  const U bits = (U)g | 0x80000000u, lowest = (U)broadcast<N>(-104.0f);
  return exp_in_range((F<N>)(bits < lowest ? bits : lowest));
}

template <int N>
ASTRO_INLINE F<N> silu(F<N> g) {
  const F<N> e = exp_negative<N>(g);
  return g * ((typename Lanes<N>::I)g < 0 ? e : broadcast<N>(1.0f)) / (1.0f + e);
}

// sigmoid(g) and sigmoid(-g) from one exponential and one division; both keep their relative accuracy on either side of
// zero.
template <int N>
struct Gate {
  F<N> open, shut;
};

template <int N>
ASTRO_INLINE Gate<N> gate_of(F<N> g) {
  const F<N> e = exp_negative<N>(g);
  const F<N> large = 1.0f / (1.0f + e);
  const F<N> small = e * large;
  const auto negative = (typename Lanes<N>::I)g < 0;
  return {negative ? small : large, negative ? large : small};
}

}  // namespace astrobiogen::simd
