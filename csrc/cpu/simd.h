// Vectors of float and double for one instruction set: the compiler's vector types, and intrinsics for the
// four things it does not do well by itself (rounding, scaling by 2^n, half precision, reductions).
//
// Included once per instruction set by rows_<level>.cpp, each compiled with its own flags; everything lives in
// an anonymous namespace so that no function compiled for one level is ever linked into another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../row_statistics.h"
#include "rows.h"

#if defined(__AVX512F__)
#define LIT_DID_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LIT_DID_VECTOR_BYTES 32
#else
#define LIT_DID_VECTOR_BYTES 16
#endif

namespace {

using namespace lit_did;

typedef float FloatVector __attribute__((vector_size(LIT_DID_VECTOR_BYTES)));
typedef uint32_t UnsignedVector __attribute__((vector_size(LIT_DID_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(LIT_DID_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(LIT_DID_VECTOR_BYTES)));

template <typename Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <typename Real>
using Vector = typename VectorOf<Real>::type;

template <typename Real>
constexpr int kLanes = LIT_DID_VECTOR_BYTES / sizeof(Real);

template <typename V, typename Real>
LIT_DID_INLINE V broadcast(Real value) {
  return value - V{};  // not V{} + value: -0.0 aside the same, and exact for infinities
}

// NaN in `b` is returned, NaN in `a` is dropped: `b` is the new entry, and a NaN entry is met again by 2^x.
template <typename V>
LIT_DID_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
LIT_DID_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}

// ---------------------------------------------------------------------------------------------------------
// Loads and stores
// ---------------------------------------------------------------------------------------------------------

template <typename V, typename T>
LIT_DID_INLINE V load_raw(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

LIT_DID_INLINE FloatVector load(const float* from) { return load_raw<FloatVector>(from); }
LIT_DID_INLINE DoubleVector load(const double* from) { return load_raw<DoubleVector>(from); }
LIT_DID_INLINE void store(float* to, FloatVector v) { std::memcpy(to, &v, sizeof(v)); }
LIT_DID_INLINE void store(double* to, DoubleVector v) { std::memcpy(to, &v, sizeof(v)); }

LIT_DID_INLINE FloatVector load(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (FloatVector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (FloatVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  FloatVector v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

LIT_DID_INLINE FloatVector load(const Float16* from) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  FloatVector v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

LIT_DID_INLINE void store(BFloat16* to, FloatVector v) {
  // Round to nearest, ties to even; NaN stays a quiet NaN.
  UnsignedVector bits = (UnsignedVector)v;
  bits = bits + 0x7fffu + ((bits >> 16) & 1u);
  bits = v == v ? bits : 0x7fc00000u - UnsignedVector{};
  bits >>= 16;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)bits));
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i].bits = static_cast<uint16_t>(bits[i]);
#endif
}

LIT_DID_INLINE void store(Float16* to, FloatVector v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i] = to_float16(v[i]);
#endif
}

// ---------------------------------------------------------------------------------------------------------
// Reductions over lanes, in one fixed order
// ---------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
LIT_DID_INLINE float lane_sum(FloatVector v) { return _mm512_reduce_add_ps((__m512)v); }
LIT_DID_INLINE float lane_maximum(FloatVector v) { return _mm512_reduce_max_ps((__m512)v); }
#else
LIT_DID_INLINE float lane_sum(FloatVector v) {
  float half[kLanes<float>];
  std::memcpy(half, &v, sizeof(v));
  for (int n = kLanes<float> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) half[i] += half[i + n];
  return half[0];
}
LIT_DID_INLINE float lane_maximum(FloatVector v) {
  float result = v[0];
  for (int i = 1; i < kLanes<float>; ++i) result = result > v[i] ? result : v[i];
  return result;
}
#endif

LIT_DID_INLINE double lane_sum(DoubleVector v) {
  double result = v[0];
  for (int i = 1; i < kLanes<double>; ++i) result += v[i];
  return result;
}
LIT_DID_INLINE double lane_maximum(DoubleVector v) {
  double result = v[0];
  for (int i = 1; i < kLanes<double>; ++i) result = result > v[i] ? result : v[i];
  return result;
}

template <typename V>
LIT_DID_INLINE auto lane_minimum(V v) {
  return -lane_maximum(-v);
}

// ---------------------------------------------------------------------------------------------------------
// 2^x for x <= 0 (rounding may leave it a little above). NaN gives NaN.
// ---------------------------------------------------------------------------------------------------------

LIT_DID_INLINE FloatVector exp2_polynomial(FloatVector f) {
  // Minimax in relative error among those with 2^0 = 1: five fused steps, 1.7e-7 at most over [-1/2, 1/2].
  FloatVector p = 0x1.5bba14p-10f - FloatVector{};
  p = p * f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  return p * f + 1.0f;
}

LIT_DID_INLINE FloatVector exp2(FloatVector x) {
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (FloatVector)_mm512_scalef_ps((__m512)exp2_polynomial(x - (FloatVector)n), n);
#else
  // The exponent is set by integer arithmetic, which reaches down to 2^-126: what is less is 0.
  const float magic = 0x1.8p23f;  // adding it leaves round(x) in the low bits of the significand
  const FloatVector shifted = x + magic;
  const FloatVector p = exp2_polynomial(x - (shifted - magic));
  const FloatVector power = p * (FloatVector)(((IntVector)shifted << 23) + 0x3f800000);
  return x < -126.0f ? FloatVector{} : power;
#endif
}

LIT_DID_INLINE DoubleVector exp2(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

}  // namespace
