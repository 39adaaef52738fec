// What a slice of a vocabulary says about one row, as numbers that lie in a tensor, pass between processes and merge in
// any grouping. Plain C++ without torch, shared by every device.
//
// Slices are the tiles of an output layer, and the parts of it that several processes hold. The numbers are the sums of
// RowStatistics and not statistics of the slice, so a slice may hold nothing of one side, or no entry that both sides
// have. It need not be a vocabulary by itself.
#pragma once

#include "row_statistics.h"

namespace lit_did {

struct RowPartials {
  // RowStatistics in double precision: three origins and eight sums.
  double policy_max, reference_max, difference_max;
  double policy_weight, policy_log, policy_log_ratio;
  double reference_weight, reference_log, reference_log_ratio;
  double difference_weight, difference_log;
  double support;                        // entries of the slice in the support
  double flags;                          // RowFlag
  double holds_label;                    // 1 if the label is in the slice, else 0
  double policy_label, reference_label;  // the label's two logits times scale; 0 if it is elsewhere

  // The sums with a support of `support` entries and none outside it.
  LIT_DID_INLINE RowStatistics<double, double> statistics() const {
    RowStatistics<double, double> s;
    s.policy_max = policy_max;
    s.reference_max = reference_max;
    s.difference_max = difference_max;
    s.policy_weight = policy_weight;
    s.policy_log = policy_log;
    s.policy_log_ratio = policy_log_ratio;
    s.reference_weight = reference_weight;
    s.reference_log = reference_log;
    s.reference_log_ratio = reference_log_ratio;
    s.difference_weight = difference_weight;
    s.difference_log = difference_log;
    s.flags = static_cast<int>(flags);
    return s;
  }

  // The nine statistics. A label that no slice holds has log-probabilities NaN.
  LIT_DID_INLINE TokenStatistics<double> finish(RowNormalizers* normalizers) const {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const bool held = holds_label > 0;
    return statistics().finish(static_cast<int64_t>(support), held ? policy_label : nan, held ? reference_label : nan,
                               normalizers);
  }
};

constexpr int kNumPartials = 16;
static_assert(sizeof(RowPartials) == kNumPartials * sizeof(double), "a row of a tensor");

LIT_DID_INLINE RowPartials with_sums(RowPartials p, const RowStatistics<double, double>& s) {
  p.policy_max = s.policy_max;
  p.reference_max = s.reference_max;
  p.difference_max = s.difference_max;
  p.policy_weight = s.policy_weight;
  p.policy_log = s.policy_log;
  p.policy_log_ratio = s.policy_log_ratio;
  p.reference_weight = s.reference_weight;
  p.reference_log = s.reference_log;
  p.reference_log_ratio = s.reference_log_ratio;
  p.difference_weight = s.difference_weight;
  p.difference_log = s.difference_log;
  p.flags = s.flags;
  return p;
}

// Of a slice of `size` entries, given the label's two logits times scale if the slice holds it.
template <typename Real, typename Sum>
LIT_DID_INLINE RowPartials partials_of(const RowStatistics<Real, Sum>& row, int64_t size, bool holds_label,
                                       double policy_label, double reference_label) {
  RowStatistics<double, double> s;
  s.policy_max = row.policy_max;
  s.reference_max = row.reference_max;
  s.difference_max = row.difference_max;
  s.policy_weight = row.policy_weight;
  s.policy_log = row.policy_log;
  s.reference_weight = row.reference_weight;
  s.reference_log = row.reference_log;
  s.difference_weight = row.difference_weight;
  s.difference_log = row.difference_log;
  s.flags = row.flags;
  // The entries saw the origin of x rounded to Real.
  const double rounding = double(row.log_ratio_origin()) - s.log_ratio_origin();
  s.policy_log_ratio = row.policy_log_ratio + rounding * s.policy_weight;
  s.reference_log_ratio = row.reference_log_ratio + rounding * s.reference_weight;
  RowPartials p{};
  p.support = double(size) - double(row.outside);
  p.holds_label = holds_label ? 1 : 0;
  p.policy_label = holds_label ? policy_label : 0;
  p.reference_label = holds_label ? reference_label : 0;
  return with_sums(p, s);
}

// Of both slices together.
LIT_DID_INLINE RowPartials merged(const RowPartials& a, const RowPartials& b) {
  RowStatistics<double, double> s = a.statistics();
  s.merge(b.statistics());
  RowPartials p{};
  p.support = a.support + b.support;
  p.holds_label = a.holds_label + b.holds_label;
  p.policy_label = a.policy_label + b.policy_label;
  p.reference_label = a.reference_label + b.reference_label;
  return with_sums(p, s);
}

}  // namespace lit_did
