// Runs CUDA kernels on the CPU: the threads of a block are fibers that take turns at barriers and warp shuffles, and
// blocks run one after another, in an order that tests may choose. A barrier that not all threads reach is an error.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

Index threadIdx, blockIdx, gridDim;

namespace shim {
namespace {

constexpr unsigned kThreads = 256, kWarp = 32;
constexpr size_t kStack = 256 << 10;

// Threads wait until `size` of them have come.
struct Barrier {
  unsigned size, arrived = 0, generation = 0;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = true;
};

Fiber fibers[kThreads];
jmp_buf scheduler_resume;
Barrier block{kThreads};
Barrier warps[kThreads / kWarp];
const std::function<void()>* body;
int any_vote;
uint64_t progress = 0;

std::mutex launching;  // of the host's threads, one at a time runs a kernel

// What tests control and see.
std::mutex holding;
std::condition_variable let_go;
bool held = false;
int waiting = 0;
unsigned order_seed = 0, blocks_limit = ~0u;
int failing = 0;
cudaError_t last_error = cudaSuccess;
std::string launches;

#ifdef __SANITIZE_ADDRESS__
// AddressSanitizer has to be told of changes of stack, and has its own longjmp.
const void* scheduler_stack;
size_t scheduler_stack_size;
void* scheduler_fake;
ucontext_t scheduler;
ucontext_t resume_contexts[kThreads];
void* fakes[kThreads];
#endif

void yield() {
#ifdef __SANITIZE_ADDRESS__
  const unsigned me = threadIdx.x;
  __sanitizer_start_switch_fiber(fibers[me].done ? nullptr : &fakes[me], scheduler_stack, scheduler_stack_size);
  swapcontext(&resume_contexts[me], &scheduler);
  __sanitizer_finish_switch_fiber(fakes[me], &scheduler_stack, &scheduler_stack_size);
#else
  if (_setjmp(fibers[threadIdx.x].resume) == 0) _longjmp(scheduler_resume, 1);
#endif
}

void thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  fibers[threadIdx.x].done = true;
  ++progress;
  yield();
}

// Lets a thread run until it waits or is done.
void resume(unsigned index) {
  Fiber& fiber = fibers[index];
  threadIdx.x = index;
  const bool first = !fiber.started;
  fiber.started = true;
  if (first) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, thread, 0);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack.get(), kStack);
  swapcontext(&scheduler, first ? &fiber.start : &resume_contexts[index]);
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#else
  if (_setjmp(scheduler_resume) != 0) return;
  if (first) setcontext(&fiber.start);
  _longjmp(fiber.resume, 1);
#endif
}

void run_block() {
  for (Fiber& fiber : fibers) fiber.started = fiber.done = false;
  for (Barrier& warp : warps) warp = {kWarp};
  block = {kThreads};
  for (bool running = true; running;) {
    running = false;
    const uint64_t before = progress;
    for (unsigned i = 0; i < kThreads; ++i) {
      if (fibers[i].done) continue;
      running = true;
      resume(i);
    }
    if (running && progress == before) {
      std::fprintf(stderr, "cuda_shim: not all threads reach a barrier in %s\n", launches.c_str());
      std::abort();
    }
  }
}

void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  ++progress;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

}  // namespace

void sync_block() { wait(block); }
void sync_warp() { wait(warps[threadIdx.x / kWarp]); }

int any_in_block(int value) {
  sync_block();
  any_vote = 0;
  sync_block();
  any_vote |= value != 0;
  sync_block();
  return any_vote;
}

void run(const char* kernel, unsigned grid, const std::function<void()>& thread) {
  {
    std::unique_lock<std::mutex> lock(holding);
    ++waiting;
    if (!let_go.wait_for(lock, std::chrono::seconds(20), [] { return !held; })) {
      std::fprintf(stderr, "cuda_shim: nobody lets %s go\n", kernel);
      std::abort();
    }
    --waiting;
  }
  const std::lock_guard<std::mutex> lock(launching);
  launches += std::string(launches.empty() ? "" : " ") + kernel;
  if (failing > 0 && --failing == 0) {
    last_error = cudaErrorLaunchFailure;
    return;
  }
  body = &thread;
  gridDim.x = std::min(grid, blocks_limit);
  std::vector<unsigned> order(gridDim.x);
  std::iota(order.begin(), order.end(), 0u);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
  for (unsigned index : order) {
    blockIdx.x = index;
    run_block();
  }
}

}  // namespace shim

cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::last_error;
  shim::last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "unspecified launch failure" : "invalid argument";
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  return std::strcpy(properties->name, "the CPU, through a shim"), cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 4, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}

// For tests: 0 runs blocks from the first to the last, 1 from the last to the first, others shuffle them.
extern "C" __attribute__((visibility("default"))) void shim_order(unsigned seed) { shim::order_seed = seed; }
extern "C" __attribute__((visibility("default"))) void shim_blocks(unsigned limit) { shim::blocks_limit = limit; }
// Launches wait from 1 until 0, as where the device's queue is full.
extern "C" __attribute__((visibility("default"))) void shim_hold(int hold) {
  const std::lock_guard<std::mutex> lock(shim::holding);
  shim::held = hold != 0;
  shim::let_go.notify_all();
}
extern "C" __attribute__((visibility("default"))) int shim_waiting() {
  const std::lock_guard<std::mutex> lock(shim::holding);
  return shim::waiting;
}
// The n-th launch from now on fails.
extern "C" __attribute__((visibility("default"))) void shim_fail(int n) { shim::failing = n; }
// Writes the names of the kernels that have been launched since it was last asked.
extern "C" __attribute__((visibility("default"))) void shim_launches(char* names, size_t size) {
  std::snprintf(names, size, "%s", shim::launches.c_str());
  shim::launches.clear();
}
