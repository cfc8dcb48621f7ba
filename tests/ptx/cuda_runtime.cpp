// Stands in for the CUDA runtime under the host code that nvcc makes: grids and arguments come as they would to a
// GPU. There are two devices. Names, numbers and structures are those of CUDA's headers.
#include <algorithm>
#include <map>
#include <mutex>

#include "launch.h"

namespace {

constexpr int kDevices = 2, kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;
enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidDevice = 101,
  kNoKernelImage = 209,
  kNotFound = 500,
  kLaunchFailure = 719
};

struct Dim3 {
  unsigned x, y, z;
};
struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

std::mutex mutex;
int fails_at = 0, without_image = -1;
unsigned multiprocessors = 4, blocks_of_multiprocessor = 2;
std::string launches;
thread_local Error last_error = kSuccess;
thread_local std::string why;
thread_local Configuration configuration;

// The names of kernels by the addresses of their functions on the host.
std::map<const void*, std::string>& functions() {
  static auto& all = *new std::map<const void*, std::string>;
  return all;
}

Error failed(Error error, const std::string& text) {
  why = text;
  return last_error = error;
}

Error launch(const std::string& name, const Configuration& how, void** arguments) {
  const ptx::Kernel* const kernel = ptx::kernel_named(name);
  if (kernel == nullptr) return failed(kNotFound, "no PTX of " + name);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    launches += std::to_string(ptx::current_device()) + ":" + name + " ";
    if (fails_at > 0 && --fails_at == 0) return failed(kLaunchFailure, "unspecified launch failure");
  }
  const unsigned yz[] = {how.grid.y, how.grid.z, how.block.y, how.block.z};
  if (how.grid.x == 0 || how.block.x == 0 || std::any_of(yz, yz + 4, [](unsigned size) { return size != 1; })) {
    return failed(kInvalidValue, "grids and blocks have one dimension here");
  }
  std::vector<ptx::u64> parameters(kernel->parameter_bytes / 8 + 1, ~ptx::u64(0));
  auto* const bytes = reinterpret_cast<char*>(parameters.data());
  for (unsigned i = 0; i < kernel->parameter_count; ++i) {
    std::memcpy(bytes + kernel->parameters[i].offset, arguments[i], kernel->parameters[i].size);
  }
  const bool ended = ptx::run(*kernel, how.grid.x, how.block.x, bytes, static_cast<unsigned>(how.shared));
  return ended ? kSuccess : failed(kLaunchFailure, ptx::last_fault());
}

}  // namespace

// What nvcc's code calls to make kernels known and to launch them

PTX_EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
PTX_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
PTX_EXPORT void __cudaUnregisterFatBinary(void**) {}
PTX_EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*,
                                       void*, int*) {
  functions()[host] = name;
}
PTX_EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
PTX_EXPORT int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return kSuccess;
}
PTX_EXPORT int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  const auto found = functions().find(host);
  if (found == functions().end()) return failed(kNotFound, "no kernel was registered here");
  return launch(found->second, {grid, block, shared, nullptr}, arguments);
}
// CUDA 13 looks a kernel up first.
PTX_EXPORT int __cudaGetKernel(const void** kernel, const void* host) { return *kernel = host, kSuccess; }
PTX_EXPORT int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                                  void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// What launchers ask

PTX_EXPORT int cudaGetLastError() {
  const Error error = last_error;
  last_error = kSuccess;
  return error;
}
PTX_EXPORT const char* cudaGetErrorString(int error) {
  return error == kSuccess ? "no error" : error == kInvalidDevice ? "invalid device ordinal" : why.c_str();
}
PTX_EXPORT int cudaGetDevice(int* device) { return *device = ptx::current_device(), kSuccess; }
PTX_EXPORT int cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return last_error = kInvalidDevice;
  return ptx::make_current(device), kSuccess;
}
PTX_EXPORT int cudaGetDeviceCount(int* count) { return *count = kDevices, kSuccess; }
PTX_EXPORT int cudaDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
PTX_EXPORT int cudaGetDeviceProperties(char* name, int) { return std::strcpy(name, "PTX on the CPU"), kSuccess; }
PTX_EXPORT int cudaGetDeviceProperties_v2(char* name, int device) { return cudaGetDeviceProperties(name, device); }
PTX_EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  if (device < 0 || device >= kDevices) return failed(kInvalidDevice, "");
  if (attribute == kCapabilityMajor || attribute == kCapabilityMinor) {
    return *value = attribute == kCapabilityMajor ? 7 : 0, kSuccess;
  }
  if (attribute != kMultiprocessorCount) return failed(kInvalidValue, "attribute");
  return *value = static_cast<int>(multiprocessors), kSuccess;
}
PTX_EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int, size_t) {
  if (functions().count(host) == 0) return failed(kNotFound, "no kernel was registered here");
  return *blocks = static_cast<int>(blocks_of_multiprocessor), kSuccess;
}

PTX_EXPORT int cudaFuncGetAttributes(void*, const void* host) {
  if (functions().count(host) == 0) return failed(kNotFound, "no kernel was registered here");
  if (ptx::current_device() != without_image) return kSuccess;
  return failed(kNoKernelImage, "no kernel image is available for execution on the device");
}

// For tests: kernels do not load on this device; -1: on all they do.
PTX_EXPORT void ptx_without_image(int device) { without_image = device; }
// For tests: the n-th launch from now on fails; the launches since they were last asked for, as device:kernel.
PTX_EXPORT void ptx_fail(int n) { fails_at = n; }
PTX_EXPORT const char* ptx_launches() {
  static thread_local std::string asked;
  const std::lock_guard<std::mutex> lock(mutex);
  asked.swap(launches);
  launches.clear();
  return asked.c_str();
}
