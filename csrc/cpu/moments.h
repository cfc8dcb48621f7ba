// Gathers Moments (math/moments.h) of a piece of memory: tile by tile, each in two passes, of which the second finds
// the tile in the first-level cache. 4 bytes per float32 element.
//
// Lanes add up at most 8 numbers, and 8 such sums, in the type of the arithmetic; the rest is float64. The order
// depends on the number of elements alone. A tile of which float holds too little is gathered again in double, and
// one that has infinities or NaNs, which the fast loops do not ask for, a third time.
#pragma once

#include <type_traits>

#include "../math/moments.h"
#include "convert.h"

namespace trainops::cpu {

constexpr int64_t kMomentLanes = 16, kMomentRun = 8 * kMomentLanes;
static_assert(kTileNumel % kMomentRun == 0, "tiles are whole runs");

template <typename T>
using MomentLanes __attribute__((vector_size(kMomentLanes * sizeof(T)))) = T;
template <typename T>
using MomentWord = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <typename Isa, typename T, typename S>
TRAINOPS_HOST_DEVICE void load_lanes(const S* values, MomentLanes<T>& lanes) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(&lanes, values, sizeof(lanes));
  } else {
    T wide[kMomentLanes];
    if constexpr (has_halves<Isa, const S*>) {
      float floats[kMomentLanes];
      for (int64_t i = 0; i < kMomentLanes; i += Isa::halves) get_block<Isa::halves>(values + i, floats + i);
      for (int64_t i = 0; i < kMomentLanes; ++i) wide[i] = static_cast<T>(floats[i]);
    } else {
      for (int64_t i = 0; i < kMomentLanes; ++i) wide[i] = static_cast<T>(widen(values[i]));
    }
    std::memcpy(&lanes, wide, sizeof(lanes));
  }
}

template <typename T>
TRAINOPS_HOST_DEVICE double sum_of_lanes(const MomentLanes<T>& lanes) {
  double sums[kMomentLanes];
  for (int64_t i = 0; i < kMomentLanes; ++i) sums[i] = static_cast<double>(lanes[i]);
  for (int64_t width = kMomentLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

// Of elements that are finite, `size` being a multiple of kMomentLanes. `l1` is not finite if one is not.
template <typename Isa, typename T, typename S>
TRAINOPS_HOST_DEVICE Moments::State moments_of_lanes(const S* values, int64_t size) {
  using Lanes = MomentLanes<T>;
  using Words = MomentLanes<MomentWord<T>>;
  const Words magnitude = Words{} + (static_cast<MomentWord<T>>(~MomentWord<T>{0}) &
                                     (sizeof(T) == 4 ? MomentWord<T>(0x7fffffff) : MomentWord<T>(INT64_MAX)));
  Lanes sum{}, l1{}, least = Lanes{} + T(INFINITY), most = Lanes{} - T(INFINITY);
  Words zeros{};
  for (int64_t begin = 0; begin < size; begin += kMomentRun) {
    const int64_t end = begin + kMomentRun < size ? begin + kMomentRun : size;
    Lanes run_sum{}, run_l1{};
    for (int64_t i = begin; i < end; i += kMomentLanes) {
      Lanes x;
      load_lanes<Isa, T>(values + i, x);
      run_sum += x;
      run_l1 += reinterpret_cast<Lanes>(reinterpret_cast<Words>(x) & magnitude);
      least = x < least ? x : least;
      most = x > most ? x : most;
      zeros -= x == T(0);
    }
    sum += run_sum;
    l1 += run_l1;
  }
  Moments::State state;
  state.count = static_cast<double>(size);
  state.l1 = sum_of_lanes<T>(l1);
  for (int64_t i = 0; i < kMomentLanes; ++i) {
    state.zeros += static_cast<double>(zeros[i]);
    state.min = static_cast<double>(least[i]) < state.min ? static_cast<double>(least[i]) : state.min;
    state.max = static_cast<double>(most[i]) > state.max ? static_cast<double>(most[i]) : state.max;
  }
  const T center = static_cast<T>(sum_of_lanes<T>(sum) / state.count);
  Lanes rest{}, m2{};
  for (int64_t begin = 0; begin < size; begin += kMomentRun) {
    const int64_t end = begin + kMomentRun < size ? begin + kMomentRun : size;
    Lanes run_rest{}, run_m2{};
    for (int64_t i = begin; i < end; i += kMomentLanes) {
#if defined(__GNUC__)
      __builtin_prefetch(values + i + kTileNumel);  // of the next tile, while this one is in the cache
#endif
      Lanes d;
      load_lanes<Isa, T>(values + i, d);
      d -= center;
      run_rest += d;
      run_m2 += d * d;
    }
    rest += run_rest;
    m2 += run_m2;
  }
  const double off = sum_of_lanes<T>(rest) / state.count;  // of the mean, from the center
  state.mean = static_cast<double>(center) + off;
  state.m2 = sum_of_lanes<T>(m2) - state.count * off * off;
  if (state.m2 < 0.0) state.m2 = 0.0;
  return state;
}

// Of any elements, one by one.
template <typename S>
TRAINOPS_HOST_DEVICE Moments::State moments_of_any(const S* values, int64_t size) {
  Moments::State state;
  for (int64_t begin = 0; begin < size; begin += kMomentLanes) {
    const int64_t left = size - begin;
    double pack[kMomentLanes];
    const int count = static_cast<int>(left < kMomentLanes ? left : kMomentLanes);
    for (int i = 0; i < kMomentLanes; ++i) {
      pack[i] = i < count ? static_cast<double>(widen(values[begin + i])) : 0.0;
    }
    state = Moments::join(state, Moments::gather<double>(pack, count));
  }
  return state;
}

template <typename Isa, typename S>
TRAINOPS_HOST_DEVICE Moments::State moments_of_tile(const S* values, int64_t size) {
  Moments::State state = moments_of_lanes<Isa, Wide<S>>(values, size);
  if (!std::is_same_v<Wide<S>, double> && Moments::is_doubtful(state)) {
    state = moments_of_lanes<Baseline, double>(values, size);
  }
  return state.l1 < INFINITY ? state : moments_of_any(values, size);
}

template <typename Isa, typename S>
TRAINOPS_HOST_DEVICE Moments::State moments_of_piece(const S* values, int64_t size) {
  Moments::State state;
  const int64_t body = size / kMomentLanes * kMomentLanes;
  for (int64_t begin = 0; begin < body; begin += kTileNumel) {
    const int64_t left = body - begin;
    state = Moments::join(state, moments_of_tile<Isa>(values + begin, left < kTileNumel ? left : kTileNumel));
  }
  return body == size ? state : Moments::join(state, moments_of_any(values + body, size - body));
}

}  // namespace trainops::cpu
