// The part of CUDA that the kernels use, on the host: csrc/cuda/device.cuh includes this under LIT_DID_CUDA_EMULATION.
//
// Blocks run one after another, in an order that the seed decides. A block's threads are fibers: one runs until it
// synchronises, then the seed decides which goes on, so that a kernel whose result depends on that order, for want of a
// barrier, shows it. Under ThreadSanitizer they are host threads instead, one per CUDA thread, and nothing but the
// kernel's own barriers orders what they do.
//
// The process ends with a message where a barrier is not reached by every thread, or two barriers meet.
#pragma once

#include <math.h>  // fmax, exp2 and the like for every type without std::, as in device code
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <source_location>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

// All shared memory: see shared_memory.ld.
extern "C" {
extern char lit_did_shared_begin[], lit_did_shared_end[];
}

namespace lit_did::emulation {

constexpr int kLanes = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;
#if defined(__SANITIZE_THREAD__)
constexpr bool kFibers = false;
#else
constexpr bool kFibers = true;
#endif

using Where = std::source_location;

inline std::minstd_rand random;  // seeded by the driver
inline cudaError_t last_error = cudaSuccess;
inline std::atomic<uint64_t> exchanges{0};  // how often a lane gave the others of its warp a value

struct Thread;

struct Barrier {
  int expected = 0;
  std::atomic<int> arrived{0};
  std::atomic<unsigned> generation{0};
  std::atomic<unsigned> line{0};  // where the first to arrive waits; 0: nobody does
  std::vector<Thread*> waiting;   // fibers
};

// A thread counts itself as waiting only after it arrived: the number may fall below its origin meanwhile.
constexpr int64_t kNone = int64_t(1) << 16, kFinished = int64_t(1) << 32;

// Lanes exchange values through `slots`. Two sets, in turn: nobody is two exchanges ahead of another.
struct Warp {
  Barrier barrier;
  uint64_t slots[2][kLanes];
};

struct Block {
  uint3 index, grid, size;
  const std::function<void()>* body;
  int threads;
  Barrier barrier;
  std::vector<Warp> warps;
  // Threads that wait or have finished, from kNone; plus kFinished times those that have finished.
  std::atomic<int64_t> stopped{kNone};
  std::vector<Thread*> runnable;  // fibers
};

struct Thread {
  uint3 index;
  Block* block;
  Warp* warp;
  int lane;
  unsigned exchanges = 0;
  ucontext_t context;
};

inline thread_local Thread* current = nullptr;
inline ucontext_t scheduler;

[[noreturn]] inline void fail(const Block& block, const char* what, unsigned line, unsigned other_line = 0) {
  std::fprintf(stderr, "emulation: block (%u, %u, %u): %s, line %u", block.index.x, block.index.y, block.index.z, what,
               line);
  if (other_line) std::fprintf(stderr, " and line %u", other_line);
  std::fprintf(stderr, "\n");
  std::_Exit(70);
}

// Counts one more thread as stopped. When none is left to run, those that wait do so for ever.
inline void stop(Block& block, int64_t count) {
  const int64_t stopped = block.stopped.fetch_add(count, std::memory_order_relaxed) + count;
  if (stopped % kFinished - kNone < block.threads || stopped / kFinished == block.threads) return;
  unsigned line = block.barrier.line.load(std::memory_order_relaxed);
  for (const Warp& warp : block.warps) line = line ? line : warp.barrier.line.load(std::memory_order_relaxed);
  fail(block, "divergence: a barrier that not every thread reaches", line);
}

// Every access to the block's state but the barrier's own is relaxed: it must not order what the kernel leaves
// unordered.
inline void wait(Barrier& barrier, const Where& where) {
  Block& block = *current->block;
  unsigned line = 0;
  if (!barrier.line.compare_exchange_strong(line, where.line(), std::memory_order_relaxed) && line != where.line())
    fail(block, "divergence: threads of one barrier wait in different places", line, where.line());
  const unsigned generation = barrier.generation.load(std::memory_order_relaxed);
  if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == barrier.expected) {
    barrier.arrived.store(0, std::memory_order_relaxed);
    barrier.line.store(0, std::memory_order_relaxed);
    block.stopped.fetch_sub(barrier.expected - 1, std::memory_order_relaxed);
    barrier.generation.fetch_add(1, std::memory_order_release);
    if constexpr (kFibers) {
      block.runnable.insert(block.runnable.end(), barrier.waiting.begin(), barrier.waiting.end());
      barrier.waiting.clear();
    } else {
      barrier.generation.notify_all();
    }
  } else {
    if constexpr (kFibers) barrier.waiting.push_back(current);
    stop(block, 1);
    if constexpr (kFibers)
      swapcontext(&current->context, &scheduler);
    else
      while (barrier.generation.load(std::memory_order_acquire) == generation) barrier.generation.wait(generation);
  }
}

inline void run_thread() {
  (*current->block->body)();
  stop(*current->block, kFinished + 1);
}

inline void run_fibers(Block& block, std::vector<Thread>& threads) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < threads.size()) stacks.emplace_back(new char[kStackBytes]);
  for (size_t i = 0; i < threads.size(); ++i) {
    ucontext_t& context = threads[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = &scheduler;
    makecontext(&context, run_thread, 0);
    block.runnable.push_back(&threads[i]);
  }
  while (!block.runnable.empty()) {
    std::swap(block.runnable[random() % block.runnable.size()], block.runnable.back());
    current = block.runnable.back();
    block.runnable.pop_back();
    swapcontext(&scheduler, &current->context);
  }
}

inline void run_host_threads(std::vector<Thread>& threads) {
  std::vector<std::thread> host;
  for (Thread& thread : threads) {
    host.emplace_back([&thread] {
      current = &thread;
      run_thread();
    });
  }
  for (std::thread& thread : host) thread.join();
}

// Every block finds NaN in shared memory. AddressSanitizer keeps to itself what lies between variables: hence volatile,
// which is not a call to memset that it would check.
__attribute__((no_sanitize("address", "thread"))) inline void poison_shared_memory() {
  for (volatile char* byte = lit_did_shared_begin; byte != lit_did_shared_end; ++byte) *byte = -1;
}

inline void run_block(dim3 grid, dim3 size, uint3 index, const std::function<void()>& body) {
  const int count = static_cast<int>(size.x);
  Block block{.index = index,
              .grid = {grid.x, grid.y, grid.z},
              .size = {size.x, size.y, size.z},
              .body = &body,
              .threads = count,
              .barrier = {},
              .warps = std::vector<Warp>(count / kLanes),
              .runnable = {}};
  block.barrier.expected = count;
  for (Warp& warp : block.warps) warp.barrier.expected = kLanes;
  std::vector<Thread> threads(count);
  for (int i = 0; i < count; ++i) {
    threads[i].index = {static_cast<unsigned>(i), 0, 0};
    threads[i].block = &block;
    threads[i].warp = &block.warps[i / kLanes];
    threads[i].lane = i % kLanes;
  }
  poison_shared_memory();
  if constexpr (kFibers)
    run_fibers(block, threads);
  else
    run_host_threads(threads);
}

// What `kernel<<<grid, threads>>>` is on a device. Here whole warps in one dimension are enough.
inline void launch(dim3 grid, dim3 threads, const std::function<void()>& body) {
  const bool fits = grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 0xffff && grid.z > 0 &&
                    grid.z <= 0xffff && threads.x > 0 && threads.x <= kMaxThreads && threads.x % kLanes == 0 &&
                    threads.y == 1 && threads.z == 1;
  if (!fits) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const uint64_t i : order) {
    const uint3 index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(grid, threads, index, body);
  }
}

// What every lane of the warp gave.
template <typename T>
const uint64_t* exchange(unsigned mask, T value, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 32 or 64 bits");
  if (mask != 0xffffffffu) fail(*current->block, "a part of a warp is not emulated", where.line());
  exchanges.fetch_add(1, std::memory_order_relaxed);
  uint64_t* slots = current->warp->slots[current->exchanges++ % 2];
  std::memcpy(&slots[current->lane], &value, sizeof(T));
  wait(current->warp->barrier, where);
  return slots;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const Where& where) {
  T result;
  std::memcpy(&result, &exchange(mask, value, where)[source], sizeof(T));
  return result;
}

// ex2.approx.ftz.f32 at its worst: 2^x with a relative error of 2^-22 up or down, as the bits of x decide, and 0 for
// results below the smallest normal number.
inline float ex2_approx(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const double error = bits * 2654435761u >> 31 ? 0x1p-22 : -0x1p-22;
  const float result = static_cast<float>(std::exp2(double(x)) * (1 + error));
  return result < std::numeric_limits<float>::min() ? 0 : result;
}

}  // namespace lit_did::emulation

#define threadIdx (lit_did::emulation::current->index)
#define blockIdx (lit_did::emulation::current->block->index)
#define blockDim (lit_did::emulation::current->block->size)
#define gridDim (lit_did::emulation::current->block->grid)

inline cudaError_t cudaGetLastError() { return std::exchange(lit_did::emulation::last_error, cudaSuccess); }

inline void __syncthreads(lit_did::emulation::Where where = lit_did::emulation::Where::current()) {
  lit_did::emulation::wait(lit_did::emulation::current->block->barrier, where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       lit_did::emulation::Where where = lit_did::emulation::Where::current()) {
  lit_did::emulation::exchange(mask, 0, where);
}

// A lane outside the segment of `width` lanes gives nothing: the caller's own value comes back.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  lit_did::emulation::Where where = lit_did::emulation::Where::current()) {
  const int lane = lit_did::emulation::current->lane, source = lane ^ lanes;
  return lit_did::emulation::shuffle(mask, value, source < lane / width * width + width ? source : lane, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32,
                   lit_did::emulation::Where where = lit_did::emulation::Where::current()) {
  const int lane = lit_did::emulation::current->lane, source = lane + lanes;
  return lit_did::emulation::shuffle(mask, value, source < lane / width * width + width ? source : lane, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              lit_did::emulation::Where where = lit_did::emulation::Where::current()) {
  const int lane = lit_did::emulation::current->lane;
  return lit_did::emulation::shuffle(mask, value, lane / width * width + source % width, where);
}

inline unsigned __ballot_sync(unsigned mask, bool vote,
                              lit_did::emulation::Where where = lit_did::emulation::Where::current()) {
  const uint64_t* votes = lit_did::emulation::exchange(mask, static_cast<uint64_t>(vote), where);
  unsigned ballot = 0;
  for (int lane = 0; lane < lit_did::emulation::kLanes; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}

inline bool __any_sync(unsigned mask, bool vote,
                       lit_did::emulation::Where where = lit_did::emulation::Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}

inline bool __all_sync(unsigned mask, bool vote,
                       lit_did::emulation::Where where = lit_did::emulation::Where::current()) {
  return __ballot_sync(mask, vote, where) == 0xffffffffu;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
