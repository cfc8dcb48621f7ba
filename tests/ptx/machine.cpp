// Runs grids: threads are fibers that take turns at barriers and warp instructions or, for a seed, at any access to
// memory; blocks run one after another or several at a time. The first fault ends the launch.
#include "machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#include "launch.h"
// AddressSanitizer has to know which stack is in use.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define FOR_SANITIZER(call) call
#else
#define FOR_SANITIZER(call)
#endif

namespace ptx {
namespace {

constexpr size_t kStack = 256 << 10;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf resume;
  Thread thread;
  Block* block;
  bool started, done;
  const u32* passed;  // waits while this is...
  u32 before;         // ...what it was
  const Site* waits_at;

  bool can_run() const { return !done && (passed == nullptr || *passed != before); }
};

// What tests choose.
u32 resident_blocks = 1, seed = 0, missing_blocks = 0;
bool finds_races = false;

std::mutex launching;
std::deque<Fiber> fibers;  // of which a launch uses the first
Fiber* current;
jmp_buf scheduler;
const Kernel* kernel;
std::unique_ptr<Races> race_detector;
std::mt19937 random_numbers;
u32 accesses_left = 0;  // until the thread is interrupted; 0: never
u64 launch = 0;
thread_local std::string message;
std::string first_fault;

const void* scheduler_stack;
size_t scheduler_stack_size;

void yield() {
  if (_setjmp(current->resume) == 0) {
    FOR_SANITIZER(__sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size));
    _longjmp(scheduler, 1);
  }
  FOR_SANITIZER(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size));
}

}  // namespace

void wait_for(const u32& passed, u32 before, const Site& site) {
  current->passed = &passed, current->before = before, current->waits_at = &site;
  while (passed == before) yield();
  current->passed = nullptr;
}

void maybe_interrupt() {
  if (accesses_left == 0 || --accesses_left > 0) return;
  accesses_left = 1 + random_numbers() % 64;
  yield();
}

const Thread& own_thread() { return current->thread; }
Block& own_block() { return *current->block; }
u64 launch_number() { return launch; }
Races* races() { return race_detector.get(); }

namespace {

void run_fiber() {
  FOR_SANITIZER(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size));
  try {
    kernel->run(current->thread);
  } catch (const Fault& found) {
    if (first_fault.empty()) first_fault = found.what;
  }
  current->done = true;
  --current->block->running;
  yield();
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) {
    FOR_SANITIZER(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr));
    return;
  }
  FOR_SANITIZER(__sanitizer_start_switch_fiber(nullptr, fiber.stack.get(), kStack));
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  FOR_SANITIZER(__asan_unpoison_memory_region(fiber.stack.get(), kStack));  // a fault may have left frames there
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

// Some threads wait for others that are done or wait elsewhere.
std::string deadlock(u32 count) {
  std::map<const Site*, u32> waiting;
  for (u32 i = 0; i < count; ++i) {
    if (!fibers[i].done) ++waiting[fibers[i].waits_at];
  }
  std::string text = "not all threads come";
  for (const auto& [site, threads] : waiting) text += place(site) + " (" + std::to_string(threads) + " threads wait)";
  return text;
}

class Grid {
 public:
  Grid(u32 blocks, u32 threads, const char* parameters, u32 shared_bytes)
      : blocks_(blocks), threads_(threads), parameters_(parameters), shared_bytes_(shared_bytes) {}

  void run() {
    const u32 resident = std::min(std::max(resident_blocks, 1u), blocks_);
    order_.resize(blocks_);
    for (u32 i = 0; i < blocks_; ++i) order_[i] = i;
    if (seed != 0) std::shuffle(order_.begin(), order_.end(), random_numbers);
    order_.resize(blocks_ - std::min(missing_blocks, blocks_));
    const u32 count = resident * threads_;
    while (fibers.size() < count) fibers.emplace_back();
    for (u32 i = 0; i < count; ++i) fibers[i].done = true;
    std::vector<Block> slots(resident);
    for (;;) {
      bool all_done = true;
      for (u32 slot = 0; slot < resident; ++slot) {
        if (slots[slot].running == 0 && next_ < order_.size()) start(slots[slot], slot);
        all_done &= slots[slot].running == 0;
      }
      if (all_done) return;
      if (!step(count)) first_fault = deadlock(count);
      if (!first_fault.empty()) return;
    }
  }

 private:
  void start(Block& block, u32 slot) {
    block = Block();
    block.index = order_[next_++];
    block.running = threads_;
    block.shared.assign(shared_bytes_, static_cast<char>(0xff));
    block.written.assign(shared_bytes_, 0);
    block.warps.resize((threads_ + kWarp - 1) / kWarp);
    for (u32 i = 0; i < threads_; ++i) {
      Fiber& fiber = fibers[slot * threads_ + i];
      fiber.thread = {
          i, block.index, threads_, blocks_, block.index * threads_ + i, parameters_, kernel->parameter_bytes};
      fiber.block = &block;
      fiber.started = fiber.done = false;
      fiber.passed = nullptr;
      fiber.waits_at = nullptr;
    }
  }

  // Lets threads run: all in turn, or one that is drawn. False if none can.
  bool step(u32 count) {
    bool ran = false;
    const u32 first = seed == 0 ? 0 : random_numbers() % count;
    for (u32 i = 0; i < count && first_fault.empty(); ++i) {
      Fiber& fiber = fibers[(first + i) % count];
      if (!fiber.can_run()) continue;
      ran = true;
      resume(fiber);
      if (seed != 0) return true;
    }
    return ran;
  }

  const u32 blocks_, threads_;
  const char* const parameters_;
  const u32 shared_bytes_;
  std::vector<u32> order_;
  u32 next_ = 0;
};

std::map<std::string, Kernel>& kernels() {
  static auto& all = *new std::map<std::string, Kernel>;
  return all;
}

}  // namespace

void add_kernels(const Kernel* added, u32 count) {
  for (u32 i = 0; i < count; ++i) kernels()[added[i].name] = added[i];
}
const Kernel* kernel_named(const std::string& name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}
const std::string& last_fault() { return message; }

bool run(const Kernel& wanted, u32 blocks, u32 threads, const char* parameters, u32 dynamic_shared_bytes) {
  const std::lock_guard<std::mutex> lock(launching);
  ++launch;
  kernel = &wanted;
  first_fault.clear();
  if (threads > wanted.most_threads) first_fault = "more threads than the kernel was compiled for";
  random_numbers.seed(seed);
  accesses_left = seed == 0 ? 0 : 1;
  race_detector = finds_races ? new_races(wanted, blocks, threads) : nullptr;
  if (first_fault.empty()) Grid(blocks, threads, parameters, wanted.shared_bytes + dynamic_shared_bytes).run();
  message = first_fault.empty() ? "" : std::string(wanted.name) + ": " + first_fault;
  return first_fault.empty();
}

}  // namespace ptx

// For tests. `seed` 0: threads are interrupted at barriers alone.
PTX_EXPORT void ptx_schedule(ptx::u32 resident, ptx::u32 seed, int finds_races, ptx::u32 missing_blocks) {
  ptx::resident_blocks = resident;
  ptx::seed = seed;
  ptx::finds_races = finds_races != 0;
  ptx::missing_blocks = missing_blocks;
}
PTX_EXPORT const ptx::Kernel* ptx_kernel(const char* name) { return ptx::kernel_named(name); }
PTX_EXPORT const char* ptx_site(const ptx::Kernel* kernel, ptx::u32 index, int is_opcode) {
  if (index >= kernel->site_count) return nullptr;
  return is_opcode != 0 ? kernel->sites[index].opcode : kernel->sites[index].where;
}
PTX_EXPORT void ptx_remove(const ptx::Kernel* kernel, ptx::u32 index, int removed) {
  kernel->sites[index].removed = removed != 0;
}
PTX_EXPORT const char* ptx_run(const ptx::Kernel* kernel, ptx::u32 blocks, ptx::u32 threads, const char* parameters,
                               ptx::u32 shared_bytes) {
  return ptx::run(*kernel, blocks, threads, parameters, shared_bytes) ? nullptr : ptx::last_fault().c_str();
}
PTX_EXPORT ptx::u32 ptx_parameter(const ptx::Kernel* kernel, ptx::u32 index, int is_size) {
  return is_size != 0 ? kernel->parameters[index].size : kernel->parameters[index].offset;
}
