// Reads where a torch tensor lies in memory, without torch's headers.
//
// A tensor describes itself through the DLPack exchange API, a C interface that is the same for every torch that has
// it (2.10 and later). Older ones are asked through a Python function. A description costs less than one call of a
// Tensor method, so tables are built anew whenever they are needed, and nothing stale can be in them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "table.h"

namespace trainops {

// The part of DLPack's ABI (https://dmlc.github.io/dlpack, version 1) that is used here.
namespace dlpack {
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeAPI {
  uint32_t major, minor;
  ExchangeAPI* previous;
  void* managed_tensor_functions[3];
  int (*tensor_from_object)(void* object, Tensor* out);
};
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kComplex = 5;
constexpr int32_t kCPU = 1, kCUDA = 2, kPinned = 3, kROCM = 10;
}  // namespace dlpack

// Where a tensor lies in memory. Dimensions of size 1 are left out: they do not affect the order of elements.
struct Description {
  static constexpr int32_t kMaxDims = 64;

  Cell cell;
  uint8_t code = 0, bits = 0;  // the type, as DLPack has it
  int32_t device_type = 0, device_id = 0;
  int32_t ndim = 0;
  int64_t numel = 1;
  int64_t shape[kMaxDims], strides[kMaxDims];

  // False if there are more than kMaxDims dimensions.
  bool set_shape(int32_t dims, const int64_t* sizes, const int64_t* steps) {
    numel = 1;
    ndim = 0;
    for (int32_t i = 0; i < dims; ++i) {
      if (sizes[i] == 1) continue;
      if (ndim == kMaxDims) return false;
      numel *= sizes[i];
      shape[ndim] = sizes[i];
      strides[ndim++] = steps[i];
    }
    return true;
  }

  bool same_type(const Description& other) const { return code == other.code && bits == other.bits; }
  bool is_floating() const { return code == dlpack::kFloat || code == dlpack::kBFloat; }
  bool in_host_memory() const { return device_type == dlpack::kCPU || device_type == dlpack::kPinned; }

  // Whether the elements lie in memory in the order of the dimensions.
  bool contiguous() const {
    int64_t expected = 1;
    for (int32_t i = ndim - 1; i >= 0 && numel > 0; --i) {
      if (strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }

  // Whether the elements fill their memory: no gaps, no overlap.
  bool dense() const {
    if (numel == 0) return true;
    int64_t expected = 1;
    for (int32_t found = 0; found < ndim; ++found) {
      // Nearly always the strides fall from left to right, and the first look finds the next one.
      int32_t i = ndim - 1 - found;
      if (strides[i] != expected) {
        for (i = 0; i < ndim && strides[i] != expected; ++i) {
        }
      }
      if (i == ndim) return false;
      expected *= shape[i];
    }
    return true;
  }

  bool same_order(const Description& other) const {
    if (numel != other.numel || ndim != other.ndim) return false;
    for (int32_t i = 0; i < ndim; ++i) {
      if (shape[i] != other.shape[i]) return false;
      if (strides[i] != other.strides[i] && numel > 0) return false;
    }
    return true;
  }
};

class TensorReader {
 public:
  // `api` is torch.Tensor.__dlpack_c_exchange_api__ or None; `describe` is trainops.core.describe; `plain_types`
  // are the classes whose tensors are memory and nothing else.
  void configure(const pybind11::object& api, pybind11::object describe, pybind11::tuple plain_types) {
    api_ = nullptr;
    describe_ = std::move(describe);
    plain_types_ = std::move(plain_types);
    if (api.is_none()) return;
    auto* table = static_cast<dlpack::ExchangeAPI*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
    if (table == nullptr) throw pybind11::error_already_set();
    while (table != nullptr && table->major > 1) table = table->previous;
    if (table != nullptr && table->major == 1 && table->tensor_from_object != nullptr) api_ = table;
  }

  bool is_plain(PyObject* tensor) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(plain_types_.ptr()); ++i) {
      if (PyTuple_GET_ITEM(plain_types_.ptr(), i) == type) return true;
    }
    return false;
  }

  // False for a tensor that kernels cannot take: one without memory, complex numbers, integers. `integers`: a type of
  // them that it may be all the same.
  bool read(PyObject* object, Description& out, DType integers = DType::none) const {
    if (!describe(object, out)) return false;
    const auto dtype = dtype_from(out.code, out.bits);
    if (!dtype) return false;
    out.cell.dtype = *dtype;
    return (*dtype != DType::int16 && *dtype != DType::byte) || *dtype == integers;
  }

  // The same for a tensor that is to be copied. False for complex numbers, which may be lazily conjugated.
  bool read_bytes(PyObject* object, Description& out) const {
    if (!describe(object, out)) return false;
    out.cell.dtype = DType::byte;
    return out.code != dlpack::kComplex && out.bits % 8 == 0;
  }

 private:
  bool describe(PyObject* object, Description& out) const {
    return api_ != nullptr ? read_dlpack(object, out) : read_python(object, out);
  }

  bool read_dlpack(PyObject* object, Description& out) const {
    dlpack::Tensor tensor;
    if (api_->tensor_from_object(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (tensor.dtype.lanes != 1) return false;
    out.cell.address = static_cast<char*>(tensor.data) + tensor.byte_offset;
    out.code = tensor.dtype.code;
    out.bits = tensor.dtype.bits;
    out.device_type = tensor.device.type;
    out.device_id = tensor.device.id;
    return out.set_shape(tensor.ndim, tensor.shape, tensor.strides) && has_memory(out);
  }

  bool read_python(PyObject* object, Description& out) const {
    namespace py = pybind11;
    const py::object described = describe_(py::handle(object));
    if (described.is_none()) return false;
    const auto [address, code, bits, device_type, device_id, shape, strides] =
        described.cast<std::tuple<uintptr_t, uint8_t, uint8_t, int32_t, int32_t, py::tuple, py::tuple>>();
    out.cell.address = reinterpret_cast<void*>(address);
    out.code = code;
    out.bits = bits;
    out.device_type = device_type;
    out.device_id = device_id;
    if (shape.size() > Description::kMaxDims) return false;
    int64_t sizes[Description::kMaxDims], steps[Description::kMaxDims];
    for (size_t i = 0; i < shape.size(); ++i) {
      sizes[i] = shape[i].cast<int64_t>();
      steps[i] = strides[i].cast<int64_t>();
    }
    return out.set_shape(static_cast<int32_t>(shape.size()), sizes, steps) && has_memory(out);
  }

  static std::optional<DType> dtype_from(uint8_t code, uint8_t bits) {
    if (code == dlpack::kFloat && bits == 32) return DType::float32;
    if (code == dlpack::kFloat && bits == 64) return DType::float64;
    if (code == dlpack::kFloat && bits == 16) return DType::float16;
    if (code == dlpack::kBFloat && bits == 16) return DType::bfloat16;
    if (code == dlpack::kInt && bits == 16) return DType::int16;
    if (code == dlpack::kUInt && bits == 8) return DType::byte;
    return std::nullopt;
  }

  static bool has_memory(const Description& d) { return d.numel == 0 || d.cell.address != nullptr; }

  const dlpack::ExchangeAPI* api_ = nullptr;
  pybind11::object describe_;
  pybind11::tuple plain_types_;
};

// A lazily negated real tensor comes from the imaginary part of a lazily conjugated one. Its strides give it away,
// except where it has a single element and hence no strides. (torch._neg_view, which is private, makes others.)
inline bool maybe_negated(PyObject* tensor, const Description& d) {
  if (d.numel != 1 || !d.is_floating()) return false;
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, is_neg);
  if (answer == nullptr) throw pybind11::error_already_set();
  Py_DECREF(answer);  // True and False live on
  return answer == Py_True;
}

// DLPack's numbers for the devices that PyTorch calls `name`.
inline std::vector<int32_t> device_types(const std::string& name) {
  if (name == "cpu") return {dlpack::kCPU, dlpack::kPinned};
  if (name == "cuda") return {dlpack::kCUDA, dlpack::kROCM};
  throw std::invalid_argument("there are no kernels for devices of type " + name);
}

}  // namespace trainops
