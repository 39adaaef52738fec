// The little of CUDA that the kernels use, in one place: tests define LIT_DID_CUDA_EMULATION and compile the same
// kernels for the host, where emulation.h stands in for the CUDA runtime.
#pragma once

#include <cmath>
#include <cstdint>

#include "../scalar_types.h"

#if defined(LIT_DID_CUDA_EMULATION)
#include "emulation.h"
#define LIT_DID_LAUNCH(kernel, grid, threads, stream, ...) \
  lit_did::emulation::launch(grid, threads, [=] { kernel(__VA_ARGS__); })
#else
#include <cuda_runtime.h>
#define LIT_DID_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace lit_did::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// 2^x with relative error 2^-22: one instruction. Results below 2^-126 are 0.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif defined(LIT_DID_CUDA_EMULATION)
  return emulation::ex2_approx(x);
#else
  return std::exp2(x);
#endif
}
__device__ __forceinline__ double fast_exp2(double x) { return std::exp2(x); }

// a * b + c, rounded once: near an origin the exponents' digits hang on it, so it is not left to the compiler's flags.
template <typename Real>
__device__ __forceinline__ Real multiply_add(Real a, Real b, Real c) {
  return std::fma(a, b, c);
}

template <typename Real>
__device__ __forceinline__ Real larger(Real a, Real b) {
  return fmax(a, b);
}
template <typename Real>
__device__ __forceinline__ Real smaller(Real a, Real b) {
  return fmin(a, b);
}

__device__ __forceinline__ int smaller_of(int a, int b) { return a < b ? a : b; }

// The sum over the warp's lanes, the same bits in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

// The sums of eight values over the warp's lanes: lanes 4 i to 4 i + 3 have that of values[i]. Each step adds half the
// values of half the lanes: nine shuffles, where eight times `warp_sum` takes forty.
template <typename T>
__device__ __forceinline__ T warp_sums(T (&values)[8]) {
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = kWarp / 2; step >= 4; step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < step / 4; ++i) {
      const T kept = upper ? values[i + step / 4] : values[i], given = upper ? values[i] : values[i + step / 4];
      values[i] = kept + __shfl_xor_sync(kWholeWarp, given, step);
    }
  }
  T sum = values[0];
#pragma unroll
  for (int step = 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

template <typename T>
__device__ __forceinline__ T warp_maximum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = larger(value, __shfl_xor_sync(kWholeWarp, value, step));
  return value;
}

__device__ __forceinline__ int warp_or(int value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value |= __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

}  // namespace lit_did::cuda
