// Gathers Moments (math/moments.h) of a piece of memory: tile by tile, each in two passes, of which the second finds
// the tile in the first-level cache. 4 bytes per float32 element.
//
// Lanes add up 8 numbers, and 8 such sums, in the type of the arithmetic; the rest is float64. The order depends on
// the number of elements alone. A tile of which float holds too little, or that has infinities or NaNs, which the
// fast loops do not ask for, is gathered again in double.
#pragma once

#include <type_traits>

#include "../math/moments.h"
#include "chunks.h"
#include "convert.h"
#include "halves.h"

namespace trainops::cpu {

constexpr int64_t kMomentLanes = 16, kMomentRun = 8 * kMomentLanes, kMomentBlock = 8 * kMomentRun;
constexpr int64_t kMomentTile = 2 * kMomentBlock;

template <typename T>
using MomentLanes __attribute__((vector_size(kMomentLanes * sizeof(T)))) = T;

// |x|, of lanes.
TRAINOPS_HOST_DEVICE void take_magnitudes(MomentLanes<float>& x) {
  x = reinterpret_cast<MomentLanes<float>>(reinterpret_cast<MomentLanes<uint32_t>>(x) & 0x7fffffffu);
}
TRAINOPS_HOST_DEVICE void take_magnitudes(MomentLanes<double>& x) {
  x = reinterpret_cast<MomentLanes<double>>(reinterpret_cast<MomentLanes<uint64_t>>(x) & 0x7fffffffffffffffu);
}

// Of each lane the smaller number, or the larger. Register by register: GCC chooses one by one in longer vectors.
template <typename Isa, bool larger, typename T>
TRAINOPS_HOST_DEVICE void take_extremes(MomentLanes<T>& found, const MomentLanes<T>& lanes) {
  using Register __attribute__((vector_size(Isa::width))) = T;
  constexpr int count = sizeof(found) / sizeof(Register);
  Register its[count], others[count];
  std::memcpy(its, &found, sizeof(its));
  std::memcpy(others, &lanes, sizeof(others));
  for (int i = 0; i < count; ++i) {
    const Register x = others[i], y = its[i];
    its[i] = (larger ? x > y : x < y) ? x : y;
  }
  std::memcpy(&found, its, sizeof(its));
}

// Joins lanes in pairs.
template <typename T, typename Join>
TRAINOPS_HOST_DEVICE T join_lanes(const MomentLanes<T>& lanes, Join join) {
  T joined[kMomentLanes];
  std::memcpy(joined, &lanes, sizeof(joined));
  for (int64_t i = 0; i < 8; ++i) joined[i] = join(joined[i], joined[i + 8]);
  for (int64_t i = 0; i < 4; ++i) joined[i] = join(joined[i], joined[i + 4]);
  for (int64_t i = 0; i < 2; ++i) joined[i] = join(joined[i], joined[i + 2]);
  return join(joined[0], joined[1]);
}

template <typename T>
TRAINOPS_HOST_DEVICE T sum_of_lanes(const MomentLanes<T>& lanes) {
  return join_lanes<T>(lanes, [](T a, T b) TRAINOPS_INLINE { return a + b; });
}

// Calls body(i, runs) for the lanes of every block, and adds what the runs of each have become to the sums.
template <typename T, int count, typename Body>
TRAINOPS_HOST_DEVICE void for_each_run(int64_t size, MomentLanes<double> (&sums)[count], Body body) {
  using Lanes = MomentLanes<T>;
  for (int64_t block = 0; block < size; block += kMomentBlock) {
    const int64_t end_of_block = block + kMomentBlock < size ? block + kMomentBlock : size;
    Lanes of_block[count] = {};
    for (int64_t begin = block; begin < end_of_block; begin += kMomentRun) {
      const int64_t end = begin + kMomentRun < end_of_block ? begin + kMomentRun : end_of_block;
      Lanes runs[count] = {};
      for (int64_t i = begin; i < end; i += kMomentLanes) body(i, runs);
      for (int k = 0; k < count; ++k) of_block[k] += runs[k];
    }
    for (int k = 0; k < count; ++k) sums[k] += __builtin_convertvector(of_block[k], MomentLanes<double>);
  }
}

// Half of the next tile is asked for in each pass, so that memory is busy all the time.
template <typename T>
TRAINOPS_HOST_DEVICE void prefetch_moments(const T* values) {
#if defined(__GNUC__)
  __builtin_prefetch(values);
#endif
}

// Of elements that are finite, `size` being a multiple of kMomentLanes. `l1` is not finite if one is not.
template <typename Isa, typename T>
TRAINOPS_HOST_DEVICE Moments::State moments_of_lanes(const T* values, int64_t size) {
  using Lanes = MomentLanes<T>;
  Lanes least = Lanes{} + T(INFINITY), most = Lanes{} - T(INFINITY), nearest = least;
  MomentLanes<double> sums[2] = {}, squares[1] = {};
  for_each_run<T>(size, sums, [&](int64_t i, Lanes(&runs)[2]) TRAINOPS_INLINE {
    prefetch_moments(values + kMomentTile + i / 2);
    Lanes x;
    std::memcpy(&x, values + i, sizeof(x));
    runs[0] += x;
    take_extremes<Isa, false, T>(least, x);
    take_extremes<Isa, true, T>(most, x);
    take_magnitudes(x);
    runs[1] += x;
    take_extremes<Isa, false, T>(nearest, x);
  });
  const auto smaller = [](T a, T b) TRAINOPS_INLINE { return b < a ? b : a; };
  Moments::State state;
  state.count = static_cast<double>(size);
  state.mean = sum_of_lanes<double>(sums[0]) / state.count;
  state.l1 = sum_of_lanes<double>(sums[1]);
  state.min = join_lanes<T>(least, smaller);
  state.max = join_lanes<T>(most, [](T a, T b) TRAINOPS_INLINE { return b > a ? b : a; });
  if (join_lanes<T>(nearest, smaller) == T(0)) {
    int zeros = 0;  // a sum of whole numbers may be computed in lanes
    for (int64_t i = 0; i < size; ++i) zeros += values[i] == T(0);
    state.zeros = zeros;
  }
  const T center = static_cast<T>(state.mean);
  for_each_run<T>(size, squares, [&](int64_t i, Lanes(&runs)[1]) TRAINOPS_INLINE {
    prefetch_moments(values + kMomentTile + (kMomentTile + i) / 2);
    Lanes d;
    std::memcpy(&d, values + i, sizeof(d));
    d -= center;
    runs[0] += d * d;
  });
  const double off = state.mean - static_cast<double>(center);
  state.m2 = sum_of_lanes<double>(squares[0]) - state.count * off * off;
  if (state.m2 < 0.0) state.m2 = 0.0;
  return state;
}

// Inner loops of a tile, or of some of it.
#define TRAINOPS_GATHER(Isa, target, name, T) \
  target inline Moments::State name(const T* values, int64_t size) { return moments_of_lanes<Isa>(values, size); }
TRAINOPS_VERSIONS(TRAINOPS_GATHER, moments_of_floats, float)
TRAINOPS_VERSIONS(TRAINOPS_GATHER, moments_of_finite_doubles, double)
#undef TRAINOPS_GATHER

// Of any elements, also of those that fill no lanes.
inline Moments::State moments_of_doubles(const double* values, int64_t size) {
  const int64_t body = size / kMomentLanes * kMomentLanes;
  Moments::State state;
  if (body > 0) state = moments_of_finite_doubles(values, body);
  const int64_t begin = state.l1 < INFINITY ? body : 0;
  if (begin == 0) state = {};
  for (int64_t i = begin; i < size; i += kMomentLanes) {
    const int64_t left = size - i;
    double pack[kMomentLanes] = {};
    const int count = static_cast<int>(left < kMomentLanes ? left : kMomentLanes);
    for (int k = 0; k < count; ++k) pack[k] = values[i + k];
    state = Moments::join(state, Moments::gather<double>(pack, count));
  }
  return state;
}

// At most a tile.
inline Moments::State moments_of_tile(const double* values, int64_t size) { return moments_of_doubles(values, size); }
inline Moments::State moments_of_tile(const float* values, int64_t size) {
  const int64_t body = size / kMomentLanes * kMomentLanes;
  Moments::State state;
  if (body > 0) state = moments_of_floats(values, body);
  const int64_t begin = Moments::is_doubtful(state) ? 0 : body;
  if (begin == size) return state;
  double wide[kMomentTile];
  for (int64_t i = begin; i < size; ++i) wide[i - begin] = static_cast<double>(values[i]);
  const Moments::State rest = moments_of_doubles(wide, size - begin);
  return begin == 0 ? rest : Moments::join(state, rest);
}

// 16-bit numbers are widened into a tile of floats.
template <typename T>
Moments::State moments_of_piece(const Cell& cell, const Piece& piece) {
  Moments::State state;
  for (int64_t done = 0; done < piece.size; done += kMomentTile) {
    const int64_t left = piece.size - done, size = left < kMomentTile ? left : kMomentTile;
    T buffer[kMomentTile];
    state = Moments::join(state, moments_of_tile(load(cell, piece.begin + done, size, buffer), size));
  }
  return state;
}

}  // namespace trainops::cpu
