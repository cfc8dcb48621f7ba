// Finds data races by happens-before, as PTX's memory model defines it:
//
// - A thread's actions are in order. A barrier orders what all of its threads did before it, before what they do
// after.
// - A fence, an atomic, and in another thread an atomic on the same address that comes later and a fence, in this
// order,
//   order what came before the first fence before what comes after the second; if both scopes include both threads.
//
// Two accesses of a byte are a race if one writes, not both are atomic, and neither is before the other. After a
// thread's own atomic on an address, its plain accesses there come after all atomics that this one came after.
// Two writes of the same bytes are none: Triton lets all threads that hold a result store it.
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

struct Event {
  u32 thread = 0, time = 0;  // 0: none
  const Site* site = nullptr;
};

// The last accesses of a byte. Readers that are not ordered among themselves are kept one by one.
struct Byte {
  Event write, read;
  bool atomic = false;
  std::unique_ptr<std::vector<Event>> readers;  // by thread
};

struct ThreadState {
  std::shared_ptr<const Clock> others;
  u32 time = 1;
  Clock released[2], seen[2];  // by Scope: at the last fence; by atomics, to be known after the next fence
};

class Detector final : public Races {
 public:
  Detector(u32 blocks, u32 block_threads) : block_threads_(block_threads), threads_(blocks * block_threads) {
    const auto nothing = std::make_shared<const Clock>(threads_.size());
    for (ThreadState& state : threads_) state.others = nothing;
  }

  void access(u32 thread, u64 address, u32 size, Access access, const Site& site, bool is_there) override {
    for (u64 at = address; at < address + size; ++at) access_byte(thread, at, access, site, is_there);
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
    auto known = std::make_shared<Clock>(*state.others);
    join(*known, state.seen[static_cast<int>(Scope::block)]);
    if (scope == Scope::device) join(*known, state.seen[static_cast<int>(Scope::device)]);
    (*known)[thread] = state.time++;
    state.released[static_cast<int>(Scope::block)] = *known;
    if (scope == Scope::device) state.released[static_cast<int>(Scope::device)] = *known;
    state.others = known;
  }

  void atomic(u32 thread, u64 address, Order order, Scope scope) override {
    if (order == Order::release || order == Order::acquire_release) fence(thread, scope);
    ThreadState& state = threads_[thread];
    Location& location = locations_[address];
    Clock& of_block = location.of_blocks[thread / block_threads_];
    join(state.seen[static_cast<int>(Scope::block)], of_block);
    join(of_block, state.released[static_cast<int>(Scope::block)]);
    if (scope == Scope::device) {
      join(state.seen[static_cast<int>(Scope::device)], location.of_device);
      join(location.of_device, state.released[static_cast<int>(Scope::device)]);
    }
    if (order == Order::acquire || order == Order::acquire_release) fence(thread, scope);
  }

 private:
  struct Location {
    Clock of_device;
    std::unordered_map<u32, Clock> of_blocks;
  };

  bool is_before(const Event& event, u32 thread) const {
    return event.time == 0 || event.thread == thread || (*threads_[thread].others)[event.thread] >= event.time;
  }

  void access_byte(u32 thread, u64 address, Access access, const Site& site, bool is_there) {
    auto& page = pages_[address >> 10];
    if (!page) page.reset(new Byte[1 << 10]);
    Byte& byte = page[address & 1023];
    const Event event{thread, threads_[thread].time, &site};
    if (!(access == Access::atomic && byte.atomic) && !is_there && !is_before(byte.write, thread)) {
      report(event, address, byte.write, access == Access::read ? "reads" : "writes", "wrote");
    }
    if (access == Access::read) return add_reader(byte, event);
    if (!is_before(byte.read, thread)) report(event, address, byte.read, "writes", "read");
    if (byte.readers) {
      for (const Event& reader : *byte.readers) {
        if (!is_before(reader, thread)) report(event, address, reader, "writes", "read");
      }
    }
    byte.write = event;
    byte.atomic = access == Access::atomic;
    byte.read = {};
    byte.readers.reset();
  }

  void add_reader(Byte& byte, const Event& event) {
    if (byte.readers) {
      (*byte.readers)[event.thread] = event;
    } else if (is_before(byte.read, event.thread)) {
      byte.read = event;
    } else {
      byte.readers = std::make_unique<std::vector<Event>>(threads_.size());
      for (const Event& reader : {byte.read, event}) (*byte.readers)[reader.thread] = reader;
      byte.read = {};
    }
  }

  std::string name(u32 thread) const {
    return "block " + std::to_string(thread / block_threads_) + " thread " + std::to_string(thread % block_threads_);
  }

  [[noreturn]] void report(const Event& event, u64 address, const Event& other, const char* does, const char* did) {
    const std::string place = address >> 63 != 0 ? "shared" : "global";
    fault(event.site, "race in " + place + " memory: " + name(event.thread) + " " + does + " what " +
                          name(other.thread) + " " + did + " at " + other.site->where);
  }

  const u32 block_threads_;
  std::vector<ThreadState> threads_;
  std::unordered_map<u64, std::unique_ptr<Byte[]>> pages_;
  std::unordered_map<u64, Location> locations_;
};

}  // namespace

Races* new_races(u32 blocks, u32 block_threads) { return new Detector(blocks, block_threads); }

}  // namespace ptx
