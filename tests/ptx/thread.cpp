// What the threads of a grid can do: reach memory, and wait for each other.
#include <algorithm>
#include <utility>

#include "launch.h"

namespace ptx {
namespace {

u64 accesses_of_size[17];  // of global memory, by their bytes

u32 arrive(u32 index, const Site& site, Vote vote, bool value) {
  if (index >= kBarriers) fault(&site, "there are 16 barriers");
  Block& block = own_block();
  Barrier& barrier = block.barriers[index];
  const u32 turn = barrier.passed;
  u32& votes = barrier.votes[turn % 2];
  if (barrier.arrived == 0) votes = 0;
  if (barrier.arrived > 0 && barrier.site != &site) {
    fault(&site, "threads of a block meet at different barriers, the other one" + place(barrier.site));
  }
  barrier.site = &site;
  votes += value;
  const u32 threads = own_thread().threads;
  if (++barrier.arrived < threads) {
    wait_for(barrier.passed, turn, site);
  } else {
    if (races()) {
      std::vector<u32> all;
      for (u32 i = 0; i < threads; ++i) all.push_back(own_thread().id - own_thread().thread + i);
      races()->meet(all);
    }
    barrier.arrived = 0;
    ++barrier.passed;
  }
  return vote == Vote::count ? votes : vote == Vote::any ? votes > 0 : votes == threads;
}

// The values of the lanes of `mask`, when all have come. A barrier orders what they do; a shuffle does not.
const u32* exchange(u32 value, u32 mask, const Site& site, bool is_barrier = false) {
  const u32 lane = own_thread().thread % kWarp, warp_index = own_thread().thread / kWarp;
  Warp& warp = own_block().warps[warp_index];
  const u32 lanes = std::min(kWarp, own_thread().threads - warp_index * kWarp);
  mask &= static_cast<u32>((u64(1) << lanes) - 1);
  if ((mask >> lane & 1) == 0) fault(&site, "a lane's mask is without it");
  const u32 turn = warp.passed[lane];
  warp.waiting |= 1u << lane;
  warp.masks[lane] = mask, warp.values[lane] = value, warp.sites[lane] = &site;
  for (u32 other = 0; other < lanes; ++other) {
    if ((mask & warp.waiting) >> other & 1 && (warp.sites[other] != &site || warp.masks[other] != mask)) {
      fault(&site,
            "lanes of a warp meet at different instructions or masks, the other one" + place(warp.sites[other]));
    }
  }
  if ((warp.waiting & mask) != mask) {
    wait_for(warp.passed[lane], turn, site);
    return warp.found[lane];
  }
  std::vector<u32> met;
  for (u32 other = 0; other < lanes; ++other) {
    if ((mask >> other & 1) == 0) continue;
    met.push_back(own_thread().id - lane + other);
    std::copy(warp.values, warp.values + kWarp, warp.found[other]);
    ++warp.passed[other];
  }
  warp.waiting &= ~mask;
  if (races() && is_barrier) races()->meet(met);
  return warp.found[lane];
}

}  // namespace

std::string place(const Site* site) {
  return std::string(site == nullptr ? "" : std::string(": ") + site->opcode + " at " + site->where);
}

void fault(const Site* site, const std::string& what) {
  const Thread& t = own_thread();
  throw Fault{what + place(site) + " (block " + std::to_string(t.block) + " thread " + std::to_string(t.thread) +
              ")"};
}
void fault_of_division() { fault(nullptr, "division by zero"); }

char* Thread::global(u64 address, u32 size, Access access, Site& site) {
  maybe_interrupt();
  ++accesses_of_size[size];
  if (address % size != 0) fault(&site, "an access of " + std::to_string(size) + " bytes is not aligned");
  if (site.launch != launch_number() || address < site.begin || address + size > site.end) {
    const Allocation found = allocation_at(address);
    if (address + size > found.end) fault(&site, "an access outside of all tensors");
    if (found.device != current_device()) fault(&site, "memory of another device");
    site.begin = found.begin, site.end = found.end, site.launch = launch_number();
  }
  char* const bytes = reinterpret_cast<char*>(address);
  if (races()) races()->access(id, address, size, access, site, false);
  return bytes;
}

char* Thread::shared(u32 offset, u32 size, Access access, Site& site, const char* stored) {
  maybe_interrupt();
  Block& own = own_block();
  if (offset % size != 0) fault(&site, "an access of " + std::to_string(size) + " bytes is not aligned");
  if (u64{offset} + size > own.shared.size()) fault(&site, "an access past the end of shared memory");
  char* const bytes = own.shared.data() + offset;
  const bool same = stored != nullptr && std::memcmp(bytes, stored, size) == 0;
  if (races()) races()->access(id, shared_address(block, offset), size, access, site, same);
  const auto written = own.written.begin() + offset;
  if (access == Access::write) std::fill(written, written + size, 1);
  if (std::find(written, written + size, 0) != written + size)
    fault(&site, "shared memory is read before it is written");
  return bytes;
}

char* Thread::generic(u64 address, u32 size, Access access, Site& site) {
  const u64 first = reinterpret_cast<u64>(parameters);
  if (address < first || address + size > first + parameter_bytes) return global(address, size, access, site);
  if (address % size != 0) fault(&site, "a parameter is not aligned");
  if (access != Access::read) fault(&site, "parameters are not to be written");
  return reinterpret_cast<char*>(address);
}

char* Thread::atomic(u64 address, u32 size, Order order, Scope scope, bool returns, Site& site) {
  char* const bytes =
      global(address, size, scope == Scope::device ? Access::atomic_of_device : Access::atomic_of_block, site);
  if (races()) races()->atomic(id, address, order, scope, returns);
  return bytes;
}

const char* Thread::parameter(u64 offset, u32 size, Site& site) {
  if (offset + size > parameter_bytes) fault(&site, "past the end of the parameters");
  return parameters + offset;
}

void Thread::barrier(u32 index, Site& site) {
  if (!site.removed) arrive(index, site, Vote::any, false);
}
u32 Thread::barrier_vote(u32 index, Vote vote, bool value, Site& site) {
  return site.removed ? value : arrive(index, site, vote, value);
}
void Thread::fence(Scope scope, Site& site) {
  if (races() && !site.removed) races()->fence(id, scope);
}
void Thread::trap(Site& site) { fault(&site, "trap"); }

void Thread::warp_barrier(u32 mask, Site& site) {
  if (!site.removed) exchange(0, mask, site, true);
}

u32 Thread::shuffle(Shuffle kind, u32 value, u32 operand, u32 limits, u32 mask, bool& inside, Site& site) {
  const u32* const values = exchange(value, mask, site);
  const int lane = static_cast<int>(thread % kWarp), by = static_cast<int>(operand & 31);
  const int segment = limits >> 8 & 31, clamp = limits & 31;  // as PTX defines them
  const int lowest = lane & segment, highest = lowest | (clamp & ~segment);
  int from = lane;
  if (kind == Shuffle::up) from = lane - by, inside = from >= highest;
  if (kind == Shuffle::down) from = lane + by, inside = from <= highest;
  if (kind == Shuffle::bfly) from = lane ^ by, inside = from <= highest;
  if (kind == Shuffle::idx) from = lowest | (by & ~segment), inside = from <= highest;
  if (!inside) return value;
  if ((mask >> from & 1) == 0) fault(&site, "a lane reads one that is not in its mask");
  return values[from];
}

namespace {

// Matrices of 8 rows of 8 elements of 2 bytes: lane i knows where row i % 8 of matrix i / 8 begins. A lane's part of
// a matrix is elements 2 * (i % 4) and the next one of row i / 4; if transposed, of column i / 4. It gets or stores
// them from the lower to the higher half of a register.
template <typename Element>
void for_each_element(u32 lane, const u32* rows, u32 count, bool transposed, Element element) {
  for (u32 matrix = 0; matrix < count; ++matrix) {
    for (u32 half = 0; half < 2; ++half) {
      u32 row = lane / 4, column = 2 * (lane % 4) + half;
      if (transposed) std::swap(row, column);
      element(matrix, half, rows[8 * matrix + row] + 2 * column);
    }
  }
}

void exchange_rows(u32 row, u32 count, const Site& site, u32* rows) {
  if (row % 16 != 0 && own_thread().thread % kWarp < 8 * count) fault(&site, "a row of a matrix is not aligned");
  std::copy_n(exchange(row, ~u32(0), site), kWarp, rows);
}

}  // namespace

void Thread::load_matrices(u32 row, u32* parts, u32 count, bool transposed, Site& site) {
  u32 rows[kWarp];
  exchange_rows(row, count, site, rows);
  std::fill(parts, parts + count, 0);
  for_each_element(thread % kWarp, rows, count, transposed, [&](u32 matrix, u32 half, u32 offset) {
    parts[matrix] |= u32{read<u16>(shared(offset, 2, Access::read, site))} << 16 * half;
  });
}

void Thread::store_matrices(u32 row, const u32* parts, u32 count, bool transposed, Site& site) {
  u32 rows[kWarp];
  exchange_rows(row, count, site, rows);
  for_each_element(thread % kWarp, rows, count, transposed, [&](u32 matrix, u32 half, u32 offset) {
    char element[2];
    write(element, static_cast<u16>(parts[matrix] >> 16 * half));
    std::memcpy(shared(offset, 2, Access::write, site, element), element, 2);
  });
}

u32 Thread::ballot(bool value, u32 mask, Site& site) {
  const u32* const values = exchange(value, mask, site);
  u32 votes = 0;
  for (u32 lane = 0; lane < kWarp; ++lane) votes |= (mask >> lane & values[lane] & 1) << lane;
  return votes;
}

template <typename T>
T Thread::reduce(Reduction kind, T value, u32 mask, Site& site) {
  const u32* const values = exchange(static_cast<u32>(value), mask, site);
  T result = value;
  for (u32 lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0 || lane == thread % kWarp) continue;
    const T other = static_cast<T>(values[lane]);
    if (kind == Reduction::add) result += other;
    if (kind == Reduction::min) result = std::min(result, other);
    if (kind == Reduction::max) result = std::max(result, other);
  }
  return result;
}
template u32 Thread::reduce(Reduction, u32, u32, Site&);
template s32 Thread::reduce(Reduction, s32, u32, Site&);

}  // namespace ptx

// For tests: how many accesses of so many bytes there were since it was last asked.
PTX_EXPORT ptx::u64 ptx_accesses(ptx::u32 size) { return std::exchange(ptx::accesses_of_size[size], 0); }
