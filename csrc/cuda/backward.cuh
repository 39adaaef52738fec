// The backward: the gradient of a function of the nine statistics, in the logits of either side or both.
//
// Computes   what row_statistics.h says below GradientCoefficients, entry by entry.
// Reads      the rows once (of the log-probabilities' gradient alone: one side's row for that side's gradient).
// Writes     the gradient once, where the logits lie if the caller gave them up; 0 for a row whose label is ignored.
// Softcaps   A row with a softcap takes the careful path, as one with infinities does.
// Threads    one block a stretch of a row, a chunk a thread at a time; chunks begin where the gradient's memory lies on
//            a 16-byte boundary. No entry depends on another, so neither do the bits on any of this. The first chunks
//            are on their way while a thread of each of three warps works out a part of the row's coefficients.
#pragma once

#include "entries.cuh"

namespace lit_did::cuda {

constexpr int kBackwardThreads = 256;
// Blocks that the registers of a multiprocessor hold.
template <typename Real>
constexpr int kBackwardBlocks = sizeof(Real) == 4 ? 3 : 2;
template <typename Real>
constexpr int kLogprobBackwardBlocks = sizeof(Real) == 4 ? 4 : 2;
// Entries that a block takes: enough to pay for the coefficients, for which most of its threads wait.
constexpr int kBackwardStretch = kEntriesABlock;

// And the reciprocals of the softcaps, 0 for none. Kernel parameters, because operands from there take no register.
template <typename Real>
struct GradientScaling : Scaling<Real> {
  Real policy_inverse_softcap, reference_inverse_softcap;

  explicit GradientScaling(const BackwardArguments& a)
      : Scaling<Real>(a.problem.temperature),
        policy_inverse_softcap(Real(a.policy_inverse_softcap)),
        reference_inverse_softcap(Real(a.reference_inverse_softcap)) {}
};

// A side's row in one block's stretch: `size` entries from here, chunks counted from the first.
template <typename T>
struct Stretch {
  const T* logits;
  T* grad;              // null where this side needs none
  int logits_past;      // bytes of a chunk's address past a 16-byte boundary
  bool entry_by_entry;  // the words around a chunk may be written meanwhile
};

// Where chunks begin relative to the stretch's first entry, so that those of `grad` lie on 16-byte boundaries:
// -kEntries < offset <= 0. A stretch is a whole number of chunks long, so that this holds for every stretch of the row.
template <typename T, int kEntries>
__device__ __forceinline__ int chunk_offset(const T* grad) {
  const int past = bytes_past_boundary(grad) / static_cast<int>(sizeof(T));
  // Where an entry is wider than the other side's, a chunk is several times 16 bytes: any of them will do.
  return -(past % kEntries);
}

template <typename T>
__device__ __forceinline__ Stretch<T> stretch_of(const Logits& logits, const Logits& grad, int64_t row, int64_t begin,
                                                 int offset) {
  Stretch<T> s;
  s.logits = row_of<const T>(logits, row) + begin;
  s.grad = grad.data ? row_of<T>(grad, row) + begin : nullptr;
  s.logits_past = bytes_past_boundary(s.logits + offset);
  s.entry_by_entry = grad.data == logits.data;
  return s;
}

template <typename T, int kEntries>
__device__ __forceinline__ Chunk<T, kEntries> load_chunk(const Stretch<T>& s, int begin, int size) {
  if (s.logits_past != 0 && s.entry_by_entry) [[unlikely]] {
    return load_entries<T, kEntries>(s.logits, begin, size);
  }
  return load_chunk<T, kEntries, false, false>(s.logits, begin, size, s.logits_past);
}

// The chunks that a thread loads at a time: one after another, kBackwardThreads chunks apart.
template <typename T, int kEntries, int kUnroll>
struct Chunks {
  static constexpr int kStep = kBackwardThreads * kEntries;
  Chunk<T, kEntries> chunks[kUnroll];

  __device__ __forceinline__ const Chunk<T, kEntries>& operator[](int u) const { return chunks[u]; }

  __device__ __forceinline__ void load(const Stretch<T>& s, int first, int size) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) chunks[u] = load_chunk<T, kEntries>(s, first + u * kStep, size);
  }
};

template <typename Real, bool kCareful, typename P, typename R, int kEntries>
__device__ __forceinline__ void chunk_gradient(const Chunk<P, kEntries>& policy, const Chunk<R, kEntries>& reference,
                                               const GradientCoefficients<Real>& c, const GradientScaling<Real>& by,
                                               Real (&grad_policy)[kEntries], Real (&grad_reference)[kEntries]) {
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    Real z = policy[i], r = reference[i];
    bool z_inside = true, r_inside = true;
    if constexpr (kCareful) {
      z = effective_logit<Real>(z, by.limit);
      r = effective_logit<Real>(r, by.limit);
      z_inside = z != minus_infinity<Real>();
      r_inside = r != minus_infinity<Real>();
    }
    const bool d_inside = z_inside && r_inside;
    const Real d = z - r;
    const Real log_pi = z_inside ? multiply_add(z, by.scale, -c.policy_origin) : Real(0);
    const Real log_rho = r_inside ? multiply_add(r, by.scale, -c.reference_origin) : Real(0);
    const Real log_q = d_inside ? multiply_add(d, by.scale, -c.difference_origin) : Real(0);
    const Real x = d_inside ? multiply_add(d, by.scale, -c.log_ratio_origin) : Real(0);
    const Real pi = z_inside ? fast_exp2(log_pi) : Real(0);
    const Real rho = r_inside ? fast_exp2(log_rho) : Real(0);
    const Real q = d_inside ? fast_exp2(log_q) : Real(0);
    const Real from_q = q * (c.q_0 + c.q_1 * log_q);
    grad_policy[i] = pi * (c.pi_0 + c.pi_1 * log_pi + c.pi_x * x) + from_q + c.rho_for_policy * rho;
    grad_reference[i] = rho * (c.rho_0 + c.rho_1 * log_rho - c.rho_x * x) - from_q + c.pi_for_reference * pi;
    if constexpr (kCareful) {
      grad_policy[i] *= softcap_slope(z_inside ? z : Real(0), by.policy_inverse_softcap);
      grad_reference[i] *= softcap_slope(r_inside ? r : Real(0), by.reference_inverse_softcap);
    }
  }
}

template <typename Real, int kEntries>
__device__ __forceinline__ void add_at_label(Real (&grad)[kEntries], int label, Real value) {
#pragma unroll
  for (int i = 0; i < kEntries; ++i)
    if (i == label) grad[i] += value;
}

// What a label's log-probability adds to the gradient at the label, whose logit is not overwritten yet.
template <bool kCareful, typename Real, typename T>
__device__ __forceinline__ Real label_term(const Stretch<T>& side, int label, Real value, Real inverse_softcap) {
  if (!kCareful || inverse_softcap == 0) return value;  // without a softcap, the logit may be infinite
  return value * softcap_slope(load_entry(side.logits + label), inverse_softcap);
}

// `z` and `r` hold what the thread has at `first`.
template <typename Real, bool kCareful, typename P, typename R, int kEntries, int kUnroll>
__device__ __forceinline__ void stretch_gradient(const Stretch<P>& policy, const Stretch<R>& reference,
                                                 Chunks<P, kEntries, kUnroll>& z, Chunks<R, kEntries, kUnroll>& r,
                                                 int first, int size, int label, const GradientCoefficients<Real>& c,
                                                 const GradientScaling<Real>& by) {
  constexpr int kStep = kBackwardThreads * kEntries;
#pragma unroll 1
  while (first < size) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = first + u * kStep;
      if (at >= size) break;
      Real grad_policy[kEntries], grad_reference[kEntries];
      chunk_gradient<Real, kCareful>(z[u], r[u], c, by, grad_policy, grad_reference);
      if (label >= at && label < at + kEntries) [[unlikely]] {
        add_at_label(grad_policy, label - at,
                     label_term<kCareful>(policy, label, c.policy_label, by.policy_inverse_softcap));
        add_at_label(grad_reference, label - at,
                     label_term<kCareful>(reference, label, c.reference_label, by.reference_inverse_softcap));
      }
      if (policy.grad) store_chunk(policy.grad, at, size, Chunk<P, kEntries>::of(grad_policy));
      if (reference.grad) store_chunk(reference.grad, at, size, Chunk<R, kEntries>::of(grad_reference));
    }
    first += kUnroll * kStep;
    if (first >= size) break;
    z.load(policy, first, size);
    r.load(reference, first, size);
  }
}

// Entries [0, size) of a gradient that is the same everywhere.
template <typename T, typename Real>
__device__ __forceinline__ void fill(T* grad, int offset, int size, Real value) {
  constexpr int kEntries = 16 / static_cast<int>(sizeof(T));
  Real values[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) values[i] = value;
  const auto chunk = Chunk<T, kEntries>::of(values);
  for (int at = offset + static_cast<int>(threadIdx.x) * kEntries; at < size; at += kBackwardThreads * kEntries)
    store_chunk(grad, at, size, chunk);
}

template <typename Real>
struct RowCoefficients : GradientCoefficients<Real> {
  bool invalid;  // the row's gradient is NaN
};

// The coefficients of a row. The first warp loads what they need, a lane a number. Then one thread of each of three
// warps works out a part. kLogprobsOnly: of the log-probabilities, whose gradients alone are given.
template <typename Real, bool kLogprobsOnly>
__device__ __forceinline__ const RowCoefficients<Real>& coefficients_of(const BackwardArguments& a, int64_t row,
                                                                        double inverse_temperature) {
  constexpr int kGrads = kLogprobsOnly ? 2 : kNumStatistics, kValues = kLogprobsOnly ? 1 : kNumStatistics;
  __shared__ Real grads[kNumStatistics], values[kNumStatistics];
  __shared__ RowNormalizers normalizers;
  __shared__ RowCoefficients<Real> shared;
  const int i = static_cast<int>(threadIdx.x);
  if (i < kGrads) grads[i] = a.grads[i] ? static_cast<const Real*>(a.grads[i])[row] : Real(0);
  if (i < kValues) values[i] = static_cast<const Real*>(a.statistics[i])[row];
  if (i < kNumNormalizers)
    reinterpret_cast<double*>(&normalizers)[i] = reinterpret_cast<const double*>(a.normalizers + row)[i];
  __syncthreads();
  if (i % kWarp == 0 && i < 3 * kWarp) {
    const auto statistics = [](const Real* from, int given) {
      const auto at = [&](int i) { return i < given ? from[i] : Real(0); };
      return TokenStatistics<Real>{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
    };
    const CoefficientParts<Real> parts(statistics(grads, kGrads), statistics(values, kLogprobsOnly ? 0 : kValues),
                                       normalizers, inverse_temperature);
    if (i == 0) {
      parts.policy(shared);
      // A label out of range made the log-probabilities NaN: so is their gradient. Not by the label itself: where the
      // logits are a slice of the vocabulary, it may lie in another.
      const bool label_counts = a.grads[0] || a.grads[1];
      shared.invalid = normalizers.policy != normalizers.policy || (label_counts && values[0] != values[0]);
    } else if (i == kWarp) {
      parts.reference(shared);
    } else {
      parts.difference(shared);
      shared.careful = shared.careful || a.policy_inverse_softcap != 0 || a.reference_inverse_softcap != 0;
    }
  }
  __syncthreads();
  return shared;
}

// The stretch of a row that a block works on.
struct Task {
  int64_t row, begin;
  int size;      // entries
  int label;     // counted from `begin`; may lie outside
  bool ignored;  // the gradient is 0, and the logits may not be read
};

__device__ __forceinline__ Task task_of(const BackwardArguments& a, int stretches) {
  Task t;
  t.row = blockIdx.x / stretches;
  t.begin = int64_t(blockIdx.x % stretches) * kBackwardStretch;
  const int64_t rest = a.problem.vocabulary - t.begin, label = a.problem.labels[t.row];
  t.size = rest < kBackwardStretch ? static_cast<int>(rest) : kBackwardStretch;
  const int64_t first = a.problem.first_entry + t.begin;
  t.label = label >= first && label < first + t.size ? static_cast<int>(label - first) : -kBackwardStretch;
  t.ignored = label == a.problem.ignore_index;
  return t;
}

template <typename Real, typename P, typename R>
__device__ __forceinline__ void fill_both(const Stretch<P>& policy, const Stretch<R>& reference, int size, Real value) {
  if (policy.grad) fill(policy.grad, chunk_offset<P, 16 / sizeof(P)>(policy.grad), size, value);
  if (reference.grad) fill(reference.grad, chunk_offset<R, 16 / sizeof(R)>(reference.grad), size, value);
}

// The gradient of all statistics, in one side's logits or both's. One block a stretch: row * stretches + stretch.
template <typename P, typename R>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<typename RealOf<P>::type>)
    backward_kernel(const BackwardArguments a, const GradientScaling<typename RealOf<P>::type> by,
                    double inverse_temperature, int stretches) {
  using Real = typename RealOf<P>::type;
  constexpr int kEntries = kChunk<P, R>;
  constexpr int kUnroll = sizeof(P) == sizeof(R) ? 2 : 1;  // a wider side takes two loads a chunk already
  const Task t = task_of(a, stretches);
  const int offset = a.grad_policy.data ? chunk_offset<P, kEntries>(row_of<P>(a.grad_policy, t.row) + t.begin)
                                        : chunk_offset<R, kEntries>(row_of<R>(a.grad_reference, t.row) + t.begin);
  const auto policy = stretch_of<P>(a.problem.policy, a.grad_policy, t.row, t.begin, offset);
  const auto reference = stretch_of<R>(a.problem.reference, a.grad_reference, t.row, t.begin, offset);
  if (t.ignored) [[unlikely]] {
    fill_both(policy, reference, t.size, Real(0));
    return;
  }
  const int first = offset + static_cast<int>(threadIdx.x) * kEntries;
  Chunks<P, kEntries, kUnroll> z;
  Chunks<R, kEntries, kUnroll> r;
  z.load(policy, first, t.size);
  r.load(reference, first, t.size);
  const RowCoefficients<Real>& c = coefficients_of<Real, false>(a, t.row, inverse_temperature);
  if (c.invalid) [[unlikely]] {
    fill_both(policy, reference, t.size, std::numeric_limits<Real>::quiet_NaN());
    return;
  }
  if (c.careful) [[unlikely]] {  // a chunk at a time, for want of registers
    Chunks<P, kEntries, 1> one_z;
    Chunks<R, kEntries, 1> one_r;
    one_z.load(policy, first, t.size);
    one_r.load(reference, first, t.size);
    stretch_gradient<Real, true>(policy, reference, one_z, one_r, first, t.size, t.label, c, by);
  } else {
    stretch_gradient<Real, false>(policy, reference, z, r, first, t.size, t.label, c, by);
  }
}

// coefficient * 2^(scale z - normalizer), and `at_label` besides at the label. kCareful: the row holds infinities, or
// has a softcap. `chunks` holds what the thread has at `first`.
template <typename Real, bool kCareful, typename T, int kEntries, int kUnroll>
__device__ __forceinline__ void logprob_gradient(const Stretch<T>& side, Chunks<T, kEntries, kUnroll>& chunks,
                                                 int first, int size, int label, Real normalizer, Real coefficient,
                                                 Real at_label, Real inverse_softcap, const GradientScaling<Real>& by) {
  constexpr int kStep = kBackwardThreads * kEntries;
#pragma unroll 1
  while (first < size) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = first + u * kStep;
      if (at >= size) break;
      Real values[kEntries];
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        const Real z = kCareful ? effective_logit<Real>(chunks[u][i], by.limit) : chunks[u][i];
        const bool outside = kCareful && z == minus_infinity<Real>();
        values[i] = outside ? Real(0) : coefficient * fast_exp2(multiply_add(z, by.scale, -normalizer));
        if constexpr (kCareful) values[i] *= softcap_slope(outside ? Real(0) : z, inverse_softcap);
      }
      if (label >= at && label < at + kEntries) [[unlikely]] {
        add_at_label(values, label - at, label_term<kCareful>(side, label, at_label, inverse_softcap));
      }
      store_chunk(side.grad, at, size, Chunk<T, kEntries>::of(values));
    }
    first += kUnroll * kStep;
    if (first >= size) break;
    chunks.load(side, first, size);
  }
}

// The gradient of one side's log-probabilities alone, in that side's logits: nothing of the other side is read.
template <typename T, bool kPolicy>
__global__ void __launch_bounds__(kBackwardThreads, kLogprobBackwardBlocks<typename RealOf<T>::type>)
    logprob_backward_kernel(const BackwardArguments a, const GradientScaling<typename RealOf<T>::type> by,
                            double inverse_temperature, int stretches) {
  using Real = typename RealOf<T>::type;
  constexpr int kEntries = 16 / sizeof(T), kUnroll = 4;
  const Task t = task_of(a, stretches);
  const Logits& logits = kPolicy ? a.problem.policy : a.problem.reference;
  const Logits& grad = kPolicy ? a.grad_policy : a.grad_reference;
  const int offset = chunk_offset<T, kEntries>(row_of<T>(grad, t.row) + t.begin);
  const auto side = stretch_of<T>(logits, grad, t.row, t.begin, offset);
  if (t.ignored) [[unlikely]] {
    fill(side.grad, offset, t.size, Real(0));
    return;
  }
  const int first = offset + static_cast<int>(threadIdx.x) * kEntries;
  Chunks<T, kEntries, kUnroll> chunks;
  chunks.load(side, first, t.size);
  const RowCoefficients<Real>& c = coefficients_of<Real, true>(a, t.row, inverse_temperature);
  if (c.invalid) [[unlikely]] {
    fill(side.grad, offset, t.size, std::numeric_limits<Real>::quiet_NaN());
    return;
  }
  const Real normalizer = kPolicy ? c.policy_origin : c.reference_origin;
  const Real coefficient = kPolicy ? c.pi_0 : c.rho_0;
  const Real at_label = kPolicy ? c.policy_label : c.reference_label;
  const Real inverse_softcap = kPolicy ? by.policy_inverse_softcap : by.reference_inverse_softcap;
  if (c.careful) [[unlikely]] {
    logprob_gradient<Real, true>(side, chunks, first, t.size, t.label, normalizer, coefficient, at_label,
                                 inverse_softcap, by);
  } else {
    logprob_gradient<Real, false>(side, chunks, first, t.size, t.label, normalizer, coefficient, at_label,
                                  inverse_softcap, by);
  }
}

}  // namespace lit_did::cuda
