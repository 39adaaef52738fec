// The row kernels, written once over the vectors of simd.h. rows_<level>.cpp includes this with its own
// compiler flags and exports the table that `LIT_DID_ROW_TABLE` makes.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

// Vectors go in pairs (load_pair); what is left over takes the careful path through a buffer.
template <typename Real>
constexpr int64_t kPair = 2 * kLanes<Real>;

template <typename P, typename R>
constexpr bool kInterleaved = std::is_same_v<P, BFloat16> && std::is_same_v<R, BFloat16>;

// Entries summed in `Real` before the sums move on to doubles. They stay in the first-level cache, and 64 additions
// a lane neither lose digits nor let the reductions over lanes count.
template <typename Real>
constexpr int64_t kBlock = 64 * kLanes<Real>;
static_assert(kSplit % kBlock<float> == 0 && kSplit % kBlock<double> == 0, "a split must hold whole blocks");

// How far, in powers of 2, a block's maxima may exceed the origins of the sums. The logarithms are then as large, and
// their rounding (2^-24 of 4) is still below what the logits' own rounding does.
constexpr int kSlack = 4;
// Where weights that are too large show in their sum, the sum alone is bounded: 64 weights of 1, and those above 1.
constexpr int kLargestSum = 128;
// The exponents that exp2_in_range takes end here. No logit that counts as infinite is as near to a usable origin.
constexpr int kRange = 126;
// A bound that only overflow passes.
constexpr double kHuge = 0x1p100;

// effective_logit of every lane.
template <typename V, typename Real>
LIT_DID_INLINE V effective(V logits, Real limit) {
  logits = logits < -limit ? broadcast<V>(minus_infinity<Real>()) : logits;
  return logits > limit ? broadcast<V>(-minus_infinity<Real>()) : logits;
}

template <typename V>
struct BlockMaxima {
  V policy, reference, difference;
  V lowest;      // the least logit of either side
  V not_finite;  // 0, or NaN where an entry was NaN or infinite
};

template <typename Real, bool kCareful, typename P, typename R>
LIT_DID_INLINE BlockMaxima<Vector<Real>> block_maxima(const P* policy, const R* reference, int64_t size, Real limit) {
  using V = Vector<Real>;
  const V lowest = broadcast<V>(minus_infinity<Real>());
  BlockMaxima<V> m{lowest, lowest, lowest, V{}, V{}};
  for (int64_t i = 0; i < size; i += kLanes<Real>) {
    V z = load(policy + i);
    V r = load(reference + i);
    if constexpr (kCareful) {
      z = effective(z, limit);
      r = effective(r, limit);
    }
    V d = z - r;
    if constexpr (kCareful) {
      d = ((z == minus_infinity<Real>()) | (r == minus_infinity<Real>())) ? lowest : d;
    } else {
      m.lowest = minimum(m.lowest, minimum(z, r));
      m.not_finite += d * Real(0);
    }
    m.policy = maximum(m.policy, z);
    m.reference = maximum(m.reference, r);
    m.difference = maximum(m.difference, d);
  }
  return m;
}

// Whether the block holds anything but logits between -limit and limit.
template <typename Real>
LIT_DID_INLINE bool needs_care(const BlockMaxima<Vector<Real>>& m, Real limit) {
  return !(lane_sum(m.not_finite) == 0 && lane_minimum(m.lowest) >= -limit && lane_maximum(m.policy) <= limit &&
           lane_maximum(m.reference) <= limit);
}

// Ways to add a block.
enum class Path {
  // The weight 2^(z - r) is the quotient of the two others, which is cheaper than a third exponential. Both must be
  // normal numbers for that.
  kRatio,
  kPlain,    // three exponentials
  kCareful,  // three exponentials; entries may be infinite
};

// Adds the block's entries to `row`, relative to its origins. Unless `kCareful`, adds nothing and returns false where
// the block holds NaN, infinities or a logit below -limit, or exceeds the origins; kRatio also where it does not suit.
template <typename Real, Path kPath, typename P, typename R>
__attribute__((noinline)) bool add_block(const P* policy, const R* reference, int64_t size, Real scale, Real limit,
                                         RowStatistics<Real, double>& row) {
  using V = Vector<Real>;
  constexpr bool kRatio = kPath == Path::kRatio, kCareful = kPath == Path::kCareful;
  const Real z0 = origin(row.policy_max), r0 = origin(row.reference_max), d0 = origin(row.difference_max);
  const Real x0 = row.log_ratio_origin();
  V policy_weight{}, policy_log{}, policy_log_ratio{}, reference_weight{}, reference_log{}, reference_log_ratio{},
      difference_weight{}, difference_log{};
  V highest{}, lowest{};
  decltype(V{} == V{}) policy_holes{}, reference_holes{};
  V outside{};
  struct Weighed {
    V log_z, log_r, log_d, x, w_z, w_r, w_d;
  };
  const auto weigh = [&](V z, V r) __attribute__((always_inline)) {
    if constexpr (kCareful) {
      z = effective(z, limit);
      r = effective(r, limit);
    }
    V log_z = z * scale - z0;
    V log_r = r * scale - r0;
    V log_d, x, w_z, w_r, w_d;
    if constexpr (kRatio) {
      log_d = x = log_z - log_r;
      w_z = exp2_in_range(log_z);
      w_r = exp2_in_range(log_r);
      w_d = w_z / w_r;
    } else {
      const V d = z - r;
      log_d = d * scale - d0;
      x = d * scale - x0;
      w_z = exp2(log_z);
      w_r = exp2(log_r);
      w_d = exp2(log_d);
    }
    if constexpr (kCareful) {
      const auto z_hole = z == minus_infinity<Real>();
      const auto r_hole = r == minus_infinity<Real>();
      const auto d_hole = z_hole | r_hole;
      w_z = z_hole ? V{} : w_z;
      log_z = z_hole ? V{} : log_z;
      w_r = r_hole ? V{} : w_r;
      log_r = r_hole ? V{} : log_r;
      w_d = d_hole ? V{} : w_d;
      log_d = d_hole ? V{} : log_d;
      x = d_hole ? V{} : x;
      policy_holes |= z_hole & ~r_hole;
      reference_holes |= r_hole & ~z_hole;
      outside += (z_hole & r_hole) ? broadcast<V>(Real(1)) : V{};
    } else if constexpr (kRatio) {
      lowest = minimum(lowest, minimum(log_z, log_r));
      if constexpr (!kSaturates<Real>) highest = maximum(highest, maximum(log_z, log_r));
    } else {
      lowest = minimum(lowest, minimum(z, r));
      highest = maximum(highest, maximum(maximum(log_z, log_r), log_d));
    }
    return Weighed{log_z, log_r, log_d, x, w_z, w_r, w_d};
  };
  const auto add = [&](const Weighed& e) __attribute__((always_inline)) {
    policy_weight += e.w_z;
    policy_log += e.w_z * e.log_z;
    policy_log_ratio += e.w_z * e.x;
    reference_weight += e.w_r;
    reference_log += e.w_r * e.log_r;
    reference_log_ratio += e.w_r * e.x;
    difference_weight += e.w_d;
    difference_log += e.w_d * e.log_d;
  };
  // With registers to spare, a vector is added while the next one's exponentials are on their way.
  constexpr bool kLate = LIT_DID_VECTOR_BYTES == 64;
  Weighed last{};
  for (int64_t i = 0; i < size; i += kPair<Real>) {
    V z, r, next_z, next_r;
    prefetch<kPair<Real> * sizeof(P)>(policy + i);
    prefetch<kPair<Real> * sizeof(R)>(reference + i);
    load_pair<kInterleaved<P, R>>(policy + i, z, next_z);
    load_pair<kInterleaved<P, R>>(reference + i, r, next_r);
    const Weighed first = weigh(z, r);
    add(kLate ? last : first);
    const Weighed second = weigh(next_z, next_r);
    add(kLate ? first : second);
    last = second;
  }
  if constexpr (kLate) add(last);
  double sums[8];
  lane_sums({policy_weight, policy_log, policy_log_ratio, reference_weight, reference_log, reference_log_ratio,
             difference_weight, difference_log},
            sums);
  double w_d = sums[6], log_d = sums[7], x_rest = 0;
  if constexpr (kCareful) {
    row.flags |= kInfinite | (any(policy_holes) ? kPolicyHole : 0) | (any(reference_holes) ? kReferenceHole : 0);
    row.outside += lane_sum(outside);
  } else if constexpr (kRatio) {
    if (any((lowest < Real(-kRange)) | (highest > Real(kSlack)) | (policy_weight > Real(kLargestSum)) |
            (reference_weight > Real(kLargestSum)))) {
      return false;
    }
    // NaN may vanish from `highest` and `lowest`, but not from here. Where an entry has almost all the weight, an
    // entropy near 0 would show that a quotient has the error of two exponentials.
    if (!(std::fabs(log_d) < kHuge) || 4 * double(lane_maximum(difference_weight)) > 3 * w_d) return false;
    const double x_origin = double(z0) - double(r0);
    const double shift = x_origin - double(d0);
    if (shift > 2 * kRange) return false;  // the differences so far were those beside infinities
    const double factor = std::exp2(shift);
    log_d = factor * (log_d + shift * w_d);
    w_d *= factor;
    x_rest = x_origin - double(x0);
  } else {
    // NaN may vanish from `highest` and take what was there along, but shows in the weights as NaN or infinity, or
    // comes of two -inf.
    const V weights = policy_weight + reference_weight;
    if (any((highest > Real(kSlack)) | (lowest < -limit) | (weights - weights != V{}))) return false;
  }
  row.policy_weight += sums[0];
  row.policy_log += sums[1];
  row.policy_log_ratio += sums[2] + x_rest * sums[0];
  row.reference_weight += sums[3];
  row.reference_log += sums[4];
  row.reference_log_ratio += sums[5] + x_rest * sums[3];
  row.difference_weight += w_d;
  row.difference_log += log_d;
  return true;
}

// Whether blocks can be added relative to the row's origins. Near the limit, logits beyond it would not be noticed.
template <typename Real>
LIT_DID_INLINE bool has_origins(const RowStatistics<Real, double>& row, Real scale, Real limit) {
  const Real largest = limit * scale - (kRange + 2);
  return row.difference_max > minus_infinity<Real>() && std::fabs(row.policy_max) < largest &&
         std::fabs(row.reference_max) < largest;
}

template <typename Real>
LIT_DID_INLINE void rebase_to_block(const BlockMaxima<Vector<Real>>& m, Real scale, RowStatistics<Real, double>& row) {
  const Real z = lane_maximum(m.policy) * scale;
  const Real r = lane_maximum(m.reference) * scale;
  const Real d = lane_maximum(m.difference) * scale;
  if (z > row.policy_max || r > row.reference_max || d > row.difference_max) {
    row.rebase(z > row.policy_max ? z : row.policy_max, r > row.reference_max ? r : row.reference_max,
               d > row.difference_max ? d : row.difference_max);
  }
}

// Adds any block: its maxima first, then its entries relative to them. Returns the path that the next block is to try.
template <typename Real, typename P, typename R>
__attribute__((noinline)) Path rebase_and_add_block(const P* policy, const R* reference, int64_t size, Real scale,
                                                    Real limit, RowStatistics<Real, double>& row) {
  auto m = block_maxima<Real, false>(policy, reference, size, limit);
  if (needs_care(m, limit)) {
    m = block_maxima<Real, true>(policy, reference, size, limit);
    rebase_to_block(m, scale, row);
    add_block<Real, Path::kCareful>(policy, reference, size, scale, limit, row);
    return Path::kRatio;
  }
  rebase_to_block(m, scale, row);
  if (has_origins(row, scale, limit) && add_block<Real, Path::kRatio>(policy, reference, size, scale, limit, row)) {
    return Path::kRatio;
  }
  add_block<Real, Path::kPlain>(policy, reference, size, scale, limit, row);
  return Path::kPlain;
}

// Every block is tried with the origins of those before it, which saves a pass for its maxima; the few that hold a
// much larger logit, infinities, or what the path does not suit are done again.
template <typename Real, typename P, typename R>
void accumulate(const void* policy_row, const void* reference_row, int64_t size, double scale_, void* statistics) {
  const P* policy = static_cast<const P*>(policy_row);
  const R* reference = static_cast<const R*>(reference_row);
  const Real scale = static_cast<Real>(scale_);
  const Real limit = static_cast<Real>(kLargestLogit * kLog2e / scale_);
  RowStatistics<Real, double> row;
  Path path = Path::kRatio;
  const int64_t whole = size - size % kPair<Real>;
  for (int64_t begin = 0; begin < whole; begin += kBlock<Real>) {
    const int64_t n = whole - begin < kBlock<Real> ? whole - begin : kBlock<Real>;
    const auto add = path == Path::kRatio ? add_block<Real, Path::kRatio, P, R> : add_block<Real, Path::kPlain, P, R>;
    if (has_origins(row, scale, limit) && add(policy + begin, reference + begin, n, scale, limit, row)) continue;
    path = rebase_and_add_block(policy + begin, reference + begin, n, scale, limit, row);
  }
  if (whole < size) {
    // The tail, filled up with entries outside the support.
    alignas(64) Real z[kPair<Real>], r[kPair<Real>];
    bool finite = true;
    for (int64_t i = 0; i < kPair<Real>; ++i) {
      const bool inside = whole + i < size;
      z[i] = inside ? to_float(policy[whole + i]) : minus_infinity<Real>();
      r[i] = inside ? to_float(reference[whole + i]) : minus_infinity<Real>();
      finite = finite && (!inside || (std::fabs(z[i]) <= limit && std::fabs(r[i]) <= limit));
    }
    const int flags = row.flags;
    const auto m = block_maxima<Real, true>(z, r, kPair<Real>, limit);
    rebase_to_block(m, scale, row);
    add_block<Real, Path::kCareful>(z, r, kPair<Real>, scale, limit, row);
    if (finite) row.flags = flags;
    row.outside -= whole + kPair<Real> - size;  // entries that are no part of the row
  }
  *static_cast<RowStatistics<Real, double>*>(statistics) = row;
}

// ---------------------------------------------------------------------------------------------------------
// Gradient
// ---------------------------------------------------------------------------------------------------------

// Gradient of the two log-probabilities alone: one distribution a side, each side needs only its own logits.
template <typename Real, bool kCapped, typename T>
LIT_DID_INLINE void logprob_gradient(const T* logits, int64_t size, Real scale, Real normalizer, Real coefficient,
                                     Real inverse_softcap, T* grad, bool past_caches) {
  using V = Vector<Real>;
  const Real limit = static_cast<Real>(kLargestLogit * kLog2e / scale);
  const auto gradient = [&](V z) __attribute__((always_inline)) {
    z = effective(z, limit);
    V p = exp2(V(z * scale - normalizer));
    if constexpr (kCapped) p *= softcap_slope(z, inverse_softcap);
    p = z == minus_infinity<Real>() ? V{} : p;
    return V(coefficient * p);
  };
  for (int64_t i = 0; i < size; i += kPair<Real>) {
    V z, next_z;
    prefetch<kPair<Real> * sizeof(T)>(logits + i);
    load_pair<kInterleaved<T, T>>(logits + i, z, next_z);
    store_pair<kInterleaved<T, T>>(grad + i, gradient(z), gradient(next_z), past_caches);
  }
}

template <typename Real, typename T>
LIT_DID_INLINE void logprob_gradient(const T* logits, int64_t size, Real scale, Real normalizer, Real coefficient,
                                     Real inverse_softcap, T* grad, bool past_caches) {
  if (inverse_softcap != 0) {
    logprob_gradient<Real, true>(logits, size, scale, normalizer, coefficient, inverse_softcap, grad, past_caches);
  } else {
    logprob_gradient<Real, false>(logits, size, scale, normalizer, coefficient, inverse_softcap, grad, past_caches);
  }
}

template <typename Real, bool kCareful, bool kPolicy, bool kReference, typename P, typename R>
LIT_DID_INLINE void full_gradient(const P* policy, const R* reference, int64_t size, Real scale,
                                  const RowCoefficients<Real>& c, P* grad_policy, R* grad_reference, bool past_caches) {
  using V = Vector<Real>;
  const Real limit = static_cast<Real>(kLargestLogit * kLog2e / scale);
  // Overwrites both logits with their gradients.
  const auto gradient = [&](V& z, V& r) __attribute__((always_inline)) {
    if constexpr (kCareful) {
      z = effective(z, limit);
      r = effective(r, limit);
    }
    const V d = z - r;
    V log_pi = z * scale - c.policy_origin;
    V log_rho = r * scale - c.reference_origin;
    V log_q = d * scale - c.difference_origin;
    V x = d * scale - c.log_ratio_origin;
    V pi = exp2(log_pi);
    V rho = exp2(log_rho);
    V q = exp2(log_q);
    [[maybe_unused]] V policy_slope, reference_slope;
    if constexpr (kCareful) {
      const auto z_hole = z == minus_infinity<Real>();
      const auto r_hole = r == minus_infinity<Real>();
      const auto d_hole = z_hole | r_hole;
      pi = z_hole ? V{} : pi;
      log_pi = z_hole ? V{} : log_pi;
      rho = r_hole ? V{} : rho;
      log_rho = r_hole ? V{} : log_rho;
      q = d_hole ? V{} : q;
      log_q = d_hole ? V{} : log_q;
      x = d_hole ? V{} : x;
      policy_slope = softcap_slope(V(z_hole ? V{} : z), c.policy_inverse_softcap);
      reference_slope = softcap_slope(V(r_hole ? V{} : r), c.reference_inverse_softcap);
    }
    const V from_q = q * (c.q_0 + c.q_1 * log_q);
    if constexpr (kPolicy) z = pi * (c.pi_0 + c.pi_1 * log_pi + c.pi_x * x) + from_q + c.rho_for_policy * rho;
    if constexpr (kReference) r = rho * (c.rho_0 + c.rho_1 * log_rho - c.rho_x * x) - from_q + c.pi_for_reference * pi;
    if constexpr (kCareful && kPolicy) z *= policy_slope;
    if constexpr (kCareful && kReference) r *= reference_slope;
  };
  constexpr bool interleaved = kInterleaved<P, R>;
  for (int64_t i = 0; i < size; i += kPair<Real>) {
    V z, r, next_z, next_r;
    prefetch<kPair<Real> * sizeof(P)>(policy + i);
    prefetch<kPair<Real> * sizeof(R)>(reference + i);
    load_pair<interleaved>(policy + i, z, next_z);
    load_pair<interleaved>(reference + i, r, next_r);
    gradient(z, r);
    gradient(next_z, next_r);
    if constexpr (kPolicy) store_pair<interleaved>(grad_policy + i, z, next_z, past_caches);
    if constexpr (kReference) store_pair<interleaved>(grad_reference + i, r, next_r, past_caches);
  }
}

template <typename Real, typename P, typename R>
LIT_DID_INLINE void full_gradient(const P* policy, const R* reference, int64_t size, Real scale,
                                  const RowCoefficients<Real>& c, bool careful, P* grad_policy, R* grad_reference,
                                  bool past_caches) {
  const auto run = [&](auto kCareful, auto kPolicy, auto kReference) __attribute__((always_inline)) {
    full_gradient<Real, kCareful, kPolicy, kReference>(policy, reference, size, scale, c, grad_policy, grad_reference,
                                                       past_caches);
  };
  const std::true_type yes;
  const std::false_type no;
  if (careful) {
    if (grad_policy && grad_reference)
      run(yes, yes, yes);
    else if (grad_policy)
      run(yes, yes, no);
    else
      run(yes, no, yes);
  } else {
    if (grad_policy && grad_reference)
      run(no, yes, yes);
    else if (grad_policy)
      run(no, yes, no);
    else
      run(no, no, yes);
  }
}

// Up to one pair of vectors through buffers of `Real`, filled up with entries outside the support; adds the
// label's term in full precision before rounding. `label` counts from the first entry, -1 for none.
template <typename Real, typename P, typename R>
LIT_DID_INLINE void few_entries_gradient(const P* policy, const R* reference, int64_t size, int64_t label, Real scale,
                                         const RowCoefficients<Real>& c, bool logprobs_only, P* grad_policy,
                                         R* grad_reference) {
  constexpr int64_t n = kPair<Real>;
  alignas(64) Real z[n], r[n], grad_z[n] = {}, grad_r[n] = {};
  for (int64_t i = 0; i < n; ++i) {
    z[i] = i < size && policy ? Real(to_float(policy[i])) : minus_infinity<Real>();
    r[i] = i < size && reference ? Real(to_float(reference[i])) : minus_infinity<Real>();
  }
  if (logprobs_only) {
    if (grad_policy) logprob_gradient(z, n, scale, c.policy_origin, c.pi_0, c.policy_inverse_softcap, grad_z, false);
    if (grad_reference)
      logprob_gradient(r, n, scale, c.reference_origin, c.rho_0, c.reference_inverse_softcap, grad_r, false);
  } else {
    full_gradient<Real, Real, Real>(z, r, n, scale, c, true, grad_policy ? grad_z : nullptr,
                                    grad_reference ? grad_r : nullptr, false);
  }
  if (label >= 0) {
    const auto slope = [](Real logit, Real inverse_softcap) {  // a logit without a softcap may be -inf
      return inverse_softcap != 0 ? softcap_slope(logit, inverse_softcap) : Real(1);
    };
    grad_z[label] += c.policy_label * slope(z[label], c.policy_inverse_softcap);
    grad_r[label] += c.reference_label * slope(r[label], c.reference_inverse_softcap);
  }
  for (int64_t i = 0; i < size; ++i) {
    if (grad_policy) from_real(grad_z[i], grad_policy[i]);
    if (grad_reference) from_real(grad_r[i], grad_reference[i]);
  }
}

template <typename Real, typename P, typename R>
void gradient(const void* policy_row, const void* reference_row, int64_t size, int64_t label, double scale_,
              const void* coefficients, bool logprobs_only, bool large, void* grad_policy_row,
              void* grad_reference_row) {
  const P* policy = static_cast<const P*>(policy_row);
  const R* reference = static_cast<const R*>(reference_row);
  P* grad_policy = static_cast<P*>(grad_policy_row);
  R* grad_reference = static_cast<R*>(grad_reference_row);
  const Real scale = static_cast<Real>(scale_);
  const auto& c = *static_cast<const RowCoefficients<Real>*>(coefficients);
  constexpr int64_t pair = kPair<Real>;
  const auto aligned = [](const void* row) { return reinterpret_cast<uintptr_t>(row) % sizeof(Vector<Real>) == 0; };
  const bool past_caches = large && aligned(grad_policy) && aligned(grad_reference);

  const auto at = [](auto* row, int64_t i) { return row ? row + i : row; };
  const auto whole_vectors = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (!logprobs_only) {
      full_gradient<Real, P, R>(policy + begin, reference + begin, end - begin, scale, c, c.careful,
                                at(grad_policy, begin), at(grad_reference, begin), past_caches);
      return;
    }
    if (grad_policy)
      logprob_gradient(policy + begin, end - begin, scale, c.policy_origin, c.pi_0, c.policy_inverse_softcap,
                       grad_policy + begin, past_caches);
    if (grad_reference)
      logprob_gradient(reference + begin, end - begin, scale, c.reference_origin, c.rho_0, c.reference_inverse_softcap,
                       grad_reference + begin, past_caches);
  };
  const auto few_entries = [&](int64_t begin, int64_t n) {
    const bool has_label = label >= begin && label < begin + n;
    few_entries_gradient<Real, P, R>(at(policy, begin), at(reference, begin), n, has_label ? label - begin : -1, scale,
                                     c, logprobs_only, at(grad_policy, begin), at(grad_reference, begin));
  };

  const int64_t whole = size - size % pair;
  if (label >= 0 && label < whole) {
    const int64_t begin = label - label % pair;
    whole_vectors(0, begin);
    few_entries(begin, pair);
    whole_vectors(begin + pair, whole);
  } else {
    whole_vectors(0, whole);
  }
  if (whole < size) few_entries(whole, size - whole);
  if (past_caches) finish_stores();
}

}  // namespace

// One level's table. The kernels above have internal linkage: nothing but this table leaves the file.
#define LIT_DID_ROW(kernel)                                                                                            \
  {                                                                                                                    \
    {kernel<float, float, float>, kernel<float, float, BFloat16>, kernel<float, float, Float16>, nullptr},             \
        {kernel<float, BFloat16, float>, kernel<float, BFloat16, BFloat16>, kernel<float, BFloat16, Float16>,          \
         nullptr},                                                                                                     \
        {kernel<float, Float16, float>, kernel<float, Float16, BFloat16>, kernel<float, Float16, Float16>, nullptr}, { \
      nullptr, nullptr, nullptr, kernel<double, double, double>                                                        \
    }                                                                                                                  \
  }

#define LIT_DID_ROW_TABLE(function)                                                \
  const lit_did::RowKernels& lit_did::function() {                                 \
    static const RowKernels table{LIT_DID_ROW(accumulate), LIT_DID_ROW(gradient)}; \
    return table;                                                                  \
  }
