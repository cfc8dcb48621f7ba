// OpenMP's threads when the process forks.
//
// GNU's OpenMP keeps the threads of one loop for the next. A forked child has none of them, and its next loop would
// wait for them forever. So the thread that forks ends its threads first; parent and child start new ones when they
// need them. PyTorch shares these threads where it loads the same library, so its loops work in the child, too.
#include "parallel.h"

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
#define TRAINOPS_GNU_OPENMP
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace trainops::cpu {
namespace {

// thread_local, because every thread that runs a parallel loop has OpenMP threads of its own.
thread_local bool has_lost_threads = false;

#ifdef TRAINOPS_GNU_OPENMP
thread_local bool has_ended_threads = false;

// Looked up, because libraries before GCC 9 do not have it; and not while forking, when a lock may be held.
const auto pause_all = reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));

void before_fork() {
  has_ended_threads = pause_all != nullptr && pause_all(1) == 0;  // 1 is omp_pause_soft
}

void in_child() { has_lost_threads = has_lost_threads || !has_ended_threads; }

[[maybe_unused]] const int registered = pthread_atfork(before_fork, nullptr, in_child);
#endif

}  // namespace

bool may_use_threads() { return !has_lost_threads; }

}  // namespace trainops::cpu
