// One element, pack or chunk of an average, for ema.cu and for a fused step of any rule. The formula is in
// math/ema.h.
#pragma once

#include "../math/ema.h"
#include "weights.cuh"

namespace trainops::cuda {

// The arithmetic is in float64 where either tensor is. The weight is read as it was stored.
template <bool is_special>
__device__ void ema_one(const Cell& average, const Weight& weight, int64_t i, double decay) {
  if (average.dtype == DType::float64 || weight.param.dtype == DType::float64) {
    const EMAWeight<double> w(decay);
    store<is_special>(average, i, ema_element(load<double>(average, i), load<double>(weight, i), w));
  } else {
    const EMAWeight<float> w(decay);
    store<is_special>(average, i, ema_element(load<float>(average, i), load<float>(weight, i), w));
  }
}

// The weight of a loop, in registers. Only rows with an average need it, so that the compiler would put its
// arithmetic, which is in float64, into the loop.
template <typename T>
__device__ EMAWeight<T> weight_of_loop(double decay) {
  EMAWeight<T> weight(decay);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) asm volatile("" : "+f"(weight.weight), "+f"(weight.complement));
#endif
  return weight;
}

// Moves a pack of the average, from element `first` on. Takes and returns packs as they lie in memory.
template <bool is_special, typename T>
__device__ Raw ema_pack(const Raw& before, const Cell& average, int64_t first, const Raw& param, DType param_dtype,
                        const EMAWeight<T>& weight) {
  T moved[kPack<T>], towards[kPack<T>];
  unpack(before, average.dtype, moved);
  unpack(param, param_dtype, towards);
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) moved[j] = ema_element(moved[j], towards[j], weight);
  return pack<is_special>(moved, average, first);
}

// The decay of an average, and the seed of its rounding, in shared memory. A loop reads them there when it has
// registers left.
struct SharedDecay {
  double decay;
  float weight, complement;
  uint32_t seed;

  // Called by one thread, before a barrier.
  __device__ void set(double value, uint32_t its_seed) {
    const EMAWeight<float> rounded(value);
    decay = value;
    seed = its_seed;
    weight = rounded.weight;
    complement = rounded.complement;
  }

  template <typename T>
  __device__ EMAWeight<T> of_loop() const {
    if constexpr (sizeof(T) == 8) {
      return EMAWeight<T>(decay);
    } else {
      return EMAWeight<T>(weight, complement);
    }
  }
};

// Moves a chunk of the average towards weights, which may have a master.
template <bool is_special, typename T>
__device__ void move_chunk_in(const Cell& average, const Weight& weight, const Chunk& chunk, double decay) {
  VectorRange<T> range(chunk.begin, chunk.end, kThreads);
  range.add(average);
  range.add(weight.param);
  range.add(weight.master);
  range.close();
  const auto weight_of_average = weight_of_loop<T>(decay);
  for (int64_t tile = range.begin; tile < range.body; tile += kThreads * kPack<T>) {
    const LaneOffset offset(range, tile, threadIdx.x);
    const Raw before = fetch<T>(average, offset);
    Raw followed = fetch<T>(weight.param, offset);
    DType dtype = weight.param.dtype;
    if constexpr (sizeof(T) == 4) {
      if (weight.has_master()) {
        T values[kPack<T>];
        unpack(followed, fetch<T>(weight.master, offset), weight, values);
        dtype = DType::float32;
        followed = pack(values, dtype);
      }
    }
    put<T>(average, offset, ema_pack<is_special>(before, average, offset.first, followed, dtype, weight_of_average));
  }
  for (int64_t i = range.body + threadIdx.x; i < range.end; i += kThreads) {
    ema_one<is_special>(average, weight, i, decay);
  }
}

template <bool is_special>
__device__ void move_chunk(const Cell& average, const Weight& weight, const Chunk& chunk, double decay) {
  if (average.dtype == DType::float64) return move_chunk_in<is_special, double>(average, weight, chunk, decay);
  move_chunk_in<is_special, float>(average, weight, chunk, decay);
}

// Copies a chunk of bytes.
__device__ inline void copy_chunk(const Cell& copy, const Cell& tensor, const Chunk& chunk) {
  static_assert(kChunkNumel == 16 * kThreads, "each thread copies 16 bytes");
  char* const to = static_cast<char*>(copy.address);
  const char* const from = static_cast<const char*>(tensor.address);
  const int64_t begin = chunk.begin + 16 * threadIdx.x, end = begin + 16 < chunk.end ? begin + 16 : chunk.end;
  if (end - begin == 16 && is_multiple(to, 16) && is_multiple(from, 16)) {
    return store_16(to + begin, load_16(from + begin));
  }
  for (int64_t i = begin; i < end; ++i) to[i] = from[i];
}

}  // namespace trainops::cuda
