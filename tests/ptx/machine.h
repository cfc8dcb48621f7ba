// What the C++ that translate.py writes sees of the machine: one Thread for each thread of a grid. machine.cpp runs
// them.
#pragma once

#include "floats.h"

#define EXPORT __attribute__((visibility("default")))

namespace ptx {

enum class Access { read, write, atomic_of_block, atomic_of_device };
enum class Scope { block, device };
enum class Order { relaxed, acquire, release, acquire_release };
enum class Vote { any, all, count };
enum class Shuffle { up, down, bfly, idx };
enum class Reduction { add, min, max };

// An instruction that touches memory or waits for others. The last allocation that it touched is known to be there.
struct Site {
  const char* opcode;
  const char* where;     // in the source
  bool removed = false;  // a barrier or fence that tests have taken out
  u64 begin = 0, end = 0, launch = 0;
};

struct __attribute__((visibility("default"))) Thread {
  u32 thread, block, threads, blocks, id;  // id: in the grid
  const char* parameters;
  u32 parameter_bytes;

  // Where bytes lie in the host's memory. A fault unless the access is aligned to its size, inside of what is there,
  // and no race. `stored`: what will be written there. A generic address is one of global memory, or of the
  // parameters.
  char* global(u64 address, u32 size, Access access, Site& site);
  char* shared(u32 offset, u32 size, Access access, Site& site, const char* stored = nullptr);
  char* generic(u64 address, u32 size, Access access, Site& site);
  const char* parameter(u64 offset, u32 size, Site& site);

  void barrier(u32 index, Site& site);
  u32 barrier_vote(u32 index, Vote vote, bool value, Site& site);
  void fence(Scope scope, Site& site);
  void warp_barrier(u32 mask, Site& site);
  u32 shuffle(Shuffle kind, u32 value, u32 operand, u32 limits, u32 mask, bool& inside, Site& site);
  void load_matrices(u32 row, u32* parts, u32 count, bool transposed, Site& site);
  void store_matrices(u32 row, const u32* parts, u32 count, bool transposed, Site& site);
  u32 ballot(bool value, u32 mask, Site& site);
  template <typename T>
  T reduce(Reduction kind, T value, u32 mask, Site& site);  // u32 and s32
  [[noreturn]] void trap(Site& site);

  // `returns`: whether the kernel is told what was there.
  template <typename T>
  T atomic_add(u64 address, T value, Order order, Scope scope, bool returns, Site& site) {
    return add(atomic(address, sizeof(T), order, scope, returns, site), value);
  }

  template <typename T>
  T shared_add(u32 offset, T value, Site& site) {
    return add(shared(offset, sizeof(T), Access::atomic_of_block, site), value);
  }

 private:
  template <typename T>
  static T add(char* bytes, T value) {
    T before;
    std::memcpy(&before, bytes, sizeof before);
    const T after = before + value;
    std::memcpy(bytes, &after, sizeof after);
    return before;
  }
  char* atomic(u64 address, u32 size, Order order, Scope scope, bool returns, Site& site);
};

template <typename T>
T read(const char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}
template <typename T>
void write(char* bytes, T value) {
  std::memcpy(bytes, &value, sizeof value);
}

struct Parameter {
  u32 offset, size;
};

struct Kernel {
  const char* name;
  void (*run)(Thread&);
  const Parameter* parameters;
  u32 parameter_count, parameter_bytes, shared_bytes, most_threads;
  Site* sites;
  u32 site_count;
};

// Makes kernels known by their names; those of the same name are replaced.
EXPORT void add_kernels(const Kernel* kernels, u32 count);

}  // namespace ptx
