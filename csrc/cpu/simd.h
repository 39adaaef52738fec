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

// One of the two, either where one is NaN.
template <typename V>
LIT_DID_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
LIT_DID_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}

#if defined(__AVX512F__)
// Where a comparison's operand is the result of integer arithmetic, GCC no longer sees a maximum in the above.
LIT_DID_INLINE FloatVector maximum(FloatVector a, FloatVector b) { return _mm512_max_ps(a, b); }
LIT_DID_INLINE FloatVector minimum(FloatVector a, FloatVector b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
LIT_DID_INLINE FloatVector maximum(FloatVector a, FloatVector b) { return _mm256_max_ps(a, b); }
LIT_DID_INLINE FloatVector minimum(FloatVector a, FloatVector b) { return _mm256_min_ps(a, b); }
#endif

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

// bfloat16 in the upper half of each lane: rounded to nearest, ties to even; NaN stays a quiet NaN. The lower half
// is left over.
LIT_DID_INLINE UnsignedVector round_to_bfloat16(FloatVector v) {
  UnsignedVector bits = (UnsignedVector)v;
  bits = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? bits : 0x7fc00000u - UnsignedVector{};
}

LIT_DID_INLINE void store(BFloat16* to, FloatVector v) {
  const UnsignedVector bits = round_to_bfloat16(v) >> 16;
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

// Asks for the next `kBytes` of a row a page ahead: hardware follows one row at a time only to the end of a page, too
// late for two rows read together. May reach beyond the row, where it does nothing.
template <int64_t kBytes, typename T>
LIT_DID_INLINE void prefetch(const T* from) {
  for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(from) + 4096 + i);
}

// Two vectors at a time. `kInterleaved`, for rows of bfloat16 alone: the entries at even positions, then those at odd
// positions, which takes one instruction a vector instead of widening; elsewhere one vector of entries in their order,
// then the next.
template <bool kInterleaved, typename V, typename T>
LIT_DID_INLINE void load_pair(const T* from, V& first, V& second) {
  if constexpr (kInterleaved) {
    const UnsignedVector bits = load_raw<UnsignedVector>(from);
    first = (V)(bits << 16);
    second = (V)(bits & 0xffff0000u);
  } else {
    first = load(from);
    second = load(from + sizeof(V) / sizeof(first[0]));
  }
}

// Past the caches, for results that are larger than these: the memory is written without being read first.
template <typename V, typename T>
LIT_DID_INLINE void store_past_caches(T* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(v[0])) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(v[0])) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#endif
  store(to, v);
}

// What store_past_caches wrote is visible to other threads only after this.
LIT_DID_INLINE void finish_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// `past_caches` needs `to` to be a multiple of a vector's size.
template <bool kInterleaved, typename V, typename T>
LIT_DID_INLINE void store_pair(T* to, V first, V second, bool past_caches) {
  constexpr int64_t lanes = sizeof(V) / sizeof(first[0]);
  if constexpr (kInterleaved) {
    const UnsignedVector bits = (round_to_bfloat16(first) >> 16) | (round_to_bfloat16(second) & 0xffff0000u);
    std::memcpy(to, &bits, sizeof(bits));
  } else if (past_caches) {
    store_past_caches(to, first);
    store_past_caches(to + lanes, second);
  } else {
    store(to, first);
    store(to + lanes, second);
  }
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

template <typename Mask>
LIT_DID_INLINE bool any(Mask mask) {
  for (size_t i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i)
    if (mask[i]) return true;
  return false;
}

// ---------------------------------------------------------------------------------------------------------
// 2^x for x up to 4; NaN gives NaN, -inf anything. From -126 on the relative error is at most 1.72e-7, 1.95e-7 where a
// step's product is rounded before its sum; below, AVX-512 goes on (2^-126 times 1.8e-7), the others return 0.
// tests/ops/exp2_error.cpp measures it.
// ---------------------------------------------------------------------------------------------------------

LIT_DID_INLINE FloatVector exp2_polynomial(FloatVector f) {
  // Minimax in relative error among those with 2^0 = 1: five fused steps over [-1/2, 1/2].
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
