// Entries of a row of logits, a chunk at a time: 16-byte loads and stores wherever the chunk lies wholly inside the
// row, entry by entry at its head and tail.
//
// Chunks are counted by position in the row, never by address, so that which thread adds which entry, and with it every
// bit of the result, does not depend on where the row lies. A row that does not begin on a 16-byte boundary is read in
// aligned words too: the one before and the one after are shifted together.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace lit_did::cuda {

template <typename T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

// What the kernels make of the temperature, worked out once on the host.
template <typename Real>
struct Scaling {
  Real scale;       // logits * scale are in base 2: log2(e) / temperature
  Real limit;       // beyond it a logit counts as infinite
  Real half_limit;  // below its negative, or where an origin is near the limit, each logit is compared with the limit

  explicit Scaling(double temperature)
      : scale(Real(kLog2e / temperature)), limit(Real(kLargestLogit * temperature)), half_limit(limit / 2) {}
};

// Entries that a thread takes at a time: 16 bytes of the narrower side.
template <typename P, typename R>
constexpr int kChunk = 16 / (sizeof(P) < sizeof(R) ? sizeof(P) : sizeof(R));

template <typename T>
__device__ __forceinline__ T* row_of(const Logits& logits, int64_t row) {
  int64_t offset = 0;
  if (logits.layout.dims > 1) [[unlikely]] {
#pragma unroll 1
    for (int i = logits.layout.dims - 1; i > 0; --i) {
      offset += row % logits.layout.sizes[i] * logits.layout.strides[i];
      row /= logits.layout.sizes[i];
    }
  }
  if (logits.layout.dims > 0) offset += row * logits.layout.strides[0];
  return static_cast<T*>(logits.data) + offset;
}

// ---------------------------------------------------------------------------------------------------------
// One entry among the 32-bit words of a chunk
// ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return to_float(Float16{bits});
#endif
}

// Two floats rounded to nearest even, the first in the lower half.
__device__ __forceinline__ uint32_t pack(float low, float high, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return to_bfloat16(low).bits | uint32_t(to_bfloat16(high).bits) << 16;
#endif
}

__device__ __forceinline__ uint32_t pack(float low, float high, Float16) {
#if defined(__CUDA_ARCH__)
  uint16_t l, h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
  return l | uint32_t(h) << 16;
#else
  return to_float16(low).bits | uint32_t(to_float16(high).bits) << 16;
#endif
}

// kEntries entries of T as they lie in memory.
template <typename T, int kEntries>
struct Chunk {
  static constexpr int kWords = kEntries * int(sizeof(T)) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ typename RealOf<T>::type operator[](int i) const {
    if constexpr (sizeof(T) == 8) {
      return bits_to_double(words[2 * i] | uint64_t(words[2 * i + 1]) << 32);
    } else if constexpr (sizeof(T) == 4) {
      return bits_to_float(words[i]);
    } else {
      const uint32_t word = words[i / 2];
      if constexpr (std::is_same_v<T, BFloat16>) {
        return bits_to_float(i % 2 ? word & 0xffff0000u : word << 16);
      } else {
        return half_to_float(static_cast<uint16_t>(i % 2 ? word >> 16 : word));
      }
    }
  }

  template <typename Real>
  __device__ __forceinline__ static Chunk of(const Real (&values)[kEntries]) {
    Chunk chunk;
    if constexpr (sizeof(T) == 8) {
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        const uint64_t bits = double_to_bits(values[i]);
        chunk.words[2 * i] = static_cast<uint32_t>(bits);
        chunk.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
      }
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kEntries; ++i) chunk.words[i] = float_to_bits(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kEntries / 2; ++i) chunk.words[i] = pack(values[2 * i], values[2 * i + 1], T{});
    }
    return chunk;
  }
};

// ---------------------------------------------------------------------------------------------------------
// Loads and stores
// ---------------------------------------------------------------------------------------------------------

// kReadOnly: nothing writes the row while the kernel runs, so that the read-only cache may hold it.
template <bool kReadOnly>
__device__ __forceinline__ uint4 load_16_bytes(const void* from) {
  const uint4* words = reinterpret_cast<const uint4*>(from);
  if constexpr (kReadOnly) return __ldg(words);
  return *words;
}

__device__ __forceinline__ uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, bits);
#else
  return static_cast<uint32_t>((low | uint64_t(high) << 32) >> bits);
#endif
}

template <typename T>
__device__ __forceinline__ int bytes_past_boundary(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16);
}

// The bits of T's -inf: an entry outside the support, which stands where the row has none.
template <typename T>
__device__ __forceinline__ uint64_t bits_outside() {
  return sizeof(T) == 8                ? 0xfff0000000000000u
         : sizeof(T) == 4              ? 0xff800000u
         : std::is_same_v<T, BFloat16> ? 0xff80u
                                       : 0xfc00u;
}

template <typename T>
struct BitsOf;
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<BFloat16> {
  using type = uint16_t;
};
template <>
struct BitsOf<Float16> {
  using type = uint16_t;
};

// The chunk whose first entry is `begin`; entries before 0 or from `size` on read as -inf.
template <typename T, int kEntries>
__device__ __forceinline__ Chunk<T, kEntries> load_entries(const T* row, int begin, int size) {
  using Bits = typename BitsOf<T>::type;
  Chunk<T, kEntries> chunk;
  const auto bits_at = [&](int i) -> uint64_t {
    const int index = begin + i;
    return index >= 0 && index < size ? uint64_t(reinterpret_cast<const Bits*>(row)[index]) : bits_outside<T>();
  };
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const uint64_t bits = bits_at(i);
      chunk.words[2 * i] = static_cast<uint32_t>(bits);
      chunk.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) chunk.words[i] = static_cast<uint32_t>(bits_at(i));
  } else {
#pragma unroll
    for (int i = 0; i < kEntries / 2; ++i)
      chunk.words[i] = static_cast<uint32_t>(bits_at(2 * i) | bits_at(2 * i + 1) << 16);
  }
  return chunk;
}

// The same for a chunk inside the row. kAligned: it begins on a 16-byte boundary. Otherwise `past` bytes after one,
// 0 < past < 16, and the words around it lie inside the row too.
template <typename T, int kEntries, bool kAligned, bool kReadOnly>
__device__ __forceinline__ Chunk<T, kEntries> load_wide(const T* entries, int past) {
  using C = Chunk<T, kEntries>;
  C chunk;
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < C::kWords / 4; ++i) {
      const uint4 v = load_16_bytes<kReadOnly>(reinterpret_cast<const uint4*>(entries) + i);
      chunk.words[4 * i] = v.x, chunk.words[4 * i + 1] = v.y, chunk.words[4 * i + 2] = v.z,
                      chunk.words[4 * i + 3] = v.w;
    }
  } else {
    const uint4* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(entries) - past);
    uint32_t words[C::kWords + 4];
#pragma unroll
    for (int i = 0; i < C::kWords / 4 + 1; ++i) {
      const uint4 v = load_16_bytes<kReadOnly>(aligned + i);
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
    // Whole words first, two and one, then what is left of a word: indices must be constants to stay in registers.
    if (past & 8) {
#pragma unroll
      for (int i = 0; i < C::kWords + 2; ++i) words[i] = words[i + 2];
    }
    if constexpr (sizeof(T) <= 4) {
      if (past & 4) {
#pragma unroll
        for (int i = 0; i < C::kWords + 1; ++i) words[i] = words[i + 1];
      }
    }
#pragma unroll
    for (int i = 0; i < C::kWords; ++i)
      chunk.words[i] = sizeof(T) == 2 ? funnel_shift(words[i], words[i + 1], 8 * (past & 2)) : words[i];
  }
  return chunk;
}

// The chunk whose first entry is `begin` of `size` entries at `row`, in wide loads where every byte that they touch is
// among those entries. The chunk's address is `past` bytes after a 16-byte boundary. kAligned: `past` is 0.
template <typename T, int kEntries, bool kAligned, bool kReadOnly>
__device__ __forceinline__ Chunk<T, kEntries> load_chunk(const T* row, int begin, int size, int past) {
  if constexpr (!kAligned) {
    constexpr int kAround = 16 / int(sizeof(T));  // entries, at most, that the words reach beyond the chunk
    if (past != 0) [[unlikely]] {
      if (begin >= kAround && begin + kEntries + kAround <= size)
        return load_wide<T, kEntries, false, kReadOnly>(row + begin, past);
      return load_entries<T, kEntries>(row, begin, size);
    }
  }
  if (begin < 0 || begin + kEntries > size) [[unlikely]] {
    return load_entries<T, kEntries>(row, begin, size);
  }
  return load_wide<T, kEntries, true, kReadOnly>(row + begin, 0);
}

template <typename T>
__device__ __forceinline__ typename RealOf<T>::type load_entry(const T* entry) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return bits_to_float(uint32_t(entry->bits) << 16);
  else if constexpr (std::is_same_v<T, Float16>)
    return half_to_float(entry->bits);
  else
    return *entry;
}

template <typename T, int kEntries>
__device__ __forceinline__ void store_chunk(T* row, int begin, int size, const Chunk<T, kEntries>& chunk) {
  using C = Chunk<T, kEntries>;
  using Bits = typename BitsOf<T>::type;
  T* to = row + begin;
  if (begin < 0 || begin + kEntries > size || bytes_past_boundary(to) != 0) [[unlikely]] {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      uint64_t bits;
      if constexpr (sizeof(T) == 8)
        bits = chunk.words[2 * i] | uint64_t(chunk.words[2 * i + 1]) << 32;
      else if constexpr (sizeof(T) == 4)
        bits = chunk.words[i];
      else
        bits = chunk.words[i / 2] >> 16 * (i % 2);
      if (begin + i >= 0 && begin + i < size) reinterpret_cast<Bits*>(row)[begin + i] = static_cast<Bits>(bits);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < C::kWords / 4; ++i) {
    uint4 v;
    v.x = chunk.words[4 * i], v.y = chunk.words[4 * i + 1], v.z = chunk.words[4 * i + 2], v.w = chunk.words[4 * i + 3];
    reinterpret_cast<uint4*>(to)[i] = v;
  }
}

// ---------------------------------------------------------------------------------------------------------
// From dtypes at run time to types
// ---------------------------------------------------------------------------------------------------------

template <typename Function>
cudaError_t with_type(ScalarKind kind, Function function) {
  switch (kind) {
    case ScalarKind::kFloat:
      return function(float{});
    case ScalarKind::kBFloat16:
      return function(BFloat16{});
    case ScalarKind::kFloat16:
      return function(Float16{});
    default:
      return function(double{});
  }
}

// float64 goes with float64 alone.
template <typename Function>
cudaError_t with_types(ScalarKind policy, ScalarKind reference, Function function) {
  if ((policy == ScalarKind::kDouble) != (reference == ScalarKind::kDouble)) return cudaErrorInvalidValue;
  return with_type(policy, [&](auto p) {
    using P = decltype(p);  // g++ takes decltype(p) of the inner lambda's capture for a reference
    return with_type(reference, [&](auto r) {
      if constexpr (std::is_same_v<P, double> == std::is_same_v<decltype(r), double>)
        return function(p, r);
      else
        return cudaErrorInvalidValue;
    });
  });
}

}  // namespace lit_did::cuda
