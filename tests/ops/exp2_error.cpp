// Prints how far exp2 of csrc/cpu/simd.h is from 2^x, for the instruction set that this is compiled for:
//   normal     largest relative error where the result is a normal number, x from -126 to 127, of exp2_in_range too
//   subnormal  largest error where it is not, x from -160 to -126, in units of 2^-126
//   special    how many of 2^0 = 1, NaN, 0 for what is far below and, where it saturates, infinity are wrong
#include <cstdio>
#include <initializer_list>

#include "../../csrc/cpu/simd.h"

namespace {

constexpr int kLanesNow = kLanes<float>;

// Calls visit(x, exp2(x)), and visit(x, exp2_in_range(x)) where x is in range, for every `step`-th float from -`to` up
// to -`from`, or from `from` to `to` where positive.
template <typename Visit>
void sweep(float from, float to, bool negative, uint32_t step, const Visit& visit) {
  const uint32_t sign = negative ? 0x80000000u : 0u, last = float_to_bits(to);
  for (uint32_t bits = float_to_bits(from); bits <= last; bits += kLanesNow * step) {
    FloatVector x;
    for (int i = 0; i < kLanesNow; ++i) {
      const uint32_t each = bits + i * step;
      x[i] = bits_to_float(sign | (each < last ? each : last));
    }
    const FloatVector y = exp2(x), same = exp2_in_range(x);
    for (int i = 0; i < kLanesNow; ++i) {
      visit(x[i], y[i]);
      if (x[i] >= -126.0f) visit(x[i], same[i]);
    }
  }
}

// The larger, or NaN.
double worse(double a, double b) { return a != a || b <= a ? a : b; }

FloatVector all(float x) { return x - FloatVector{}; }

float one(float x) { return exp2(all(x))[kLanesNow - 1]; }

}  // namespace

int main() {
  // double's 2^x is right to 1e-16, a billionth of what is measured.
  double normal = 0, subnormal = 0;
  const auto relative = [&](float x, float y) { normal = worse(normal, std::fabs(y / std::exp2(double(x)) - 1)); };
  const auto absolute = [&](float x, float y) {
    subnormal = worse(subnormal, std::fabs(y - std::exp2(double(x))) * 0x1p126);
  };
  sweep(0x1p-3f, 1.0f, true, 1, relative);  // every float
  sweep(0x1p-30f, 0x1p-3f, true, 7, relative);
  sweep(1.0f, 126.0f, true, 7, relative);
  sweep(0x1p-30f, 127.0f, false, 7, relative);
  sweep(126.0f, 160.0f, true, 7, absolute);

  int special = one(0.0f) != 1.0f;
  for (const float nan : {bits_to_float(0x7fc00000u), bits_to_float(0xffc00001u)}) special += one(nan) == one(nan);
  for (const float far : {-160.0f, -1e4f, -1e30f}) special += one(far) != 0.0f;
  if (kSaturates<float>)
    for (const float far : {128.0f, 1e3f, 1e6f, 1e30f}) special += !std::isinf(exp2_in_range(all(far))[0]);
  std::printf("%.9g %.9g %d\n", normal, subnormal, special);
}
