// Run-time SIMD selection and threads for the CPU kernels.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

// TRAINOPS_MULTIVERSION compiles a function once per instruction set, and the loader picks the best that the machine
// has. x86-64-v4 names features, not one CPU model. It includes AVX-512BW, which 16-bit loops need for full
// registers. GCC before 12 lacks the name and gets avx512f. Floating-point contraction is off in this build, so every
// version gives the same bits.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define TRAINOPS_AVX512 "x86-64-v4"
#define TRAINOPS_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define TRAINOPS_AVX512 "avx512f"
#define TRAINOPS_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define TRAINOPS_MULTIVERSION
#endif

namespace trainops::cpu {

// Elements in a unit of parallel work: large beside the cost of handing it out, small beside a model.
constexpr int64_t kChunkNumel = 1 << 16;

// Elements that a kernel works on at a time, so that its operands stay in the first-level cache and 16-bit ones
// can be widened and narrowed there.
constexpr int64_t kTileNumel = 1024;

// False in a forked child where OpenMP would wait for threads of the parent (parallel.cpp).
bool may_use_threads();

// Calls body(index) for every index below `count`.
template <typename Body>
void for_each_in_parallel(int64_t count, Body body) {
  const bool parallel = count > 1 && may_use_threads();
  (void)parallel;
#pragma omp parallel for schedule(dynamic) if (parallel)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace trainops::cpu
