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
  Devices found;
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return {{}, "no NVIDIA driver"};
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();  // clears the error, so that the next launch does not report it
    return {{}, cudaGetErrorString(status)};
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    const bool is_known = cudaGetDeviceProperties(&properties, device) == cudaSuccess;
    found.names.push_back(is_known ? properties.name : "unknown");
  }
  return found;
}

std::string refusal(int device) try {
  const DeviceGuard guard(device, "refusal");
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, any_kernel());
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "compute capability " + std::to_string(major) + "." + std::to_string(minor) + ": " +
         cudaGetErrorString(status);
} catch (const std::runtime_error& error) {
  return error.what();
}

}  // namespace trainops::cuda
