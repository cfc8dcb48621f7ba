#include "memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace trainops::cpu {

void want_huge_pages(const Cell& cell, int64_t numel) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 1 << 21, kAtLeast = 4;
  const auto address = reinterpret_cast<uintptr_t>(cell.address);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + static_cast<uintptr_t>(numel) * itemsize(cell.dtype)) / kHugePage * kHugePage;
  if (end >= begin + kAtLeast * kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)cell;
  (void)numel;
#endif
}

}  // namespace trainops::cpu
