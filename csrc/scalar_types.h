// The dtypes of logits, and conversions between half precision and float in integer arithmetic, shared by every device.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_statistics.h"

namespace lit_did {

enum class ScalarKind : int { kFloat = 0, kBFloat16 = 1, kFloat16 = 2, kDouble = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LIT_DID_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

LIT_DID_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

LIT_DID_INLINE double bits_to_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

LIT_DID_INLINE uint64_t double_to_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

LIT_DID_INLINE float to_float(float value) { return value; }
LIT_DID_INLINE double to_float(double value) { return value; }
LIT_DID_INLINE float to_float(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

LIT_DID_INLINE float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | (magnitude + 0x70000000u));  // inf, NaN
  // Scaling by 2^112 moves the exponent's bias and normalises subnormals exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}

// Round to nearest, ties to even.
LIT_DID_INLINE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {0x7fc0u};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

LIT_DID_INLINE Float16 to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

LIT_DID_INLINE void from_real(float value, float& to) { to = value; }
LIT_DID_INLINE void from_real(double value, double& to) { to = value; }
LIT_DID_INLINE void from_real(float value, BFloat16& to) { to = to_bfloat16(value); }
LIT_DID_INLINE void from_real(float value, Float16& to) { to = to_float16(value); }

}  // namespace lit_did
