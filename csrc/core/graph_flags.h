// Flags that a CUDA graph raises when it is destroyed. The driver calls `raise_flag` on a thread of its own, which
// may call neither CUDA nor Python, perhaps when Python has ended: so flags are no objects of Python.
#pragma once

#include <atomic>
#include <cstdint>

namespace trainops {

using GraphFlag = std::atomic<bool>;

inline uintptr_t new_flag() { return reinterpret_cast<uintptr_t>(new GraphFlag(false)); }

inline void raise_flag(void* flag) { static_cast<GraphFlag*>(flag)->store(true); }

// Whether it is raised. If so, nobody has it any more, and it is deleted.
inline bool take_flag(uintptr_t address) {
  auto* const flag = reinterpret_cast<GraphFlag*>(address);
  const bool raised = flag->load();
  if (raised) delete flag;
  return raised;
}

}  // namespace trainops
