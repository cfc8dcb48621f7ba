// Devices, for the launchers.
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "common.cuh"

namespace trainops::cuda {

void check(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that the next launch does not report it
  throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(status));
}

DeviceGuard::DeviceGuard(int device, const char* kernel) {
  check(cudaGetDevice(&before_), kernel);
  if (before_ == device) return;
  check(cudaSetDevice(device), kernel);
  moved_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (moved_) cudaSetDevice(before_);
}

unsigned grid_size(const void* kernel, int64_t chunks, int device, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& resident = known[{kernel, device}];
  if (resident == 0) {
    int per_multiprocessor = 0, multiprocessors = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0), name);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
    resident = int64_t{per_multiprocessor} * multiprocessors;
  }
  return static_cast<unsigned>(chunks < resident ? chunks : resident);
}

Devices devices() {
  Devices found{0, "", ""};
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return {0, "no NVIDIA driver", ""};
  const cudaError_t status = cudaGetDeviceCount(&found.count);
  if (status != cudaSuccess) {
    cudaGetLastError();  // clears the error, so that the next launch does not report it
    return {0, cudaGetErrorString(status), ""};
  }
  cudaDeviceProp properties;
  if (found.count > 0 && cudaGetDeviceProperties(&properties, 0) == cudaSuccess) found.name = properties.name;
  return found;
}

}  // namespace trainops::cuda
