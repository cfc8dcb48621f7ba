// Prefetches the memory of tensors some rows ahead. After backward, tensor objects are not cached: the Python object,
// the C++ object that it points to, and the storage that this points to. Each stage prefetches the next stage's
// memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

namespace trainops {

constexpr Py_ssize_t kAhead = 6;  // rows

// Prefetching an invalid address is harmless.
inline void prefetch(const void* object) {
#if defined(__GNUC__)
  __builtin_prefetch(object);
#else
  (void)object;
#endif
}

// Prefetches three cache lines of each object that a tensor's Python object points to. The pointers follow its head.
// Objects that are too small to have them, like None, are no tensors.
inline void prefetch_pointees(PyObject* object) {
  constexpr size_t kHead = 2, kPointers = 2;
  if (Py_TYPE(object)->tp_basicsize < static_cast<Py_ssize_t>((kHead + kPointers) * sizeof(void*))) return;
  void* const* pointers = reinterpret_cast<void* const*>(object) + kHead;
  for (size_t i = 0; i < kPointers; ++i) {
    for (int line = 0; line < 3; ++line) prefetch(static_cast<const char*>(pointers[i]) + 64 * line);
  }
}

// Prefetches what the last two slots of a Python object point to: of a DTensor, its shard and how it is placed.
inline void prefetch_slots(PyObject* object) {
  constexpr Py_ssize_t kHead = 2, kSlots = 2;
  const Py_ssize_t words = Py_TYPE(object)->tp_basicsize / static_cast<Py_ssize_t>(sizeof(void*));
  if (words < kHead + kSlots) return;
  void* const* const end = reinterpret_cast<void* const*>(object) + words;
  for (Py_ssize_t i = 1; i <= kSlots; ++i) prefetch(end[-i]);
}

}  // namespace trainops
