// The maths of one vocabulary row: what is accumulated, how two parts merge, how the statistics and
// the coefficients of their gradients follow. Plain C++ without torch, shared by every device.
//
// One row holds the policy's logits z and the reference's logits r over a vocabulary of V entries.
// Everything runs in base 2: scale = log2(e) / temperature, so that 2^(scale * z) = e^(z / temperature),
// and d = z - r. Sums are kept relative to the running maxima of scale * z, scale * r and scale * d.
//
// Support. An entry that is -inf on both sides is outside the support: it is skipped and counted. -inf in the policy
// alone has weight 0 and makes KL(reference, policy) infinite; -inf in the reference alone makes KL(policy, reference)
// and the DID's log-partition infinite and the DID's entropy NaN. NaN or +inf anywhere, or a side without any finite
// entry, makes every statistic of the row NaN. Logits that are beyond kLargestLogit once divided by the temperature
// count as infinite: masks such as -1e9 or finfo.min mean -inf, and float has no digits left for their differences.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define LIT_DID_INLINE __host__ __device__ __forceinline__
#else
// always_inline: this header is compiled for several instruction sets, and an out-of-line copy made for
// the newest must never be the one that the linker keeps for the oldest.
#define LIT_DID_INLINE inline __attribute__((always_inline))
#endif

namespace lit_did {

// What one row says, in nats: the fields of lit_did.TokenStatistics, in their order.
template <typename Real>
struct TokenStatistics {
  Real policy_logprob, reference_logprob;
  Real token_did_entropy, token_did_concentration, token_did_log_partition;
  Real policy_entropy, reference_entropy, kl, reverse_kl;
};

constexpr int kNumStatistics = 9;

// Writes them to element `row` of nine arrays of To.
template <typename To, typename Real>
LIT_DID_INLINE void write_statistics(const TokenStatistics<Real>& s, void* const* arrays, int64_t row) {
  const Real values[kNumStatistics] = {s.policy_logprob,
                                       s.reference_logprob,
                                       s.token_did_entropy,
                                       s.token_did_concentration,
                                       s.token_did_log_partition,
                                       s.policy_entropy,
                                       s.reference_entropy,
                                       s.kl,
                                       s.reverse_kl};
  for (int i = 0; i < kNumStatistics; ++i) static_cast<To*>(arrays[i])[row] = To(values[i]);
}

// What the backward needs of the forward besides the statistics: log2-sum-exp2 of the three rows, and whether the row
// holds infinities (RowFlag). Doubles, because their rounding would scale a whole row's gradient. `support` is the
// number of entries in the support, which slices of a vocabulary need to merge.
struct RowNormalizers {
  double policy, reference, difference;
  double flags;
  double support;
};

constexpr int kNumNormalizers = 5;

enum RowFlag : int {
  kPolicyHole = 1,     // an entry is -inf in the policy only
  kReferenceHole = 2,  // an entry is -inf in the reference only
  kInfinite = 4,       // some entry is not finite, or counts as infinite: take the careful path
};

constexpr double kLargestLogit = 1e6;

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2e = 1.44269504088896340736;

template <typename Real>
LIT_DID_INLINE Real minus_infinity() {
  return -std::numeric_limits<Real>::infinity();
}

// The logit as it counts; `limit` is kLargestLogit * temperature.
template <typename Real>
LIT_DID_INLINE Real effective_logit(Real logit, Real limit) {
  return logit < -limit ? minus_infinity<Real>() : logit > limit ? -minus_infinity<Real>() : logit;
}

// Maxima start at -inf; for sums that are still empty the origin is 0, which avoids inf - inf.
template <typename Real>
LIT_DID_INLINE Real origin(Real maximum) {
  return maximum == minus_infinity<Real>() ? Real(0) : maximum;
}

// Running maxima, eight sums and a count. `Real` is the arithmetic of an entry, `Sum` that of the sums.
template <typename Real, typename Sum>
struct RowStatistics {
  // Maxima of scale * z, scale * r and scale * d.
  Real policy_max = minus_infinity<Real>();
  Real reference_max = minus_infinity<Real>();
  Real difference_max = minus_infinity<Real>();
  // With w_z = 2^(scale z - policy_max), w_r and w_d alike, and x = scale d - (policy_max - reference_max):
  Sum policy_weight = 0;        // sum of w_z
  Sum policy_log = 0;           // sum of w_z * (scale z - policy_max)
  Sum policy_log_ratio = 0;     // sum of w_z * x
  Sum reference_weight = 0;     // sum of w_r
  Sum reference_log = 0;        // sum of w_r * (scale r - reference_max)
  Sum reference_log_ratio = 0;  // sum of w_r * x
  Sum difference_weight = 0;    // sum of w_d
  Sum difference_log = 0;       // sum of w_d * (scale d - difference_max)
  Sum outside = 0;              // entries outside the support
  int flags = 0;

  LIT_DID_INLINE Real log_ratio_origin() const { return origin(policy_max) - origin(reference_max); }

  // Expresses the sums relative to other maxima, none smaller than the present ones.
  LIT_DID_INLINE void rebase(Real policy_to, Real reference_to, Real difference_to) {
    // Both origins rounded to Real, as the entries saw them: the rounding cancels in finish().
    const Sum shift_origin = Sum(log_ratio_origin()) - Sum(Real(origin(policy_to) - origin(reference_to)));
    shift(policy_max, policy_to, shift_origin, policy_weight, policy_log, policy_log_ratio);
    shift(reference_max, reference_to, shift_origin, reference_weight, reference_log, reference_log_ratio);
    Sum unused = 0;
    shift(difference_max, difference_to, Sum(0), difference_weight, difference_log, unused);
  }

  LIT_DID_INLINE void merge(RowStatistics other) {
    const Real p = larger(policy_max, other.policy_max);
    const Real r = larger(reference_max, other.reference_max);
    const Real d = larger(difference_max, other.difference_max);
    rebase(p, r, d);
    other.rebase(p, r, d);
    policy_weight += other.policy_weight;
    policy_log += other.policy_log;
    policy_log_ratio += other.policy_log_ratio;
    reference_weight += other.reference_weight;
    reference_log += other.reference_log;
    reference_log_ratio += other.reference_log_ratio;
    difference_weight += other.difference_weight;
    difference_log += other.difference_log;
    outside += other.outside;
    flags |= other.flags;
  }

  // True where the row defines no distribution: NaN, +inf, or nothing but -inf on one side.
  LIT_DID_INLINE bool invalid() const { return !(policy_weight > 0) || !(reference_weight > 0); }

  // The statistics of a row of `vocabulary` entries, given the label's two logits times scale.
  LIT_DID_INLINE TokenStatistics<Real> finish(int64_t vocabulary, Sum policy_label, Sum reference_label,
                                              RowNormalizers* normalizers) const {
    const Real nan = std::numeric_limits<Real>::quiet_NaN();
    const Real infinity = std::numeric_limits<Real>::infinity();
    const Sum support = Sum(vocabulary) - outside;
    if (invalid()) {
      *normalizers = {nan, nan, nan, double(kInfinite), double(support)};
      return {nan, nan, nan, nan, nan, nan, nan, nan, nan};
    }
    const Sum log_policy = std::log2(policy_weight);
    const Sum log_reference = std::log2(reference_weight);
    const Sum log_difference = std::log2(difference_weight);
    const Sum a = Sum(policy_max) + log_policy;
    const Sum b = Sum(reference_max) + log_reference;
    const Sum c = Sum(difference_max) + log_difference;
    const Sum x0 = Sum(log_ratio_origin());
    const Sum ln2 = Sum(kLn2);

    TokenStatistics<Real> s;
    s.policy_logprob = Real(ln2 * (policy_label - a));
    s.reference_logprob = Real(ln2 * (reference_label - b));
    const Sum entropy = log_difference - difference_log / difference_weight;
    const Sum concentration = std::log2(support) - entropy;
    s.token_did_entropy = Real(ln2 * entropy);
    s.token_did_concentration = concentration <= 0 ? Real(0) : Real(ln2 * concentration);  // below 0 by rounding alone
    s.token_did_log_partition = Real(ln2 * (c - a + b));
    s.policy_entropy = Real(ln2 * (log_policy - policy_log / policy_weight));
    s.reference_entropy = Real(ln2 * (log_reference - reference_log / reference_weight));
    s.kl = Real(ln2 * (policy_log_ratio / policy_weight + x0 - a + b));
    s.reverse_kl = Real(ln2 * (a - b - x0 - reference_log_ratio / reference_weight));
    if (flags & kReferenceHole) {
      s.token_did_entropy = s.token_did_concentration = nan;
      s.token_did_log_partition = infinity;
      s.kl = infinity;
    }
    if (flags & kPolicyHole) s.reverse_kl = infinity;
    *normalizers = {double(a), double(b), double(c), double(flags), double(support)};
    return s;
  }

 private:
  LIT_DID_INLINE static Real larger(Real a, Real b) { return a < b ? b : a; }

  // from <= to. `weight`, `log` and `log_ratio` hold sums of w, w * t and w * x with t relative to `from`.
  LIT_DID_INLINE static void shift(Real& from, Real to, Sum shift_origin, Sum& weight, Sum& log, Sum& log_ratio) {
    // Until the first finite entry the sums are 0, or NaN where an entry was: neither has anything to shift.
    if (from != minus_infinity<Real>()) {
      const Sum delta = Sum(from) - Sum(to);
      const Sum factor = std::exp2(delta);
      log = factor * (log + delta * weight);
      log_ratio = factor * (log_ratio + shift_origin * weight);
      weight *= factor;
    }
    from = to;
  }
};

// The gradient of a row is linear in the three distributions, times the log-probabilities:
//   d/dz = pi  (pi_0  + pi_1  log2 pi  + pi_x  x) + q (q_0 + q_1 log2 q) + rho_for_policy rho
//   d/dr = rho (rho_0 + rho_1 log2 rho - rho_x x) - q (q_0 + q_1 log2 q) + pi_for_reference pi
// with x = log2 pi - log2 rho, and policy_label / reference_label added at the label. An entry computes these from
// scale * z - policy_origin and so on; what rounding the origins to Real loses is made up for in the coefficients.
template <typename Real>
struct GradientCoefficients {
  Real policy_origin, reference_origin, difference_origin, log_ratio_origin;
  Real pi_0, pi_1, pi_x;
  Real rho_0, rho_1, rho_x;
  Real q_0, q_1;
  Real rho_for_policy, pi_for_reference;
  Real policy_label, reference_label;
  bool careful;  // the row holds infinities
};

// dy / dx of a softcapped logit y = c tanh(x / c), from y and 1 / c. Numbers or vectors.
template <typename V, typename Real>
LIT_DID_INLINE V softcap_slope(V capped, Real inverse_softcap) {
  const V t = capped * inverse_softcap;
  return Real(1) - t * t;
}

// What rounding took from a normalizer; nothing where it is -inf, for supports without a common entry.
template <typename Real>
LIT_DID_INLINE double rounding(double exact, Real rounded) {
  return exact == minus_infinity<double>() ? 0.0 : exact - double(rounded);
}

// 2^-rest of what `rounding` returns, with a relative error below 2^-30: differences of logits that count are below
// 2^22 in base 2, so that float takes 2^-3 at most. In few instructions, because on many GPUs doubles are slow.
LIT_DID_INLINE double exp2_of_rounding(double rest) {
  const double x = -kLn2 * rest;
  return 1 + x * (1 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))));
}

// The coefficients from the gradients `g` of the statistics (0 where a statistic was not used) and their values, in
// three parts that share nothing: see gradient_coefficients.
template <typename Real>
struct CoefficientParts {
  TokenStatistics<Real> g, value;
  RowNormalizers n;
  double inverse_temperature;

  // A statistic that is not finite because the supports differ passes no gradient.
  LIT_DID_INLINE CoefficientParts(const TokenStatistics<Real>& grads, const TokenStatistics<Real>& values,
                                  const RowNormalizers& normalizers, double inverse_temperature)
      : g(grads), value(values), n(normalizers), inverse_temperature(inverse_temperature) {
    const int flags = static_cast<int>(n.flags);
    g.token_did_entropy -= g.token_did_concentration;  // their sum is the logarithm of the support's size
    if (flags & kReferenceHole) {
      g.token_did_entropy = g.token_did_log_partition = g.kl = 0;
      value.token_did_entropy = value.kl = 0;
    }
    if (flags & kPolicyHole) g.reverse_kl = value.reverse_kl = 0;
  }

  // 2^(scale z - policy_origin) is pi times 2^(n.policy - policy_origin), and its logarithm is off by as much.
  LIT_DID_INLINE void policy(GradientCoefficients<Real>& c) const {
    c.policy_origin = Real(n.policy);
    c.log_ratio_origin = Real(n.policy - n.reference);
    const double rest = rounding(n.policy, c.policy_origin);
    const double log_ratio_rest = rounding(n.policy - n.reference, c.log_ratio_origin);
    const double to_pi = inverse_temperature * exp2_of_rounding(rest);
    const double pi_1 = -kLn2 * g.policy_entropy, pi_x = kLn2 * g.kl;
    const double pi_0 = double(g.reverse_kl) - double(g.policy_logprob) - double(g.token_did_log_partition) -
                        double(g.policy_entropy) * double(value.policy_entropy) - double(g.kl) * double(value.kl);
    c.pi_0 = Real(to_pi * (pi_0 - pi_1 * rest - pi_x * log_ratio_rest));
    c.pi_1 = Real(to_pi * pi_1);
    c.pi_x = Real(to_pi * pi_x);
    c.pi_for_reference = Real(-to_pi * g.kl);
    c.policy_label = Real(inverse_temperature * g.policy_logprob);
  }

  LIT_DID_INLINE void reference(GradientCoefficients<Real>& c) const {
    c.reference_origin = Real(n.reference);
    const double rest = rounding(n.reference, c.reference_origin);
    const double log_ratio_rest = rounding(n.policy - n.reference, Real(n.policy - n.reference));
    const double to_rho = inverse_temperature * exp2_of_rounding(rest);
    const double rho_1 = -kLn2 * g.reference_entropy, rho_x = kLn2 * g.reverse_kl;
    const double rho_0 = double(g.kl) - double(g.reference_logprob) + double(g.token_did_log_partition) -
                         double(g.reference_entropy) * double(value.reference_entropy) -
                         double(g.reverse_kl) * double(value.reverse_kl);
    c.rho_0 = Real(to_rho * (rho_0 - rho_1 * rest + rho_x * log_ratio_rest));
    c.rho_1 = Real(to_rho * rho_1);
    c.rho_x = Real(to_rho * rho_x);
    c.rho_for_policy = Real(-to_rho * g.reverse_kl);
    c.reference_label = Real(inverse_temperature * g.reference_logprob);
  }

  LIT_DID_INLINE void difference(GradientCoefficients<Real>& c) const {
    c.difference_origin = Real(n.difference);
    const double rest = rounding(n.difference, c.difference_origin);
    const double to_q = inverse_temperature * exp2_of_rounding(rest);
    const double q_1 = -kLn2 * g.token_did_entropy;
    const double q_0 =
        double(g.token_did_log_partition) - double(g.token_did_entropy) * double(value.token_did_entropy);
    c.q_0 = Real(to_q * (q_0 - q_1 * rest));
    c.q_1 = Real(to_q * q_1);
    c.careful = n.flags != 0;
  }
};

template <typename Real>
LIT_DID_INLINE GradientCoefficients<Real> gradient_coefficients(const TokenStatistics<Real>& g,
                                                                const TokenStatistics<Real>& value,
                                                                const RowNormalizers& n, double inverse_temperature) {
  const CoefficientParts<Real> parts(g, value, n, inverse_temperature);
  GradientCoefficients<Real> c;
  parts.policy(c);
  parts.reference(c);
  parts.difference(c);
  return c;
}

}  // namespace lit_did
