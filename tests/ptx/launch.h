// The parts of the machine among themselves: memory.cpp, machine.cpp, races.cpp, and what launches: cuda_runtime.cpp.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "machine.h"

#define PTX_EXPORT extern "C" __attribute__((visibility("default")))

namespace ptx {

constexpr u32 kWarp = 32, kBarriers = 16;

// An allocation [begin, end) of a device; empty where there is none at the address.
struct Allocation {
  u64 begin = 0, end = 0;
  int device = 0;
};
Allocation allocation_at(u64 address);
int current_device();
void make_current(int device);

const Kernel* kernel_named(const std::string& name);

// Runs a grid on the current device. False if it was ended by a fault, which last_fault() tells.
bool run(const Kernel& kernel, u32 blocks, u32 threads, const char* parameters, u32 dynamic_shared_bytes);
const std::string& last_fault();

// Ends the launch from within a thread.
struct Fault {
  std::string what;
};
[[noreturn]] void fault(const Site* site, const std::string& what);
std::string place(const Site* site);

// What the threads of a block share

struct Barrier {
  u32 arrived = 0, passed = 0, votes[2] = {};  // votes of a barrier and of the next one
  const Site* site = nullptr;
};

// Lanes wait here until all of their mask have come; each then finds what the lanes had.
struct Warp {
  u32 waiting = 0, passed[kWarp] = {}, masks[kWarp] = {}, values[kWarp] = {}, found[kWarp][kWarp] = {};
  const Site* sites[kWarp] = {};
};

struct Block {
  u32 index = 0, running = 0;
  std::vector<char> shared, written;  // written: whether a byte of shared memory has been
  Barrier barriers[kBarriers];
  std::vector<Warp> warps;
};

// Of the thread that runs
const Thread& own_thread();
Block& own_block();
void wait_for(const u32& passed, u32 before, const Site& site);  // while `passed` is `before`
void maybe_interrupt();
u64 launch_number();

// Happens-before between the threads of one launch. A race is a fault.
class Races {
 public:
  virtual ~Races() = default;
  // `same`: a write stores what the memory holds.
  virtual void access(u32 thread, u64 address, u32 size, Access access, const Site& site, bool same) = 0;
  virtual void meet(const std::vector<u32>& threads) = 0;  // at a barrier
  virtual void fence(u32 thread, Scope scope) = 0;
  virtual void atomic(u32 thread, u64 address, Order order, Scope scope, bool returns) = 0;
};
std::unique_ptr<Races> new_races(const Kernel& kernel, u32 blocks, u32 block_threads);
Races* races();  // of the launch; null where none are looked for

// The address by which the race detector knows a byte of a block's shared memory.
inline u64 shared_address(u32 block, u32 offset) { return u64(1) << 63 | u64{block} << 24 | offset; }

}  // namespace ptx
