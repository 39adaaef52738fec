// Runs the kernels on cases that tests/cuda/emulator.py writes, and writes back every buffer as they left it.
//
//     driver CASES RESULTS
//
// Both files are sequences of 64-bit numbers and raw bytes; emulator.py says in what order.
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <list>
#include <vector>

#include "partials.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
constexpr size_t kGuard = 0;  // the allocation's end is guarded already
#else
constexpr size_t kGuard = 64;
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace {

using namespace lit_did;

// Device memory of exactly `bytes`, `misalignment` bytes after a 64-byte boundary. Nobody may write around it.
struct Buffer {
  char* allocation = nullptr;
  char* data = nullptr;
  size_t bytes;

  Buffer(size_t bytes, size_t misalignment) : bytes(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, misalignment + bytes + kGuard) != 0) std::abort();
    allocation = static_cast<char*>(memory);
    data = allocation + misalignment;
    std::memset(allocation, 0xff, misalignment + bytes + kGuard);
    ASAN_POISON_MEMORY_REGION(allocation, misalignment);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(allocation, data - allocation);
    bool whole = true;
    for (char* byte = allocation; byte != data; ++byte) whole = whole && *byte == '\xff';
    for (char* byte = data + bytes; byte != data + bytes + kGuard; ++byte) whole = whole && *byte == '\xff';
    std::free(allocation);
    if (whole) return;
    std::fprintf(stderr, "driver: written outside a buffer of %zu bytes\n", bytes);
    std::_Exit(71);
  }
};

class Cases {
 public:
  explicit Cases(const char* path) : file_(path, std::ios::binary) {}

  int64_t integer() {
    int64_t value = 0;
    read(&value, sizeof(value));
    return value;
  }
  double real() { return std::bit_cast<double>(integer()); }

  // Bytes, misalignment, the bytes themselves, and the ranges of them that a kernel may touch.
  Buffer& buffer(std::list<Buffer>& buffers) {
    const int64_t bytes = integer(), misalignment = integer();
    Buffer& buffer = buffers.emplace_back(bytes, misalignment);
    read(buffer.data, bytes);
    ASAN_POISON_MEMORY_REGION(buffer.data, bytes);
    for (int64_t ranges = integer(); ranges > 0; --ranges) {
      [[maybe_unused]] const int64_t begin = integer(), end = integer();
      ASAN_UNPOISON_MEMORY_REGION(buffer.data + begin, end - begin);
    }
    return buffer;
  }

  cuda::Logits logits(std::list<Buffer>& buffers) {
    const ScalarKind kind = static_cast<ScalarKind>(integer());
    cuda::Logits logits{buffer(buffers).data, kind, {}};
    layout(logits);
    return logits;
  }

  // In place: the gradient's rows lie where their logits lie.
  cuda::Logits gradient(const cuda::Logits& of, std::list<Buffer>& buffers) {
    enum { kNone, kInPlace, kApart };
    const int64_t mode = integer();
    if (mode == kApart) return logits(buffers);
    return {mode == kInPlace ? of.data : nullptr, of.kind, of.layout};
  }

 private:
  void read(void* to, int64_t bytes) {
    if (!file_.read(static_cast<char*>(to), bytes)) std::abort();
  }
  void layout(cuda::Logits& logits) {
    logits.layout.dims = static_cast<int>(integer());
    for (int i = 0; i < logits.layout.dims; ++i) logits.layout.sizes[i] = integer();
    for (int i = 0; i < logits.layout.dims; ++i) logits.layout.strides[i] = integer();
  }

  std::ifstream file_;
};

class Results {
 public:
  explicit Results(const char* path) : file_(path, std::ios::binary) {}

  void integer(int64_t value) { file_.write(reinterpret_cast<const char*>(&value), sizeof(value)); }
  void buffers(std::list<Buffer>& buffers) {
    for (Buffer& buffer : buffers) {
      ASAN_UNPOISON_MEMORY_REGION(buffer.data, buffer.bytes);
      file_.write(buffer.data, static_cast<std::streamsize>(buffer.bytes));
    }
  }

 private:
  std::ofstream file_;
};

cuda::Logits slice_of(cuda::Logits logits, int64_t first) {
  const size_t bytes[] = {4, 2, 2, 8};  // by ScalarKind
  if (logits.data) logits.data = static_cast<char*>(logits.data) + first * bytes[static_cast<int>(logits.kind)];
  return logits;
}

cuda::Problem slice_of(cuda::Problem problem, const std::vector<int64_t>& first, size_t slice) {
  const int64_t end = slice + 1 < first.size() ? first[slice + 1] : problem.vocabulary;
  problem.policy = slice_of(problem.policy, first[slice]);
  problem.reference = slice_of(problem.reference, first[slice]);
  problem.vocabulary = end - first[slice];
  problem.first_entry = first[slice];
  return problem;
}

// As the linear operator's forward: the slices of a few tiles are merged into the first.
int64_t forward_in_slices(const cuda::ForwardArguments& forward, const std::vector<int64_t>& first) {
  const cuda::Problem& problem = forward.problem;
  constexpr int64_t kMost = 8;
  Buffer memory(kMost * problem.rows * sizeof(RowPartials), 0);
  cuda::SlicesArguments slices{reinterpret_cast<RowPartials*>(memory.data), problem.labels, 0, problem.rows,
                               problem.ignore_index};
  int64_t error = 0;
  for (size_t tile = 0; tile < first.size(); ++tile) {
    const cuda::Problem part = slice_of(problem, first, tile);
    if (slices.slices + cuda::parts_of(part.vocabulary) > kMost) {
      error |= cuda::merge(slices, nullptr);
      slices.slices = 1;
    }
    RowPartials* const partials = slices.partials + slices.slices * problem.rows;
    error |= cuda::partials({part, partials, problem.rows, cuda::kPartEntries}, nullptr);
    slices.slices += cuda::parts_of(part.vocabulary);
  }
  const bool is_double = problem.policy.kind == ScalarKind::kDouble;
  cuda::FinishArguments finish{slices, is_double ? ScalarKind::kDouble : ScalarKind::kFloat};
  for (int i = 0; i < kNumStatistics; ++i) finish.statistics[i] = forward.statistics[i];
  finish.normalizers = forward.normalizers;
  return error | cuda::finish(finish, nullptr);
}

void token_statistics(Cases& cases, Results& results) {
  std::list<Buffer> buffers;
  cuda::ForwardArguments forward{};
  cuda::Problem& problem = forward.problem;
  problem.rows = cases.integer();
  problem.vocabulary = cases.integer();
  problem.ignore_index = cases.integer();
  problem.temperature = cases.real();
  problem.policy = cases.logits(buffers);
  problem.reference = cases.logits(buffers);
  problem.labels = reinterpret_cast<const int64_t*>(cases.buffer(buffers).data);
  const size_t real = problem.policy.kind == ScalarKind::kDouble ? 8 : 4;
  for (void*& statistic : forward.statistics) statistic = buffers.emplace_back(problem.rows * real, 0).data;
  forward.normalizers =
      reinterpret_cast<RowNormalizers*>(buffers.emplace_back(problem.rows * sizeof(RowNormalizers), 0).data);
  // Where slices of the vocabulary begin, in a call for each; none for a call for the whole.
  std::vector<int64_t> first(cases.integer());
  for (int64_t& entry : first) entry = cases.integer();
  lit_did::emulation::exchanges = 0;
  int64_t error;
  if (first.empty()) {
    const int64_t workspace_bytes = cuda::forward_workspace_bytes(problem);
    Buffer workspace(workspace_bytes, 0);
    forward.workspace = workspace_bytes > 0 ? workspace.data : nullptr;
    error = cuda::forward(forward, nullptr);
  } else {
    error = forward_in_slices(forward, first);
  }
  results.integer(static_cast<int64_t>(lit_did::emulation::exchanges));
  results.integer(error);

  if (cases.integer() != 0) {
    cuda::BackwardArguments backward{};
    backward.problem = problem;
    for (int i = 0; i < kNumStatistics; ++i) {
      if (cases.integer() != 0) backward.grads[i] = cases.buffer(buffers).data;
      backward.statistics[i] = forward.statistics[i];
    }
    backward.normalizers = forward.normalizers;
    backward.grad_policy = cases.gradient(problem.policy, buffers);
    backward.grad_reference = cases.gradient(problem.reference, buffers);
    backward.policy_inverse_softcap = cases.real();
    backward.reference_inverse_softcap = cases.real();
    if (first.empty()) first = {0};
    int64_t any_error = 0;
    for (size_t slice = 0; slice < first.size(); ++slice) {
      cuda::BackwardArguments part = backward;
      part.problem = slice_of(problem, first, slice);
      part.grad_policy = slice_of(backward.grad_policy, first[slice]);
      part.grad_reference = slice_of(backward.grad_reference, first[slice]);
      any_error |= cuda::backward(part, nullptr);
    }
    results.integer(any_error);
  }
  results.buffers(buffers);
}

void sequence_statistics(Cases& cases, Results& results) {
  std::list<Buffer> buffers;
  cuda::SequenceArguments arguments{};
  arguments.kind = static_cast<ScalarKind>(cases.integer());
  arguments.sequences = cases.integer();
  arguments.length = cases.integer();
  arguments.tokens = cases.integer();
  arguments.ignore_index = cases.integer();
  for (int i = 0; i < kNumStatistics; ++i) arguments.statistics[i] = cases.buffer(buffers).data;
  arguments.labels = reinterpret_cast<const int64_t*>(cases.buffer(buffers).data);
  if (cases.integer() != 0) arguments.cu_seqlens = reinterpret_cast<const int64_t*>(cases.buffer(buffers).data);
  const size_t real = arguments.kind == ScalarKind::kDouble ? 8 : 4;
  for (void*& output : arguments.outputs) output = buffers.emplace_back(arguments.sequences * real, 0).data;
  arguments.num_tokens = reinterpret_cast<int64_t*>(buffers.emplace_back(arguments.sequences * 8, 0).data);
  results.integer(cuda::reduce_sequences(arguments, nullptr));
  results.buffers(buffers);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Cases cases(argv[1]);
  Results results(argv[2]);
  for (int64_t left = cases.integer(), done = 0; left > 0; --left, ++done) {
    std::fprintf(stderr, "case %lld\n", static_cast<long long>(done));
    lit_did::emulation::random.seed(static_cast<unsigned>(cases.integer()));
    enum { kTokens, kSequences };
    if (cases.integer() == kTokens)
      token_statistics(cases, results);
    else
      sequence_statistics(cases, results);
  }
  return 0;
}
