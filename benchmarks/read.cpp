// Reads memory as fast as the processor can, for the limit that no kernel reading the same bytes can beat.
// Compiled by read_limit.py on first use. One addition a word: far less than the memory takes to bring it.

#include <cstdint>

// The sum, modulo 2^64, of `count` 64-bit words, each of `threads` threads reading one contiguous part.
extern "C" std::uint64_t read_words(const std::uint64_t* words, std::int64_t count, int threads) {
  std::uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static, 1)
  for (int part = 0; part < threads; ++part) {
    const std::int64_t begin = count * part / threads, end = count * (part + 1) / threads;
    std::uint64_t part_sum = 0;
    for (std::int64_t i = begin; i < end; ++i) part_sum += words[i];
    sum += part_sum;
  }
  return sum;
}
