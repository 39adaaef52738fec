// Prints how far polynomial_exp2 of csrc/cuda/pairs.cuh is from 2^x: the largest relative error for x from -126 to 127,
// and how many values that are far away, infinite or NaN are wrong.
#include <cmath>
#include <cstdio>
#include <limits>

#include "pairs.cuh"

using namespace lit_did;
using namespace lit_did::cuda;

int main() {
  double error = 0;
  const auto sweep = [&](uint32_t first, float last, uint32_t step) {
    for (uint32_t bits = first; bits <= float_to_bits(last); bits += step) {
      const float x = bits_to_float(bits);
      const Pair y = polynomial_exp2({x, -x}), swapped = polynomial_exp2({-x, x});
      if (y.first != swapped.second || y.second != swapped.first) error = 1;
      const double up = std::fabs(y.first / std::exp2(double(x)) - 1);
      const double down = x > 126 ? 0 : std::fabs(y.second / std::exp2(double(-x)) - 1);
      error = std::fmax(error, std::fmax(up, down));
    }
  };
  sweep(0, 0x1p-4f, 1009);
  sweep(float_to_bits(0x1p-4f), 1.0f, 3);
  sweep(float_to_bits(1.0f), 127.0f, 7);

  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  int wrong = 0;
  for (const float far : {127.5f, 128.0f, 255.0f, 256.0f, 1e3f, 5e6f, 1e9f, 3e38f, infinity, nan})
    wrong += polynomial_exp2({far, 0}).first != 0x1p127f;
  for (const float far : {-126.5f, -127.0f, -256.0f, -1e3f, -5e6f, -1e9f, -3e38f, -infinity})
    wrong += polynomial_exp2({0, far}).second != 0x1p-126f;
  std::printf("%.9g %d\n", error, wrong);
}
