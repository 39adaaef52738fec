// What the forward adds at a time: an entry, or a pair of float32 numbers where one instruction adds or multiplies two.
//
// Such instructions halve the arithmetic, and the special function unit becomes the limit: it takes as long for one
// exponential as the warp takes to issue eight instructions. Some exponentials of pairs are therefore polynomials.
#pragma once

#include "entries.cuh"

// sm_120 has the instructions too, but reads logits more slowly than it computes one by one. Tests define this to run
// the pairs' path in plain C++, which rounds alike.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
#define LIT_DID_CUDA_PAIRS
#endif

namespace lit_did::cuda {

struct Pair {
  float first, second;
};

// Pairs where both sides are half precision. In float32 memory is the limit with or without them.
template <typename P, typename R>
#if defined(LIT_DID_CUDA_PAIRS)
using EntriesOf = std::conditional_t<sizeof(P) == 2 && sizeof(R) == 2, Pair, typename RealOf<P>::type>;
#else
using EntriesOf = typename RealOf<P>::type;
#endif

// ---------------------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH__) && defined(LIT_DID_CUDA_PAIRS)
__device__ __forceinline__ uint64_t packed(Pair pair) {
  uint64_t bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "f"(pair.first), "f"(pair.second));
  return bits;
}
__device__ __forceinline__ Pair unpacked(uint64_t bits) {
  Pair pair;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(pair.first), "=f"(pair.second) : "l"(bits));
  return pair;
}
__device__ __forceinline__ Pair operator+(Pair a, Pair b) {
  uint64_t sum;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(sum) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(sum);
}
__device__ __forceinline__ Pair operator*(Pair a, Pair b) {
  uint64_t product;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(product) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(product);
}
__device__ __forceinline__ Pair multiply_add(Pair a, Pair b, Pair c) {
  uint64_t sum;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(sum) : "l"(packed(a)), "l"(packed(b)), "l"(packed(c)));
  return unpacked(sum);
}
#else
__device__ __forceinline__ Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
__device__ __forceinline__ Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
__device__ __forceinline__ Pair multiply_add(Pair a, Pair b, Pair c) {
  return {multiply_add(a.first, b.first, c.first), multiply_add(a.second, b.second, c.second)};
}
#endif
__device__ __forceinline__ Pair operator-(Pair a, Pair b) { return a + Pair{-b.first, -b.second}; }

template <typename Entries, typename Real>
__device__ __forceinline__ Entries each(Real value) {
  if constexpr (std::is_same_v<Entries, Pair>)
    return {value, value};
  else
    return value;
}

// Entry i of a chunk, or pair i.
template <typename Entries, typename T, int kEntries>
__device__ __forceinline__ Entries entries_of(const Chunk<T, kEntries>& chunk, int i) {
  if constexpr (std::is_same_v<Entries, Pair>)
    return {chunk[2 * i], chunk[2 * i + 1]};
  else
    return chunk[i];
}

template <typename Real>
__device__ __forceinline__ Real total(Real entry) {
  return entry;
}
__device__ __forceinline__ float total(Pair pair) { return pair.first + pair.second; }

template <typename Real>
__device__ __forceinline__ Real least(Real entry) {
  return entry;
}
__device__ __forceinline__ float least(Pair pair) { return smaller(pair.first, pair.second); }

// ---------------------------------------------------------------------------------------------------------
// Exponentials
// ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Pair fast_exp2(Pair x) { return {fast_exp2(x.first), fast_exp2(x.second)}; }

// 2^x with relative error 2^-22.4 from -126 to 127. What is below counts as -126, what is above or NaN as 127.
__device__ __forceinline__ Pair polynomial_exp2(Pair x) {
  constexpr float kRounder = 0x1.8p23f;  // plus this, a number is an integer, in its last bits
  const auto clamped = [](float x) { return larger(smaller(x, 127.0f), -126.0f); };
  const Pair y = {clamped(x.first), clamped(x.second)};
  const Pair shifted = y + each<Pair>(kRounder), rest = y - (shifted - each<Pair>(kRounder));
  Pair power = each<Pair>(0x1.5baadep-10f);
  for (const float c : {0x1.3cebaap-7f, 0x1.c6b730p-5f, 0x1.ebf9b8p-3f, 0x1.62e42ap-1f, 1.0f})
    power = multiply_add(power, rest, each<Pair>(c));
  const auto scaled = [](float power, float shifted) {
    return bits_to_float(float_to_bits(power) + (float_to_bits(shifted) << 23));
  };
  return {scaled(power.first, shifted.first), scaled(power.second, shifted.second)};
}

// 2^x of the third weights. Of eight pairs, five are polynomials: the special function unit then has as much to do as
// the other units.
template <typename Real>
__device__ __forceinline__ Real balanced_exp2(Real x, int) {
  return fast_exp2(x);
}
__device__ __forceinline__ Pair balanced_exp2(Pair x, int number) {
  return 5 * number % 8 < 5 ? polynomial_exp2(x) : fast_exp2(x);
}

}  // namespace lit_did::cuda
