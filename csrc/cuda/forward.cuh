// The forward: nine statistics of every row, in one pass over both rows.
//
// Computes   lit_did::RowStatistics of two [V] rows and what follows from it (row_statistics.h).
// Reads      every entry of both rows once; nothing of a row whose label is ignored.
// Writes     nine statistics and five normalizers a row. Between two kernels, the sums of each part of a row.
// Threads    A row is cut into parts of kPartEntries. One warp at a time works on a part: every lane adds its chunks to
//            sums of its own, whose origins its warp moves. A warp merges the parts of a row.
// Bits       The order of every addition follows from V alone: not from addresses, the number of rows or the device.
//            Blocks may take any number of parts, because what is added within a part and how parts merge is the same.
#pragma once

#include "entries.cuh"
#include "pairs.cuh"

namespace lit_did::cuda {

// A block is one warp: none waits for another at the end of a row.
constexpr int kForwardThreads = kWarp;
// Blocks that the registers of a multiprocessor hold. sm_75, sm_86 and sm_87 take no more than 16.
template <typename Real>
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870)
constexpr int kForwardBlocks = sizeof(Real) == 4 ? 16 : 8;
#else
constexpr int kForwardBlocks = sizeof(Real) == 4 ? 24 : 8;
#endif
// Chunks of each side that a lane takes in one turn: its loads in flight.
constexpr int kTurnChunks = 2;
// Up to so many parts in all rows, a block takes one, so that every multiprocessor has work.
constexpr int kFewParts = 8192;

// How far (as a power of 2) the weights of one lane's turn may rise, together, before the warp moves its origins.
// Exponentials stay far from overflow, and the rounding of an exponent that near to 0 is no larger than that of 2^x.
constexpr int kSlack = 8;

// The sums of one part as they wait to be merged, in the order of RowStatistics.
constexpr int kPartSums = 8;
template <typename Real>
struct PartSums {
  Real sums[kPartSums];
  Real policy_max, reference_max, difference_max, outside;
  int flags;
};

// A lane's share of one turn: chunks of both sides, apart by what the other lanes take.
template <typename P, typename R>
struct Share {
  static constexpr int kEntries = kChunk<P, R>, kStep = kWarp * kEntries, kTurn = kTurnChunks * kStep;
  Chunk<P, kEntries> z[kTurnChunks];
  Chunk<R, kEntries> r[kTurnChunks];
};

// A lane's sums of one part. The origins (maxima) are the same in all lanes of a warp.
template <typename Real>
struct Accumulator {
  RowStatistics<Real, Real> sums;
  Real most = -1;  // the weights of a turn, together; more moves the origins

  // Moves the origins to the warp's maxima in one turn, above which the next turns seldom rise. By all lanes together.
  // The share's first entries are at `policy` and `reference`; from there on the row has `left`. False where entries
  // are infinite, NaN or not there: then they are added here. `share` is not read unless the turn is `whole`.
  template <typename P, typename R>
  __device__ __forceinline__ bool move(const Share<P, R>& share, bool whole, const P* policy, const R* reference,
                                       int left, const Scaling<Real>& by) {
    constexpr int kEntries = Share<P, R>::kEntries;
    Real z_max = share.z[0][0], r_max = share.r[0][0], d_max = z_max - r_max;
    Real lowest = smaller(z_max, r_max);
#pragma unroll
    for (int i = 1; i < kTurnChunks * kEntries; ++i) {
      const Real z = share.z[i / kEntries][i % kEntries], r = share.r[i / kEntries][i % kEntries];
      z_max = larger(z_max, z);
      r_max = larger(r_max, r);
      d_max = larger(d_max, z - r);
      lowest = smaller(lowest, smaller(z, r));
    }
    const auto one_by_one = [&](auto function) {
#pragma unroll 1
      for (int i = 0; i < kTurnChunks * kEntries; ++i) {
        const int offset = i / kEntries * Share<P, R>::kStep + i % kEntries;
        if (offset < left)
          function(effective_logit<Real>(load_entry(policy + offset), by.limit),
                   effective_logit<Real>(load_entry(reference + offset), by.limit));
      }
    };
    // NaN passes unseen, and makes the sums NaN.
    const bool plain = whole && z_max <= by.limit && r_max <= by.limit && lowest >= -by.limit;
    const Real hole = minus_infinity<Real>();
    if (!plain) [[unlikely]] {
      z_max = r_max = d_max = hole;
      one_by_one([&](Real z, Real r) {
        if (!(z < -hole) || !(r < -hole)) {
          sums.policy_weight = -hole - -hole;  // +inf or NaN
          return;
        }
        z_max = larger(z_max, z);
        r_max = larger(r_max, r);
        if (z > hole && r > hole) d_max = larger(d_max, z - r);
      });
    }
    const Real p = larger(sums.policy_max, warp_maximum(z_max) * by.scale);
    const Real r = larger(sums.reference_max, warp_maximum(r_max) * by.scale);
    const Real d = larger(sums.difference_max, warp_maximum(d_max) * by.scale);
    sums.rebase(p, r, d);
    // Near the limit no weight says whether a logit is beyond it.
    most = larger(p, larger(r, d)) < Real(kLargestLogit * kLog2e / 4) ? Real(1 << kSlack) : Real(-1);
    if (!plain) [[unlikely]] {
      one_by_one([&](Real z, Real r) { add_carefully(z, r, by); });
    }
    return plain;
  }

 private:
  // One entry, which may be infinite.
  __device__ __forceinline__ void add_carefully(Real z, Real r, const Scaling<Real>& by) {
    const Real hole = minus_infinity<Real>();
    const Real z0 = origin(sums.policy_max), r0 = origin(sums.reference_max), d0 = origin(sums.difference_max);
    const bool z_inside = z > hole, r_inside = r > hole, d_inside = z_inside && r_inside;
    const Real d = d_inside ? z - r : Real(0), x = multiply_add(d, by.scale, r0 - z0);
    if (!d_inside) sums.flags |= kInfinite | (r_inside ? kPolicyHole : 0) | (z_inside ? kReferenceHole : 0);
    if (!z_inside && !r_inside) sums.outside += 1;
    if (z_inside) {
      const Real log_z = multiply_add(z, by.scale, -z0), w_z = fast_exp2(log_z);
      sums.policy_weight += w_z;
      sums.policy_log = multiply_add(w_z, log_z, sums.policy_log);
      if (d_inside) sums.policy_log_ratio = multiply_add(w_z, x, sums.policy_log_ratio);
    }
    if (r_inside) {
      const Real log_r = multiply_add(r, by.scale, -r0), w_r = fast_exp2(log_r);
      sums.reference_weight += w_r;
      sums.reference_log = multiply_add(w_r, log_r, sums.reference_log);
      if (d_inside) sums.reference_log_ratio = multiply_add(w_r, x, sums.reference_log_ratio);
    }
    if (d_inside) {
      const Real log_d = multiply_add(d, by.scale, -d0), w_d = fast_exp2(log_d);
      sums.difference_weight += w_d;
      sums.difference_log = multiply_add(w_d, log_d, sums.difference_log);
    }
  }
};

// The sums of one turn of a lane, apart from those before it: whether they fit is checked afterwards. Entries is what
// is added at a time: Real, or Pair.
template <typename Real, typename Entries>
struct Turn {
  Entries policy_weight, policy_log, policy_log_ratio, reference_weight, reference_log, reference_log_ratio;
  Entries difference_weight, difference_log;
  Real lowest;

  // The turn's chunks, in their order.
  template <typename P, typename R, int kEntries>
  __device__ __forceinline__ void add(int chunk, const Chunk<P, kEntries>& policy, const Chunk<R, kEntries>& reference,
                                      const RowStatistics<Real, Real>& origins, const Scaling<Real>& by) {
    const Real z0 = origins.policy_max, r0 = origins.reference_max, d0 = origins.difference_max, x0 = z0 - r0;
    const Entries scale = each<Entries>(by.scale), minus_z0 = each<Entries>(-z0), minus_r0 = each<Entries>(-r0),
                  minus_d0 = each<Entries>(-d0), minus_x0 = each<Entries>(-x0);
    constexpr int kSteps = kEntries * int(sizeof(Real)) / int(sizeof(Entries));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const Entries z = entries_of<Entries>(policy, i), r = entries_of<Entries>(reference, i), d = z - r;
      const Entries log_z = multiply_add(z, scale, minus_z0), log_r = multiply_add(r, scale, minus_r0),
                    log_d = multiply_add(d, scale, minus_d0), x = multiply_add(d, scale, minus_x0);
      const Entries w_z = fast_exp2(log_z), w_r = fast_exp2(log_r), w_d = balanced_exp2(log_d, chunk * kSteps + i);
      if (chunk == 0 && i == 0) {
        lowest = least(z);
        policy_weight = w_z;
        policy_log = w_z * log_z;
        policy_log_ratio = w_z * x;
        reference_weight = w_r;
        reference_log = w_r * log_r;
        reference_log_ratio = w_r * x;
        difference_weight = w_d;
        difference_log = w_d * log_d;
      } else {
        lowest = smaller(lowest, least(z));
        policy_weight = policy_weight + w_z;
        policy_log = multiply_add(w_z, log_z, policy_log);
        policy_log_ratio = multiply_add(w_z, x, policy_log_ratio);
        reference_weight = reference_weight + w_r;
        reference_log = multiply_add(w_r, log_r, reference_log);
        reference_log_ratio = multiply_add(w_r, x, reference_log_ratio);
        difference_weight = difference_weight + w_d;
        difference_log = multiply_add(w_d, log_d, difference_log);
      }
    }
  }

  // Whether no weight is too large and no entry infinite or NaN. The reference's lowest logits need no look: where the
  // policy's logit is above half the limit, one below it makes the weight of the difference too large.
  __device__ __forceinline__ bool fits(Real most, const Scaling<Real>& by) const {
    return total(policy_weight + reference_weight + difference_weight) <= most && lowest >= -by.half_limit;
  }

  __device__ __forceinline__ void add_to(RowStatistics<Real, Real>& sums) const {
    sums.policy_weight += total(policy_weight);
    sums.policy_log += total(policy_log);
    sums.policy_log_ratio += total(policy_log_ratio);
    sums.reference_weight += total(reference_weight);
    sums.reference_log += total(reference_log);
    sums.reference_log_ratio += total(reference_log_ratio);
    sums.difference_weight += total(difference_weight);
    sums.difference_log += total(difference_log);
  }
};

// Adds the lanes' sums and writes them. By all lanes together.
template <typename Real>
__device__ __forceinline__ void write_part(const RowStatistics<Real, Real>& sums, PartSums<Real>* to) {
  Real values[kPartSums] = {sums.policy_weight, sums.policy_log,          sums.policy_log_ratio,  sums.reference_weight,
                            sums.reference_log, sums.reference_log_ratio, sums.difference_weight, sums.difference_log};
  Real outside = sums.outside;
  int flags = sums.flags;
  if (__any_sync(kWholeWarp, flags != 0)) {
    outside = warp_sum(outside);
    flags = warp_or(flags);
  }
  const Real sum = warp_sums(values);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane % 4 == 0) to->sums[lane / 4] = sum;
  if (lane != 0) return;
  to->policy_max = sums.policy_max;
  to->reference_max = sums.reference_max;
  to->difference_max = sums.difference_max;
  to->outside = outside;
  to->flags = flags;
}

// Adds the `size` entries of both rows, part by part. By a whole warp. kAligned: chunks lie on 16-byte boundaries on
// both sides.
template <typename P, typename R, bool kAligned, typename Real>
__device__ __forceinline__ void add_parts(const P* policy, const R* reference, int size, const Scaling<Real>& by,
                                          PartSums<Real>* parts) {
  using S = Share<P, R>;
  static_assert(kPartEntries % S::kTurn == 0, "turns lie within a part");
  const int policy_past = kAligned ? 0 : bytes_past_boundary(policy);
  const int reference_past = kAligned ? 0 : bytes_past_boundary(reference);
  S share;
  int at = 0;
  const int first = static_cast<int>(threadIdx.x) % kWarp * S::kEntries;
  const P* z_at = policy + first;
  const R* r_at = reference + first;
  // Chunk u of the turn after `turns` others, which lies wholly inside the row.
  const auto load = [&](int u, int turns) {
    const int offset = turns * S::kTurn + u * S::kStep;
    if constexpr (kAligned) {
      share.z[u] = load_wide<P, S::kEntries, true, true>(z_at + offset, 0);
      share.r[u] = load_wide<R, S::kEntries, true, true>(r_at + offset, 0);
    } else {
      const int from = at + first + offset;
      share.z[u] = load_chunk<P, S::kEntries, false, true>(policy, from, size, policy_past);
      share.r[u] = load_chunk<R, S::kEntries, false, true>(reference, from, size, reference_past);
    }
  };
  const auto load_turn = [&](int turns) {
#pragma unroll
    for (int u = 0; u < kTurnChunks; ++u) load(u, turns);
  };
  // Each chunk makes room for the next turn's, whose loads are under way while the rest is computed.
  const auto add_turn = [&](const RowStatistics<Real, Real>& origins) {
    const bool more = at + 2 * S::kTurn <= size;
    Turn<Real, EntriesOf<P, R>> turn;
#pragma unroll
    for (int u = 0; u < kTurnChunks; ++u) {
      turn.add(u, share.z[u], share.r[u], origins, by);
      if (kAligned && more) load(u, 1);
    }
    return turn;
  };
  const auto go_on = [&] {
    at += S::kTurn;
    z_at += S::kTurn;
    r_at += S::kTurn;
  };

  if (kAligned && at + S::kTurn <= size) load_turn(0);
#pragma unroll 1
  for (; at < size; ++parts) {
    const int part_end = smaller_of(at + kPartEntries, size);
    Accumulator<Real> accumulator;
#pragma unroll 1
    do {
      const bool whole = at + S::kTurn <= size;
      if (!kAligned && whole) load_turn(0);
      bool plain = accumulator.move(share, whole, policy + at + first, reference + at + first, size - at - first, by),
           moved = true;
#pragma unroll 1
      do {
        if (!kAligned && !moved) load_turn(0);
        const auto turn = add_turn(accumulator.sums);
        // A branch that one lane takes costs the whole warp, so that all lanes take it together.
        if (!__all_sync(kWholeWarp, moved || turn.fits(accumulator.most, by))) [[unlikely]] {
          if (kAligned) load_turn(0);
          break;
        }
        if (plain) turn.add_to(accumulator.sums);
        go_on();
        plain = true, moved = false;
      } while (at + S::kTurn <= part_end);
    } while (at < part_end);
    write_part(accumulator.sums, parts);
  }
}

template <typename Real>
__device__ __forceinline__ RowStatistics<Real, double> to_double(const PartSums<Real>& part) {
  RowStatistics<Real, double> result;
  result.policy_max = part.policy_max;
  result.reference_max = part.reference_max;
  result.difference_max = part.difference_max;
  result.policy_weight = part.sums[0];
  result.policy_log = part.sums[1];
  result.policy_log_ratio = part.sums[2];
  result.reference_weight = part.sums[3];
  result.reference_log = part.sums[4];
  result.reference_log_ratio = part.sums[5];
  result.difference_weight = part.sums[6];
  result.difference_log = part.sums[7];
  result.outside = part.outside;
  result.flags = part.flags;
  return result;
}

// The sums of a row's parts, in an order that follows from their number alone. By a whole warp; in every lane.
template <typename Real>
__device__ __forceinline__ RowStatistics<Real, double> merge_parts(const PartSums<Real>* parts, int count) {
  RowStatistics<Real, double> sums;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < count; i += kWarp) sums.merge(to_double(parts[i]));
  sums.rebase(warp_maximum(sums.policy_max), warp_maximum(sums.reference_max), warp_maximum(sums.difference_max));
  sums.policy_weight = warp_sum(sums.policy_weight);
  sums.policy_log = warp_sum(sums.policy_log);
  sums.policy_log_ratio = warp_sum(sums.policy_log_ratio);
  sums.reference_weight = warp_sum(sums.reference_weight);
  sums.reference_log = warp_sum(sums.reference_log);
  sums.reference_log_ratio = warp_sum(sums.reference_log_ratio);
  sums.difference_weight = warp_sum(sums.difference_weight);
  sums.difference_log = warp_sum(sums.difference_log);
  sums.outside = warp_sum(sums.outside);
  sums.flags = warp_or(sums.flags);
  return sums;
}

// By one thread. A label out of range has log-probabilities NaN: raising would need a synchronisation.
template <typename P, typename R, typename Real>
__device__ __forceinline__ void write_row(const ForwardArguments& a, int64_t row, const P* policy, const R* reference,
                                          const RowStatistics<Real, double>& sums, const Scaling<Real>& by) {
  const int64_t label = a.problem.labels[row];
  double at_policy = std::numeric_limits<double>::quiet_NaN(), at_reference = at_policy;
  if (label >= 0 && label < a.problem.vocabulary) {
    at_policy = effective_logit<Real>(load_entry(policy + label), by.limit) * double(by.scale);
    at_reference = effective_logit<Real>(load_entry(reference + label), by.limit) * double(by.scale);
  }
  RowNormalizers normalizers;
  const auto statistics = sums.finish(a.problem.vocabulary, at_policy, at_reference, &normalizers);
  write_statistics<Real>(statistics, a.statistics, row);
  a.normalizers[row] = normalizers;
}

// Merges the parts of a row and writes its statistics. By a whole warp.
template <typename P, typename R, typename Real>
__device__ __forceinline__ void finish_row(const ForwardArguments& a, int64_t row, const PartSums<Real>* parts,
                                           int count, const Scaling<Real>& by) {
  const auto sums = merge_parts(parts, count);
  if (threadIdx.x % kWarp == 0)
    write_row<P, R, Real>(a, row, row_of<const P>(a.problem.policy, row), row_of<const R>(a.problem.reference, row),
                          sums, by);
}

template <typename Real>
__device__ __forceinline__ void write_ignored(const ForwardArguments& a, int64_t row) {
  write_statistics<Real>(TokenStatistics<Real>{}, a.statistics, row);
  a.normalizers[row] = {};
}

// How blocks share the parts of the rows: block row * blocks_a_row + i takes parts_a_block of them. It decides no bit.
struct Cut {
  int parts_a_block, blocks_a_row;
};

// The sums of the parts go to `parts`, [rows, parts]. Where that is null, one block takes all parts of a row and
// finishes it.
template <typename P, typename R>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<typename RealOf<P>::type>)
    forward_kernel(const ForwardArguments a, const Scaling<typename RealOf<P>::type> by, const Cut cut,
                   PartSums<typename RealOf<P>::type>* parts) {
  using Real = typename RealOf<P>::type;
  const int block = static_cast<int>(blockIdx.x), row = block / cut.blocks_a_row;
  const int first = (block - row * cut.blocks_a_row) * cut.parts_a_block;
  if (a.problem.labels[row] == a.problem.ignore_index) [[unlikely]] {
    if (!parts && threadIdx.x == 0) write_ignored<Real>(a, row);
    return;
  }
  __shared__ PartSums<Real> of_block[kPartsABlock];
  const int64_t begin = int64_t(first) * kPartEntries, rest = a.problem.vocabulary - begin;
  const int most = cut.parts_a_block * kPartEntries, size = rest < most ? static_cast<int>(rest) : most;
  const P* policy = row_of<const P>(a.problem.policy, row) + begin;
  const R* reference = row_of<const R>(a.problem.reference, row) + begin;
  PartSums<Real>* to = parts ? parts + int64_t(row) * parts_of(a.problem.vocabulary) + first : of_block;
  if (bytes_past_boundary(policy) != 0 || bytes_past_boundary(reference) != 0) [[unlikely]] {
    add_parts<P, R, false>(policy, reference, size, by, to);
  } else {
    add_parts<P, R, true>(policy, reference, size, by, to);
  }
  if (parts) return;
  __syncwarp();
  finish_row<P, R, Real>(a, row, of_block, parts_of(size), by);
}

// Finishes the rows whose parts are in memory, a row a block.
template <typename P, typename R>
__global__ void __launch_bounds__(kForwardThreads)
    finish_kernel(const ForwardArguments a, const Scaling<typename RealOf<P>::type> by,
                  const PartSums<typename RealOf<P>::type>* parts) {
  using Real = typename RealOf<P>::type;
  const int64_t row = blockIdx.x;
  if (a.problem.labels[row] == a.problem.ignore_index) [[unlikely]] {
    if (threadIdx.x == 0) write_ignored<Real>(a, row);
    return;
  }
  const int count = parts_of(a.problem.vocabulary);
  finish_row<P, R, Real>(a, row, parts + row * count, count, by);
}

}  // namespace lit_did::cuda
