// The memory of the devices: PyTorch's CPU tensors, by an allocator that knows where each begins and ends. A tensor
// belongs to the device that was current when it was made, and holds NaN until it is written.
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>

#include "launch.h"

namespace ptx {
namespace {

thread_local int current = 0;
std::mutex mutex;

std::map<u64, Allocation>& allocations() {
  static auto& all = *new std::map<u64, Allocation>;  // outlives the tensors
  return all;
}

void release(void* bytes) {
  if (bytes == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    allocations().erase(reinterpret_cast<u64>(bytes));
  }
  std::free(bytes);
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* const bytes = size == 0 ? nullptr : std::aligned_alloc(64, (size + 63) / 64 * 64);
    if (bytes != nullptr) {
      std::memset(bytes, 0xff, size);
      const std::lock_guard<std::mutex> lock(mutex);
      const u64 begin = reinterpret_cast<u64>(bytes);
      allocations()[begin] = {begin, begin + size, current};
    }
    return {bytes, bytes, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};

}  // namespace

Allocation allocation_at(u64 address) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto next = allocations().upper_bound(address);
  if (next == allocations().begin()) return {};
  const Allocation& found = (--next)->second;
  return address < found.end ? found : Allocation{};
}

int current_device() { return current; }
void make_current(int device) { current = device; }

}  // namespace ptx

// From now on PyTorch allocates here, or (0) where it did before.
PTX_EXPORT void ptx_allocate_here(int here) {
  static ptx::Allocator& ours = *new ptx::Allocator;
  static c10::Allocator* const before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(here != 0 ? &ours : before, 100);
}
// Where the i-th allocation begins, and its size; 0 past the last one.
PTX_EXPORT ptx::u64 ptx_allocation(ptx::u32 index, ptx::u64* size) {
  const std::lock_guard<std::mutex> lock(ptx::mutex);
  if (index >= ptx::allocations().size()) return 0;
  const auto& found = std::next(ptx::allocations().begin(), index)->second;
  *size = found.end - found.begin;
  return found.begin;
}
PTX_EXPORT int ptx_get_device() { return ptx::current_device(); }
PTX_EXPORT void ptx_set_device(int device) { ptx::make_current(device); }
