#include "convert.h"

#include "codes.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

template <typename From, typename To>
TRAINOPS_HOST_DEVICE void widen_all(const From* __restrict from, To* __restrict to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<To>(widen(from[i]));
}

template <typename From, typename To>
TRAINOPS_HOST_DEVICE void narrow_all(const From* __restrict from, To* __restrict to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) narrow(from[i], to[i]);
}

// One named function for each pair, because only those can be compiled for several instruction sets.
#define TRAINOPS_CONVERT(From, T)                                                                            \
  TRAINOPS_MULTIVERSION void read_tile(const From* from, T* to, int64_t size) { widen_all(from, to, size); } \
  TRAINOPS_MULTIVERSION void write_tile(const T* from, From* to, int64_t size) { narrow_all(from, to, size); }

TRAINOPS_CONVERT(BFloat16, float)
TRAINOPS_CONVERT(double, float)
TRAINOPS_CONVERT(BFloat16, double)
TRAINOPS_CONVERT(Float16, double)
TRAINOPS_CONVERT(float, double)
#undef TRAINOPS_CONVERT

#define TRAINOPS_CONVERT_HALF(Isa, target, name, From, To)                                             \
  target void name(const From* from, To* to, int64_t size) {                                           \
    for_each_element<Isa>(size, [](float x, float& result) TRAINOPS_INLINE { result = x; }, from, to); \
  }
TRAINOPS_MULTIVERSION void write_tile(const float* from, StochasticColumn to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) put(from[i], to, i);
}

TRAINOPS_VERSIONS(TRAINOPS_CONVERT_HALF, read_tile, Float16, float)
TRAINOPS_VERSIONS(TRAINOPS_CONVERT_HALF, write_tile, float, Float16)
#undef TRAINOPS_CONVERT_HALF

#define TRAINOPS_CONVERT_WEIGHT(Param, Master)                                                              \
  TRAINOPS_MULTIVERSION void read_tile(const Param* param, const Master* master, float* to, int64_t size) { \
    for (int64_t i = 0; i < size; ++i) to[i] = widen(param[i], master[i]);                                  \
  }                                                                                                         \
  TRAINOPS_MULTIVERSION void write_tile(const float* from, Param* param, Master* master, int64_t size) {    \
    TRAINOPS_INDEPENDENT                                                                                    \
    for (int64_t i = 0; i < size; ++i) narrow(from[i], param[i], master[i]);                                \
  }

TRAINOPS_CONVERT_WEIGHT(BFloat16, Remainder)
TRAINOPS_CONVERT_WEIGHT(BFloat16, float)
TRAINOPS_CONVERT_WEIGHT(Float16, float)
#undef TRAINOPS_CONVERT_WEIGHT

// Calls function(elements) with the cell's elements from `begin` on, which are of another type than T.
template <typename T, typename Function>
void with_elements(const Cell& cell, int64_t begin, Function function) {
  using Other = std::conditional_t<std::is_same_v<T, float>, double, float>;
  if (stored(cell.dtype) == DType::bfloat16) return function(static_cast<BFloat16*>(cell.address) + begin);
  if (cell.dtype == DType::float16) return function(static_cast<Float16*>(cell.address) + begin);
  function(static_cast<Other*>(cell.address) + begin);
}

// Calls function(parameters, masters) with the arrays of a weight from `begin` on.
template <typename Function>
void with_arrays(const Weight& weight, int64_t begin, Function function) {
  const auto masters = [&](auto* params) {
    if constexpr (std::is_same_v<decltype(params), BFloat16*>) {
      if (weight.is_split()) return function(params, static_cast<Remainder*>(weight.master.address) + begin);
    }
    function(params, static_cast<float*>(weight.master.address) + begin);
  };
  if (weight.param.dtype == DType::bfloat16) return masters(static_cast<BFloat16*>(weight.param.address) + begin);
  masters(static_cast<Float16*>(weight.param.address) + begin);
}

}  // namespace

const char* instruction_set() {
#ifdef TRAINOPS_AVX512
  if (__builtin_cpu_supports(TRAINOPS_AVX512)) return "AVX-512";
  if (__builtin_cpu_supports("avx2")) return "AVX2";
#endif
  return "baseline SIMD";
}

template <typename T>
void read(const Cell& cell, int64_t begin, int64_t size, T* values) {
  if constexpr (std::is_same_v<T, float>) {
    if (is_codes(cell.dtype)) {
      BFloat16 decoded[kTileNumel];
      read_codes(cell, begin, size, decoded);
      return read_tile(static_cast<const BFloat16*>(decoded), values, size);
    }
  }
  with_elements<T>(cell, begin, [&](const auto* elements) { read_tile(elements, values, size); });
}

template <typename T>
void write(const Cell& cell, int64_t begin, int64_t size, const T* values) {
  if (cell.dtype == DType::stochastic) {
    if constexpr (std::is_same_v<T, float>) return write_tile(values, stochastic_column(cell, begin), size);
    float rounded[kTileNumel];
    std::copy(values, values + size, rounded);
    return write_tile(rounded, stochastic_column(cell, begin), size);
  }
  with_elements<T>(cell, begin, [&](auto* elements) { write_tile(values, elements, size); });
}

void read(const Weight& weight, int64_t begin, int64_t size, float* values) {
  with_arrays(weight, begin, [&](auto* params, auto* masters) { read_tile(params, masters, values, size); });
}

void write(const Weight& weight, int64_t begin, int64_t size, const float* values) {
  with_arrays(weight, begin, [&](auto* params, auto* masters) { write_tile(values, params, masters, size); });
}

template void read(const Cell&, int64_t, int64_t, float*);
template void read(const Cell&, int64_t, int64_t, double*);
template void write(const Cell&, int64_t, int64_t, const float*);
template void write(const Cell&, int64_t, int64_t, const double*);

}  // namespace trainops::cpu
