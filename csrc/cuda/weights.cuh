// Reads and writes weights: parameters, and float32 weights whose 16-bit parameters and masters lie apart
// (math/storage.h). Both are packs of a row like all others (packs.cuh).
#pragma once

#include "packs.cuh"

namespace trainops::cuda {

__device__ inline void unpack(const Raw& param, const Raw& master, const Weight& weight, float (&x)[8]) {
  if (!weight.has_master()) return unpack(param, weight.param.dtype, x);
  const uint32_t words[4] = {param.halves[0].x, param.halves[0].y, param.halves[0].z, param.halves[0].w};
  if (weight.is_split()) {
    const uint32_t rest[4] = {master.halves[0].x, master.halves[0].y, master.halves[0].z, master.halves[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = with_remainder(words[i] << 16, rest[i]);
      x[2 * i + 1] = with_remainder(words[i] & 0xffff0000u, rest[i] >> 16);
    }
    return;
  }
  unpack(master, DType::float32, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    x[i] = weight.param.dtype == DType::bfloat16 ? widen(BFloat16{bits}, x[i]) : widen(Float16{bits}, x[i]);
  }
}

__device__ inline void unpack(const Raw& param, const Raw&, const Weight& weight, double (&x)[2]) {
  unpack(param, weight.param.dtype, x);
}

// `first`: the index of the first element.
template <bool is_special, typename T>
__device__ Raw pack_param(const T (&x)[kPack<T>], const Weight& weight, int64_t first) {
  if (!weight.has_master() || weight.param.dtype == DType::float16) return pack<is_special>(x, weight.param, first);
  Raw raw{};
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = ((bits_to_split(x[2 * i]) + kHalfOfBFloat16) >> 16) |
               ((bits_to_split(x[2 * i + 1]) + kHalfOfBFloat16) & 0xffff0000u);
  }
  raw.halves[0] = {words[0], words[1], words[2], words[3]};
  return raw;
}

__device__ inline Raw pack_master(const float (&x)[8], const Weight& weight) {
  if (!weight.is_split()) return pack(x, DType::float32);
  Raw raw{};
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = (bits_to_split(x[2 * i]) & 0xffffu) | bits_to_split(x[2 * i + 1]) << 16;
  raw.halves[0] = {words[0], words[1], words[2], words[3]};
  return raw;
}

// The result of function(param, master) on the two parts of a weight that has a master.
template <typename Function>
__device__ auto with_parts(const Weight& weight, int64_t i, Function function) {
  if (weight.param.dtype == DType::float16) {
    return function(static_cast<Float16*>(weight.param.address)[i], static_cast<float*>(weight.master.address)[i]);
  }
  BFloat16& param = static_cast<BFloat16*>(weight.param.address)[i];
  if (weight.is_split()) return function(param, static_cast<Remainder*>(weight.master.address)[i]);
  return function(param, static_cast<float*>(weight.master.address)[i]);
}

template <typename T>
__device__ T load(const Weight& weight, int64_t i) {
  if (!weight.has_master()) return load<T>(weight.param, i);
  return with_parts(weight, i,
                    [](const auto& param, const auto& master) { return static_cast<T>(widen(param, master)); });
}

template <bool is_special, typename T>
__device__ void store(const Weight& weight, int64_t i, T x) {
  if (!weight.has_master()) return store<is_special>(weight.param, i, x);
  with_parts(weight, i, [&](auto& param, auto& master) { narrow(static_cast<float>(x), param, master); });
}

}  // namespace trainops::cuda
