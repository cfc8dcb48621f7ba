// Finds data races by happens-before, as PTX's memory model defines it (PTX manual, "Memory Consistency Model"):
//
// - A thread's actions are in order. A barrier orders what its threads did before it, before what they do after.
// - A fence, an atomic, then in another thread an atomic on the same address and a fence, in this order: what came
//   before the first fence is before what comes after the second, if both scopes include both threads. An atomic with
//   release or acquire is its own fence, for its address alone. A `red` returns nothing, so it acquires nothing.
// - A plain write to the address ends such a chain of atomics.
//
// Two accesses of a byte are a race if one writes and neither is before the other, unless both are atomic with scopes
// that include both threads. After an atomic, plain accesses of its address come after all atomics of the chain.
//
// One exception: threads of a block may write the same value to shared memory at the same instruction, as Triton's
// reductions do. PTX defines this race: a read after either write finds one of the two values ("Limitations on
// Mixed-size Data-races"). Later writes must come after both.
//
// The order that PTX gives to any two fence.sc (which membar is) is left out: another run may have the other order.
#include <algorithm>
#include <memory>
#include <unordered_map>

#include "launch.h"

namespace ptx {
namespace {

using Clock = std::vector<u32>;  // how much of each thread's past is known

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

enum Kind : u64 { kPlain, kAtomicOfBlock, kAtomicOfDevice, kManyReads };

struct Event {
  u64 thread : 24, time : 22, site : 16, kind : 2;  // time 0: none
};

// The last write of some bytes, and the last read since. Reads that are not ordered among themselves are elsewhere:
// kManyReads.
struct Cell {
  Event write = {}, read = {};
};

// Its cells are as wide as its narrowest access.
struct Page {
  static constexpr u64 kBytes = 1024;
  u64 width = 16;
  std::vector<Cell> cells = std::vector<Cell>(kBytes / 16);
};

struct ThreadState {
  std::shared_ptr<const Clock> others;
  u32 time = 1;
  Clock released[2], seen[2];  // by Scope: at the last fence; by atomics, to be known after the next fence
};

class Detector final : public Races {
 public:
  Detector(const Kernel& kernel, u32 blocks, u32 block_threads)
      : sites_(kernel.sites), block_threads_(block_threads), threads_(blocks * block_threads) {
    const auto nothing = std::make_shared<const Clock>(threads_.size());
    for (ThreadState& state : threads_) state.others = nothing;
  }

  void access(u32 thread, u64 address, u32 size, Access access, const Site& site, bool same) override {
    Event event = {thread, threads_[thread].time, static_cast<u64>(&site - sites_), kPlain};
    if (access == Access::atomic_of_block) event.kind = kAtomicOfBlock;
    if (access == Access::atomic_of_device) event.kind = kAtomicOfDevice;
    Page& page = pages_[address / Page::kBytes];
    if (size < page.width) narrow(page, address / Page::kBytes * Page::kBytes, size);
    for (u64 at = address; at < address + size; at += page.width) {
      Cell& cell = page.cells[at % Page::kBytes / page.width];
      access == Access::read ? read(cell, at, event) : write(cell, at, event, same);
    }
  }

  void meet(const std::vector<u32>& met) override {
    const auto all = std::make_shared<Clock>(*threads_[met[0]].others);
    const Clock* joined = threads_[met[0]].others.get();
    for (u32 thread : met) {
      if (threads_[thread].others.get() != joined) join(*all, *(joined = threads_[thread].others.get()));
    }
    for (u32 thread : met) (*all)[thread] = threads_[thread].time++;
    for (u32 thread : met) threads_[thread].others = all;
  }

  void fence(u32 thread, Scope scope) override {
    ThreadState& state = threads_[thread];
    learn(thread, state.seen[kBlock]);
    if (scope == Scope::device) learn(thread, state.seen[kDevice]);
    state.released[kBlock] = now(thread);
    if (scope == Scope::device) state.released[kDevice] = state.released[kBlock];
    ++state.time;
  }

  void atomic(u32 thread, u64 address, Order order, Scope scope, bool returns) override {
    ThreadState& state = threads_[thread];
    Location& location = locations_[address];
    const bool of_device = scope == Scope::device;
    const bool releases = order == Order::release || order == Order::acquire_release;
    const bool acquires = order == Order::acquire || order == Order::acquire_release;
    Clock& of_block = location.of_blocks[thread / block_threads_];
    const Clock before = of_device ? location.of_device : Clock(), before_of_block = of_block;
    join(of_block, releases ? now(thread) : state.released[kBlock]);
    if (of_device) join(location.of_device, releases ? now(thread) : state.released[kDevice]);
    if (releases) ++state.time;
    if (!returns) return;
    join(state.seen[kBlock], before_of_block);
    join(state.seen[kDevice], before);
    if (acquires) learn(thread, before_of_block), learn(thread, before);
  }

 private:
  enum { kBlock = static_cast<int>(Scope::block), kDevice = static_cast<int>(Scope::device) };

  // What can be learned from atomics on an address.
  struct Location {
    Clock of_device;
    std::unordered_map<u32, Clock> of_blocks;
  };

  void learn(u32 thread, const Clock& clock) {
    if (clock.empty()) return;
    const auto known = std::make_shared<Clock>(*threads_[thread].others);
    join(*known, clock);
    threads_[thread].others = known;
  }

  Clock now(u32 thread) const {
    Clock clock = *threads_[thread].others;
    clock[thread] = threads_[thread].time;
    return clock;
  }

  bool is_before(const Event& event, u32 thread) const {
    return event.time == 0 || event.thread == thread || (*threads_[thread].others)[event.thread] >= event.time;
  }

  bool both_atomic(const Event& a, const Event& b) const {
    if (a.kind == kPlain || b.kind == kPlain) return false;
    const bool of_device = a.kind == kAtomicOfDevice && b.kind == kAtomicOfDevice;
    return of_device || a.thread / block_threads_ == b.thread / block_threads_;
  }

  void narrow(Page& page, u64 begin, u64 width) {
    std::vector<Cell> cells(Page::kBytes / width);
    for (u64 i = 0; i < cells.size(); ++i) {
      const u64 from = i * width / page.width;
      cells[i] = page.cells[from];
      if (cells[i].read.kind == kManyReads) readers_[begin + i * width] = readers_[begin + from * page.width];
    }
    page.cells.swap(cells);
    page.width = width;
  }

  void read(Cell& cell, u64 at, const Event& event) {
    if (!is_before(cell.write, event.thread)) report(event, at, cell.write, "reads", "wrote");
    add_reader(cell, at, event);
  }

  void add_reader(Cell& cell, u64 at, const Event& event) {
    if (cell.read.kind == kManyReads) {
      readers_[at][event.thread] = event;
    } else if (is_before(cell.read, event.thread)) {
      cell.read = event;
    } else {
      std::vector<Event>& readers = readers_[at];
      readers.assign(threads_.size(), Event{});
      for (const Event& reader : {cell.read, event}) readers[reader.thread] = reader;
      cell.read.kind = kManyReads;
    }
  }

  void write(Cell& cell, u64 at, const Event& event, bool same) {
    if (!both_atomic(cell.write, event) && !is_before(cell.write, event.thread)) {
      if (!same || cell.write.site != event.site) report(event, at, cell.write, "writes", "wrote");
      return add_reader(cell, at, event);  // of two equal writes, the second one is known by what it forbids
    }
    if (cell.read.kind == kManyReads) {
      for (const Event& reader : readers_[at]) {
        if (!is_before(reader, event.thread)) report(event, at, reader, "writes", "read");
      }
      readers_.erase(at);
    } else if (!is_before(cell.read, event.thread)) {
      report(event, at, cell.read, "writes", "read");
    }
    if (event.kind == kPlain && cell.write.kind != kPlain) locations_.erase(at);
    cell = {event, {}};
  }

  std::string name(u32 thread) const {
    return "block " + std::to_string(thread / block_threads_) + " thread " + std::to_string(thread % block_threads_);
  }

  [[noreturn]] void report(const Event& event, u64 address, const Event& other, const char* does, const char* did) {
    const std::string place = address >> 63 != 0 ? "shared" : "global";
    fault(&sites_[event.site], "race in " + place + " memory: " + name(event.thread) + " " + does + " what " +
                                   name(other.thread) + " " + did + " at " + sites_[other.site].where);
  }

  const Site* const sites_;
  const u32 block_threads_;
  std::vector<ThreadState> threads_;
  std::unordered_map<u64, Page> pages_;
  std::unordered_map<u64, std::vector<Event>> readers_;  // by cell, and in each by thread
  std::unordered_map<u64, Location> locations_;
};

}  // namespace

std::unique_ptr<Races> new_races(const Kernel& kernel, u32 blocks, u32 block_threads) {
  return std::make_unique<Detector>(kernel, blocks, block_threads);
}

}  // namespace ptx
