// Runs the row kernels of csrc/cpu on cases that tests/cuda/emulator.py writes, and writes back every buffer as they
// left it: what csrc/cpu/token_statistics.cpp does with tensors.
//
//     driver CASES RESULTS
//
// It needs C's library alone, so that building it for another processor takes seconds.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cpu/rows.h"

namespace {

using namespace lit_did;

void stop(const char* why, int status) {
  std::fprintf(stderr, "driver: %s\n", why);
  std::exit(status);
}

constexpr size_t kGuard = 64;
constexpr int kMostBuffers = 32;

// Memory of exactly `bytes`, `misalignment` bytes after a 64-byte boundary, with 0xff in and around it.
struct Buffer {
  char *allocation, *data;
  size_t misalignment, bytes;

  void make(size_t of_bytes, size_t misaligned) {
    bytes = of_bytes;
    misalignment = kGuard + misaligned;
    if (posix_memalign(reinterpret_cast<void**>(&allocation), 64, misalignment + bytes + kGuard) != 0) std::abort();
    data = allocation + misalignment;
    std::memset(allocation, 0xff, misalignment + bytes + kGuard);
  }
  void check() const {
    for (const char* byte = allocation; byte != data + bytes + kGuard; ++byte)
      if ((byte < data || byte >= data + bytes) && *byte != '\xff') stop("written outside a buffer", 71);
  }
};

struct Logits {
  char* data;  // null for a gradient that is not needed
  ScalarKind kind;
  int64_t dims, sizes[8], strides[8];

  char* at(int64_t row, int64_t entry) const {
    if (!data) return nullptr;
    constexpr size_t bytes[] = {4, 2, 2, 8};  // by ScalarKind
    int64_t offset = entry;
    for (int64_t i = dims; i-- > 0; row /= sizes[i]) offset += row % sizes[i] * strides[i];
    return data + offset * bytes[static_cast<int>(kind)];
  }
  double value(int64_t row, int64_t entry) const {
    const void* const from = at(row, entry);
    switch (kind) {
      case ScalarKind::kFloat:
        return *static_cast<const float*>(from);
      case ScalarKind::kBFloat16:
        return to_float(*static_cast<const BFloat16*>(from));
      case ScalarKind::kFloat16:
        return to_float(*static_cast<const Float16*>(from));
      default:
        return *static_cast<const double*>(from);
    }
  }
};

class Case {
 public:
  Case(std::FILE* cases, std::FILE* results) : cases_(cases), results_(results) {}

  void run() {
    integer();  // the emulator's seed
    if (integer() != 0) stop("only token statistics are computed here", 72);
    rows_ = integer();
    vocabulary_ = integer();
    ignore_index_ = integer();
    read(&temperature_, sizeof(temperature_));
    policy_ = logits();
    reference_ = logits();
    labels_ = reinterpret_cast<const int64_t*>(buffer());
    policy_.kind == ScalarKind::kDouble ? both<double>() : both<float>();
    for (int i = 0; i < num_buffers_; ++i) {
      buffers_[i].check();
      write(buffers_[i].data, buffers_[i].bytes);
      std::free(buffers_[i].allocation);
    }
  }

 private:
  template <typename Real>
  void both() {
    const Real scale = static_cast<Real>(kLog2e / temperature_);
    void* statistics[kNumStatistics];
    for (void*& statistic : statistics) statistic = filled_with_zeros(rows_ * sizeof(Real));
    auto* const normalizers = reinterpret_cast<RowNormalizers*>(filled_with_zeros(rows_ * sizeof(RowNormalizers)));
    if (integer() != 0) stop("slices are not computed here", 73);
    for (int64_t row = 0; row < rows_; ++row)
      if (labels_[row] != ignore_index_) forward(row, scale, statistics, normalizers);
    answer(0);  // exchanges between the lanes of a warp
    answer(0);  // no error
    if (integer() == 0) return;

    const void* grads[kNumStatistics] = {};
    bool logprobs_only = true;
    for (int i = 0; i < kNumStatistics; ++i) {
      if (integer() == 0) continue;
      grads[i] = buffer();
      if (i >= 2) logprobs_only = false;
    }
    const Logits policy = gradient_of(policy_), reference = gradient_of(reference_);
    read(inverse_softcaps_, sizeof(inverse_softcaps_));
    for (int64_t row = 0; row < rows_; ++row)
      backward<Real>(row, scale, grads, statistics, normalizers[row], logprobs_only, policy, reference);
    answer(0);
  }

  template <typename Real>
  void forward(int64_t row, Real scale, void* const* outputs, RowNormalizers* normalizers) {
    const auto accumulate =
        baseline_rows().accumulate[static_cast<int>(policy_.kind)][static_cast<int>(reference_.kind)];
    RowStatistics<Real, double> sums;
    for (int64_t begin = 0; begin < vocabulary_; begin += kSplit) {
      RowStatistics<Real, double> split;
      accumulate(policy_.at(row, begin), reference_.at(row, begin), size_from(begin), scale, &split);
      begin == 0 ? void(sums = split) : sums.merge(split);
    }
    const double limit = static_cast<Real>(kLargestLogit * kLog2e / scale);
    const auto label_of = [&](const Logits& side) {
      return effective_logit(side.value(row, labels_[row]), limit) * scale;
    };
    write_statistics<Real>(sums.finish(vocabulary_, label_of(policy_), label_of(reference_), normalizers + row),
                           outputs, row);
  }

  template <typename Real>
  void backward(int64_t row, Real scale, const void* const* grads, void* const* statistics,
                const RowNormalizers& normalizers, bool logprobs_only, const Logits& policy, const Logits& reference) {
    const auto write = baseline_rows().gradient[static_cast<int>(policy_.kind)][static_cast<int>(reference_.kind)];
    const auto gather = [&](const void* const* from) {
      TokenStatistics<Real> all{};
      for (int i = 0; i < kNumStatistics; ++i)
        if (from[i])
          std::memcpy(reinterpret_cast<Real*>(&all) + i, static_cast<const Real*>(from[i]) + row, sizeof(Real));
      return all;
    };
    for (int64_t begin = 0; begin < vocabulary_; begin += kSplit) {
      const int64_t size = size_from(begin);
      const bool ignored = labels_[row] == ignore_index_;
      if (ignored || std::isnan(normalizers.policy)) {
        fill(policy, row, begin, size, ignored);
        fill(reference, row, begin, size, ignored);
        continue;
      }
      const RowCoefficients<Real> coefficients(
          gradient_coefficients<Real>(gather(grads), gather(statistics), normalizers, 1 / temperature_),
          inverse_softcaps_[0], inverse_softcaps_[1]);
      write(policy_.at(row, begin), reference_.at(row, begin), size, labels_[row] - begin, scale, &coefficients,
            logprobs_only, false, policy.at(row, begin), reference.at(row, begin));
    }
  }

  static void fill(const Logits& gradient, int64_t row, int64_t begin, int64_t size, bool with_zeros) {
    if (gradient.data) std::memset(gradient.at(row, begin), with_zeros ? 0 : 0xff, size * bytes_of(gradient));
  }
  static size_t bytes_of(const Logits& of) { return of.at(0, 1) - of.at(0, 0); }

  int64_t size_from(int64_t begin) const { return vocabulary_ - begin < kSplit ? vocabulary_ - begin : kSplit; }

  Logits gradient_of(Logits side) {
    enum { kNone, kInPlace, kApart };
    const int64_t mode = integer();
    if (mode == kApart) return logits();
    if (mode == kNone) side.data = nullptr;
    return side;
  }

  Logits logits() {
    Logits logits{};
    logits.kind = static_cast<ScalarKind>(integer());
    logits.data = buffer();
    logits.dims = integer();
    for (int64_t i = 0; i < logits.dims; ++i) logits.sizes[i] = integer();
    for (int64_t i = 0; i < logits.dims; ++i) logits.strides[i] = integer();
    return logits;
  }

  char* buffer() {
    const int64_t bytes = integer(), misalignment = integer();
    Buffer& buffer = new_buffer(bytes, misalignment);
    read(buffer.data, bytes);
    for (int64_t ranges = integer(); ranges > 0; --ranges) integer(), integer();  // for sanitizers
    return buffer.data;
  }
  char* filled_with_zeros(int64_t bytes) {
    char* const data = new_buffer(bytes, 0).data;
    std::memset(data, 0, bytes);
    return data;
  }
  Buffer& new_buffer(int64_t bytes, int64_t misalignment) {
    if (num_buffers_ == kMostBuffers) std::abort();
    buffers_[num_buffers_].make(bytes, misalignment);
    return buffers_[num_buffers_++];
  }

  int64_t integer() {
    int64_t value = 0;
    read(&value, sizeof(value));
    return value;
  }
  void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, cases_) != bytes) stop("the cases end too early", 74);
  }
  void answer(int64_t value) { write(&value, sizeof(value)); }
  void write(const void* from, size_t bytes) {
    if (std::fwrite(from, 1, bytes, results_) != bytes) stop("cannot write the results", 75);
  }

  std::FILE *cases_, *results_;
  Buffer buffers_[kMostBuffers];
  int num_buffers_ = 0;
  int64_t rows_, vocabulary_, ignore_index_;
  double temperature_, inverse_softcaps_[2];
  Logits policy_, reference_;
  const int64_t* labels_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::FILE* const cases = std::fopen(argv[1], "rb");
  std::FILE* const results = std::fopen(argv[2], "wb");
  if (!cases || !results) stop("cannot open the files", 76);
  int64_t left = 0;
  if (std::fread(&left, sizeof(left), 1, cases) != 1) return 2;
  for (; left > 0; --left) Case(cases, results).run();
  return std::fclose(results);
}
