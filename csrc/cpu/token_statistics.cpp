// token_statistics, its backward, and the partial statistics of a slice on the CPU.
//
// Computes   nine statistics a row of two [V] logits rows, and the gradient of all of them.
// Reads      both rows once from memory, forward and backward; ignored rows not at all.
// Keeps      five numbers a row; never anything of size [rows, V] but the gradient itself.
// Threads    take a row at a time (backward: a split of a row) until none is left, so that ignored rows, wherever they
//            lie, leave no thread idle; with few rows they share the splits of each. A row's bits depend on V alone.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#include "dispatch.h"
#include "outputs.h"

namespace lit_did {
namespace {

int64_t num_threads() { return torch::stable::get_num_threads(); }

size_t bytes_of(const Tensor& tensor) { return tensor.numel() * tensor.element_size(); }

// Address of each row of [..., V] from its entry `begin` on, whatever the strides of the leading dimensions.
class Rows {
 public:
  explicit Rows(const Tensor& logits, int64_t begin = 0)
      : base_(static_cast<char*>(const_cast<void*>(logits.const_data_ptr()))),
        itemsize_(static_cast<int64_t>(logits.element_size())),
        sizes_(logits.sizes().slice(0, logits.dim() - 1).vec()),
        strides_(logits.strides().slice(0, logits.dim() - 1).vec()) {
    base_ += begin * itemsize_;
  }

  char* row(int64_t index) const {
    int64_t offset = 0;
    for (size_t i = sizes_.size(); i-- > 0;) {
      offset += index % sizes_[i] * strides_[i];
      index /= sizes_[i];
    }
    return base_ + offset * itemsize_;
  }
  char* at(int64_t index, int64_t entry) const { return row(index) + entry * itemsize_; }

 private:
  char* base_;
  int64_t itemsize_;
  std::vector<int64_t> sizes_, strides_;
};

double value_at(const void* row, int64_t index, ScalarKind kind) {
  switch (kind) {
    case ScalarKind::kFloat:
      return static_cast<const float*>(row)[index];
    case ScalarKind::kBFloat16:
      return to_float(static_cast<const BFloat16*>(row)[index]);
    case ScalarKind::kFloat16:
      return to_float(static_cast<const Float16*>(row)[index]);
    default:
      return static_cast<const double*>(row)[index];
  }
}

// Calls `work(task)` for each of [0, count), once each, from every thread; whoever is free takes the next. The threads
// are torch's: it starts them inside its own library, with the OpenMP that it brings along (libgomp on Linux, libomp on
// macOS). Nothing here is compiled with OpenMP.
template <typename Work>
void share(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(count, num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(task);
  });
}

// The two sides of a forward, `vocabulary` entries from `begin` on, and what their rows have in common.
template <typename Real>
struct Sides {
  Rows policy, reference;
  ScalarKind policy_kind, reference_kind;
  int64_t vocabulary;
  Real scale;
  double limit;  // as the row kernels have it

  Sides(const Tensor& policy_logits, const Tensor& reference_logits, double temperature, int64_t begin, int64_t entries)
      : policy(policy_logits, begin),
        reference(reference_logits, begin),
        policy_kind(kind_of(policy_logits)),
        reference_kind(kind_of(reference_logits)),
        vocabulary(entries),
        scale(static_cast<Real>(kLog2e / temperature)),
        limit(static_cast<Real>(kLargestLogit * kLog2e / scale)) {}

  // The label's logits times scale.
  double policy_at(int64_t row, int64_t label) const {
    return effective_logit(value_at(policy.row(row), label, policy_kind), limit) * scale;
  }
  double reference_at(int64_t row, int64_t label) const {
    return effective_logit(value_at(reference.row(row), label, reference_kind), limit) * scale;
  }
};

// Calls `finish(row, statistics)` for every row whose label counts, from any thread.
template <typename Real, typename Finish>
void each_row(const Sides<Real>& sides, const Tensor& labels, int64_t ignore_index, const Finish& finish) {
  const AccumulateFn accumulate =
      cpu::rows().accumulate[static_cast<int>(sides.policy_kind)][static_cast<int>(sides.reference_kind)];
  const int64_t num_rows = labels.numel();
  const int64_t num_splits = (sides.vocabulary + kSplit - 1) / kSplit;
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const auto split = [&](int64_t row, int64_t index) {
    RowStatistics<Real, double> statistics;
    const int64_t begin = index * kSplit;
    accumulate(sides.policy.at(row, begin), sides.reference.at(row, begin), std::min(kSplit, sides.vocabulary - begin),
               sides.scale, &statistics);
    return statistics;
  };

  constexpr size_t kLargestPartial = 1 << 18;  // bytes, so that memory does not grow with the number of threads
  const bool few_rows = num_rows < 4 * num_threads();
  if (num_splits == 1 || !few_rows || num_rows * num_splits * sizeof(RowStatistics<Real, double>) > kLargestPartial) {
    share(num_rows, [&](int64_t row) {
      if (label[row] == ignore_index) return;
      RowStatistics<Real, double> statistics = split(row, 0);
      for (int64_t i = 1; i < num_splits; ++i) statistics.merge(split(row, i));
      finish(row, statistics);
    });
    return;
  }
  // Few rows: share each row's splits, then merge them in the same order.
  std::vector<RowStatistics<Real, double>> partial(num_rows * num_splits);
  share(num_rows * num_splits, [&](int64_t task) {
    if (label[task / num_splits] != ignore_index) partial[task] = split(task / num_splits, task % num_splits);
  });
  for (int64_t row = 0; row < num_rows; ++row) {
    if (label[row] == ignore_index) continue;
    RowStatistics<Real, double>& statistics = partial[row * num_splits];
    for (int64_t i = 1; i < num_splits; ++i) statistics.merge(partial[row * num_splits + i]);
    finish(row, statistics);
  }
}

template <typename Real>
void forward(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels, int64_t ignore_index,
             double temperature, const Outputs& outputs) {
  const Sides<Real> sides(policy_logits, reference_logits, temperature, 0, policy_logits.sizes().back());
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < labels.numel(); ++row)
    need(label[row] == ignore_index || (label[row] >= 0 && label[row] < sides.vocabulary),
         "`labels` in [0, V) or equal to `ignore_index`");
  const RowWriter<Real> write(outputs);
  each_row(sides, labels, ignore_index, [&](int64_t row, const RowStatistics<Real, double>& sums) {
    const int64_t y = label[row];
    RowNormalizers normalizers;
    const auto statistics =
        sums.finish(sides.vocabulary, sides.policy_at(row, y), sides.reference_at(row, y), &normalizers);
    write(row, statistics, normalizers);
  });
}

// `begin` and `entries`: of the slice, in the logits. `first_entry`: of the logits, in the whole vocabulary.
template <typename Real>
void partials_of_rows(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels, int64_t begin,
                      int64_t entries, int64_t first_entry, int64_t ignore_index, double temperature,
                      RowPartials* partial) {
  const Sides<Real> sides(policy_logits, reference_logits, temperature, begin, entries);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  each_row(sides, labels, ignore_index, [&](int64_t row, const RowStatistics<Real, double>& statistics) {
    const int64_t entry = label[row] - first_entry - begin;
    const bool held = label[row] >= first_entry + begin && entry < entries;
    partial[row] = partials_of(statistics, entries, held, held ? sides.policy_at(row, entry) : 0,
                               held ? sides.reference_at(row, entry) : 0);
  });
}

void fill_row(char* row, int64_t size, ScalarKind kind, bool nan) {
  switch (kind) {
    case ScalarKind::kFloat:
      std::fill_n(reinterpret_cast<float*>(row), size, nan ? NAN : 0.0f);
      break;
    case ScalarKind::kDouble:
      std::fill_n(reinterpret_cast<double*>(row), size, nan ? static_cast<double>(NAN) : 0.0);
      break;
    case ScalarKind::kBFloat16:
      std::fill_n(reinterpret_cast<uint16_t*>(row), size, nan ? uint16_t{0x7fc0} : uint16_t{0});
      break;
    case ScalarKind::kFloat16:
      std::fill_n(reinterpret_cast<uint16_t*>(row), size, nan ? uint16_t{0x7e00} : uint16_t{0});
      break;
  }
}

constexpr size_t kLargeGradient = 1 << 25;  // bytes: more than caches hold

// Where one side's gradient goes.
struct Gradient {
  Tensor tensor;
  bool is_zero = false;  // already, everywhere
};

// Memory for a gradient. First touching large new memory in small pages takes as long as the gradient itself. On Linux
// it is therefore mapped here, in huge pages where the system grants them; it comes as zeros, so that the rows of
// ignored labels are neither written nor ever touched.
Gradient new_gradient(const Tensor& logits) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 1 << 21;
  if (bytes_of(logits) >= kLargeGradient) {
    const size_t bytes = bytes_of(logits) + kHugePage;
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED) {
      const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
      madvise(reinterpret_cast<void*>(begin), bytes_of(logits), MADV_HUGEPAGE);  // a hint
      return {
          torch::stable::from_blob(reinterpret_cast<void*>(begin), logits.sizes(), contiguous_strides(logits.sizes()),
                                   logits.device(), logits.scalar_type(), [=](void*) { munmap(memory, bytes); }),
          true};
    }
  }
#endif
  return {empty(logits.sizes(), logits.scalar_type(), logits)};
}

template <typename Real>
void backward(const OptionalTensorList& grads, const Tensor& policy_logits, const Tensor& reference_logits,
              const Tensor& labels, const TensorList& statistics, const Tensor& normalizers, int64_t first_entry,
              int64_t ignore_index, double temperature, const InverseSoftcaps& softcaps, const Gradient* grad_policy,
              const Gradient* grad_reference) {
  const Rows policy(policy_logits), reference(reference_logits);
  const ScalarKind policy_kind = kind_of(policy_logits), reference_kind = kind_of(reference_logits);
  const GradientFn gradient = cpu::rows().gradient[static_cast<int>(policy_kind)][static_cast<int>(reference_kind)];
  const int64_t vocabulary = policy_logits.sizes().back();
  const Real scale = static_cast<Real>(kLog2e / temperature);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const RowNormalizers* normalizer = reinterpret_cast<const RowNormalizers*>(normalizers.const_data_ptr<double>());
  std::array<const Real*, kNumStatistics> grad{}, value{};
  bool logprobs_only = true;
  for (int i = 0; i < kNumStatistics; ++i) {
    if (grads[i]) {
      grad[i] = grads[i]->const_data_ptr<Real>();
      if (i >= 2) logprobs_only = false;
    }
    value[i] = statistics[i].const_data_ptr<Real>();
  }
  const auto gather = [](const std::array<const Real*, kNumStatistics>& from, int64_t row) {
    const auto at = [&](int i) { return from[i] ? from[i][row] : Real(0); };
    return TokenStatistics<Real>{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
  };

  const Rows policy_grad(grad_policy ? grad_policy->tensor : policy_logits);
  const Rows reference_grad(grad_reference ? grad_reference->tensor : reference_logits);
  const int64_t num_splits = (vocabulary + kSplit - 1) / kSplit;
  const auto in_new_memory = [](const Tensor& to, const Tensor& from) {
    return to.const_data_ptr() != from.const_data_ptr() && bytes_of(to) >= kLargeGradient;
  };
  const bool large = grad_policy ? in_new_memory(grad_policy->tensor, policy_logits)
                                 : in_new_memory(grad_reference->tensor, reference_logits);
  share(labels.numel() * num_splits, [&](int64_t task) {
    const int64_t row = task / num_splits, begin = task % num_splits * kSplit;
    const int64_t size = std::min(kSplit, vocabulary - begin);
    char* policy_at = grad_policy ? policy_grad.at(row, begin) : nullptr;
    char* reference_at = grad_reference ? reference_grad.at(row, begin) : nullptr;
    const bool ignored = label[row] == ignore_index;
    if (ignored || std::isnan(normalizer[row].policy)) {
      if (grad_policy && !(ignored && grad_policy->is_zero)) fill_row(policy_at, size, policy_kind, !ignored);
      if (grad_reference && !(ignored && grad_reference->is_zero))
        fill_row(reference_at, size, reference_kind, !ignored);
      return;
    }
    const RowCoefficients<Real> coefficients(
        gradient_coefficients(gather(grad, row), gather(value, row), normalizer[row], 1 / temperature), softcaps.policy,
        softcaps.reference);
    gradient(policy.at(row, begin), reference.at(row, begin), size, label[row] - first_entry - begin, scale,
             &coefficients, logprobs_only, large, policy_at, reference_at);
  });
}

// Checks what both backwards take, and writes the gradients. A gradient may be its side's logits: an entry is read
// before it is written.
void write_gradients(const OptionalTensorList& grads, const Tensor& policy_logits, const Tensor& reference_logits,
                     const Tensor& labels, const TensorList& statistics, const Tensor& normalizers, int64_t first_entry,
                     int64_t ignore_index, double temperature, const InverseSoftcaps& softcaps,
                     const Gradient* grad_policy, const Gradient* grad_reference) {
  const BackwardTensors t = check_backward_arguments(grads, labels, statistics, normalizers);
  if (!grad_policy && !grad_reference) return;
  const auto write = statistics_dtype(policy_logits) == ScalarType::Double ? backward<double> : backward<float>;
  write(t.grads, policy_logits, reference_logits, t.labels, t.statistics, t.normalizers, first_entry, ignore_index,
        temperature, softcaps, grad_policy, grad_reference);
}

}  // namespace

TokenTensors token_statistics_cpu(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels,
                                  int64_t ignore_index, double temperature, bool /*inplace_backward*/) {
  check_token_arguments(policy_logits, reference_logits, labels, temperature);
  const auto dtype = statistics_dtype(policy_logits);
  const Outputs outputs(labels, dtype);
  (dtype == ScalarType::Double ? forward<double> : forward<float>)(policy_logits, reference_logits,
                                                                   as_contiguous(labels), ignore_index, temperature,
                                                                   outputs);
  return outputs.tensors();
}

std::tuple<Tensor, Tensor> token_statistics_backward_cpu(const OptionalTensorList& grads, const Tensor& policy_logits,
                                                         const Tensor& reference_logits, const Tensor& labels,
                                                         const TensorList& statistics, const Tensor& normalizers,
                                                         int64_t ignore_index, double temperature,
                                                         bool policy_needs_grad, bool reference_needs_grad) {
  check_token_arguments(policy_logits, reference_logits, labels, temperature);
  const auto new_or_empty = [](const Tensor& logits, bool needed) {
    return needed ? new_gradient(logits) : Gradient{empty({0}, logits.scalar_type(), logits)};
  };
  const Gradient grad_policy = new_or_empty(policy_logits, policy_needs_grad);
  const Gradient grad_reference = new_or_empty(reference_logits, reference_needs_grad);
  write_gradients(grads, policy_logits, reference_logits, labels, statistics, normalizers, 0, ignore_index, temperature,
                  {}, policy_needs_grad ? &grad_policy : nullptr, reference_needs_grad ? &grad_reference : nullptr);
  return {grad_policy.tensor, grad_reference.tensor};
}

void token_statistics_backward_inplace_cpu(const OptionalTensorList& grads, const Tensor& policy_logits,
                                           const Tensor& reference_logits, const Tensor& labels,
                                           const TensorList& statistics, const Tensor& normalizers,
                                           int64_t ignore_index, double temperature, bool policy_needs_grad,
                                           bool reference_needs_grad, int64_t first_entry,
                                           std::optional<double> policy_softcap,
                                           std::optional<double> reference_softcap) {
  check_token_arguments(policy_logits, reference_logits, labels, temperature);
  if (policy_needs_grad) own_memory(policy_logits);
  if (reference_needs_grad) own_memory(reference_logits);
  const Gradient over_policy{policy_logits}, over_reference{reference_logits};
  write_gradients(grads, policy_logits, reference_logits, labels, statistics, normalizers, first_entry, ignore_index,
                  temperature, InverseSoftcaps(policy_softcap, reference_softcap),
                  policy_needs_grad ? &over_policy : nullptr, reference_needs_grad ? &over_reference : nullptr);
}

void token_partials_cpu(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels_,
                        const Tensor& partials, int64_t slice_entries, int64_t first_entry, int64_t ignore_index,
                        double temperature) {
  check_token_arguments(policy_logits, reference_logits, labels_, temperature);
  const int64_t entries = policy_logits.sizes().back();
  check_partials(partials, labels_, entries, slice_entries);
  const Tensor labels = as_contiguous(labels_);
  const auto write =
      statistics_dtype(policy_logits) == ScalarType::Double ? partials_of_rows<double> : partials_of_rows<float>;
  RowPartials* partial = reinterpret_cast<RowPartials*>(partials.mutable_data_ptr<double>());
  for (int64_t slice = 0; slice < partials.size(0); ++slice) {
    const int64_t begin = slice * slice_entries;
    write(policy_logits, reference_logits, labels, begin, std::min(slice_entries, entries - begin), first_entry,
          ignore_index, temperature, partial + slice * (partials.stride(0) / kNumPartials));
  }
}

}  // namespace lit_did
