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
#include <type_traits>

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

// The sums of eight vectors.
template <typename V>
LIT_DID_INLINE void lane_sums(const V (&v)[8], double (&sums)[8]) {
  for (int i = 0; i < 8; ++i) sums[i] = lane_sum(v[i]);
}
#if defined(__AVX512F__)
// All together, in a third of the instructions.
LIT_DID_INLINE void lane_sums(const FloatVector (&v)[8], double (&sums)[8]) {
  __m256 half[8];
  for (int i = 0; i < 8; ++i) {
    half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
  }
  __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
  a = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  _mm512_storeu_pd(sums, _mm512_cvtps_pd(a));
}
#endif

template <typename V>
LIT_DID_INLINE auto lane_minimum(V v) {
  return -lane_maximum(-v);
}

template <typename Mask>
LIT_DID_INLINE bool any(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  auto found = mask[0];
  for (size_t i = 1; i < sizeof(mask) / sizeof(mask[0]); ++i) found |= mask[i];
  return found != 0;
#endif
}

// ---------------------------------------------------------------------------------------------------------
// 2^x for x up to 127; NaN gives NaN, -inf anything. From -126 on the relative error is at most 1.72e-7, 1.95e-7 where
// a step's product is rounded before its sum, 1.78e-7 with AVX-512; below, AVX-512 goes on (2^-126 times 1.8e-7), the
// others return 0. tests/ops/exp2_error.cpp measures it.
// ---------------------------------------------------------------------------------------------------------

// Whether exp2_in_range grows with x up to infinity, above its range too.
template <typename Real>
constexpr bool kSaturates = std::is_same_v<Real, double>;

#if defined(__AVX512F__)

template <>
constexpr bool kSaturates<float> = true;

// 2^(j/32), which two registers hold.
alignas(64) constexpr float kPowers[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
    0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
    0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
    0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f,
    0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};

LIT_DID_INLINE FloatVector exp2(FloatVector x) {
  // x = n + j/32 + f, with f in [0, 1/32): rounded down, j is left in the low bits of the significand.
  const __m512 shifted =
      _mm512_add_round_ps((__m512)x, _mm512_set1_ps(0x1.8p18f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const FloatVector f = (FloatVector)_mm512_reduce_ps((__m512)x, 5 << 4 | _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const FloatVector power =
      (FloatVector)_mm512_permutex2var_ps(_mm512_load_ps(kPowers), (__m512i)shifted, _mm512_load_ps(kPowers + 16));
  // Minimax in relative error among those with 2^0 = 1.
  const FloatVector rest = (f * 0x1.f0f3e6p-3f + 0x1.62e11ep-1f) * f;
  return (FloatVector)_mm512_scalef_ps((__m512)(power * rest + power), (__m512)x);
}

LIT_DID_INLINE FloatVector exp2_in_range(FloatVector x) { return exp2(x); }

#else

LIT_DID_INLINE FloatVector exp2_polynomial(FloatVector f) {
  // Minimax in relative error among those with 2^0 = 1: five fused steps over [-1/2, 1/2].
  FloatVector p = 0x1.5bba14p-10f - FloatVector{};
  p = p * f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  return p * f + 1.0f;
}

// x rounded, as the exponent's bits; the rest's 2^x.
LIT_DID_INLINE void exp2_parts(FloatVector x, IntVector& exponent, FloatVector& rest) {
  const float magic = 0x1.8p23f;  // adding it leaves round(x) in the low bits of the significand
  const FloatVector shifted = x + magic;
  exponent = (IntVector)shifted << 23;
  rest = exp2_polynomial(x - (shifted - magic));
}

LIT_DID_INLINE FloatVector exp2(FloatVector x) {
  IntVector exponent;
  FloatVector rest;
  exp2_parts(x, exponent, rest);
  // The exponent is set by integer arithmetic, which reaches down to 2^-126: what is less is 0.
  const FloatVector power = rest * (FloatVector)(exponent + 0x3f800000);
  return x < -126.0f ? FloatVector{} : power;
}

// 2^x for x from -126 to 127. Others, and NaN, give anything.
LIT_DID_INLINE FloatVector exp2_in_range(FloatVector x) {
  IntVector exponent;
  FloatVector rest;
  exp2_parts(x, exponent, rest);
  return (FloatVector)((IntVector)rest + exponent);
}

#endif

LIT_DID_INLINE DoubleVector exp2(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

LIT_DID_INLINE DoubleVector exp2_in_range(DoubleVector x) { return exp2(x); }

}  // namespace
