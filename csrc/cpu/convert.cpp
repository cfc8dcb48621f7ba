#include "convert.h"

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
#define TRAINOPS_CONVERT(From, T)                                                                       \
  TRAINOPS_MULTIVERSION void read(const From* from, T* to, int64_t size) { widen_all(from, to, size); } \
  TRAINOPS_MULTIVERSION void write(const T* from, From* to, int64_t size) { narrow_all(from, to, size); }

TRAINOPS_CONVERT(BFloat16, float)
TRAINOPS_CONVERT(Float16, float)
TRAINOPS_CONVERT(double, float)
TRAINOPS_CONVERT(BFloat16, double)
TRAINOPS_CONVERT(Float16, double)
TRAINOPS_CONVERT(float, double)
#undef TRAINOPS_CONVERT

template <typename From, typename T>
T* read_cell(const Cell& cell, int64_t begin, int64_t size, T* buffer) {
  read(static_cast<const From*>(cell.address) + begin, buffer, size);
  return buffer;
}

template <typename To, typename T>
void write_cell(const Cell& cell, int64_t begin, int64_t size, const T* values) {
  write(values, static_cast<To*>(cell.address) + begin, size);
}

// float for double and double for float.
template <typename T>
struct Other {
  using type = float;
};
template <>
struct Other<float> {
  using type = double;
};

}  // namespace

const char* instruction_set() {
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512f")) return "AVX-512";
  if (__builtin_cpu_supports("avx2")) return "AVX2";
#endif
  return "baseline SIMD";
}

template <typename T>
T* load(const Cell& cell, int64_t begin, int64_t size, T* buffer) {
  if (cell.dtype == dtype_of<T>) return place(cell, begin, buffer);
  if (cell.dtype == DType::bfloat16) return read_cell<BFloat16>(cell, begin, size, buffer);
  if (cell.dtype == DType::float16) return read_cell<Float16>(cell, begin, size, buffer);
  return read_cell<typename Other<T>::type>(cell, begin, size, buffer);
}

template <typename T>
void store(const Cell& cell, int64_t begin, int64_t size, const T* values) {
  if (cell.dtype == dtype_of<T>) return;
  if (cell.dtype == DType::bfloat16) return write_cell<BFloat16>(cell, begin, size, values);
  if (cell.dtype == DType::float16) return write_cell<Float16>(cell, begin, size, values);
  write_cell<typename Other<T>::type>(cell, begin, size, values);
}

template float* load(const Cell&, int64_t, int64_t, float*);
template double* load(const Cell&, int64_t, int64_t, double*);
template void store(const Cell&, int64_t, int64_t, const float*);
template void store(const Cell&, int64_t, int64_t, const double*);

}  // namespace trainops::cpu
