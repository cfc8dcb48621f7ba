// Builds a TensorTable from lists of torch tensors, without torch's headers: each tensor describes itself through
// the DLPack exchange API, a C interface that is the same for every torch that has it (2.10 and later); older
// ones are asked through a Python function. A description costs less than one call of a Tensor method, so a
// table is built anew whenever it is needed and nothing stale can be in it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "tensor_table.h"

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
constexpr uint8_t kFloat = 2, kBFloat = 4;
constexpr int32_t kCPU = 1, kPinned = 3;
}  // namespace dlpack

// Where a tensor lies in memory. Dimensions of size 1 are left out: they have no say in the order of elements.
struct Description {
  static constexpr int kMaxDims = 64;  // torch's own limit

  Cell cell;
  int32_t device_type = 0;
  int32_t ndim = 0;
  int64_t numel = 1;
  int64_t shape[kMaxDims], strides[kMaxDims];

  void set_shape(int32_t dims, const int64_t* sizes, const int64_t* steps) {
    numel = 1;
    ndim = 0;
    for (int32_t i = 0; i < dims; ++i) {
      if (sizes[i] == 1) continue;
      numel *= sizes[i];
      shape[ndim] = sizes[i];
      strides[ndim++] = steps[i];
    }
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
  // `api` is torch.Tensor.__dlpack_c_exchange_api__ or None; `describe` is trainops.tensor_table.describe.
  void configure(pybind11::object api, pybind11::object describe) {
    api_ = nullptr;
    describe_ = std::move(describe);
    if (api.is_none()) return;
    auto* table = static_cast<dlpack::ExchangeAPI*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
    if (table == nullptr) throw pybind11::error_already_set();
    while (table != nullptr && table->major > 1) table = table->previous;
    if (table != nullptr && table->major == 1 && table->tensor_from_object != nullptr) api_ = table;
  }

  // False for what kernels cannot take as it is: no memory of its own, complex, integer, lazily negated.
  bool read(PyObject* object, Description& out) const {
    return api_ != nullptr ? read_dlpack(object, out) : read_python(object, out);
  }

 private:
  bool read_dlpack(PyObject* object, Description& out) const {
    dlpack::Tensor tensor;
    if (api_->tensor_from_object(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    const auto dtype = dtype_from(tensor.dtype.code, tensor.dtype.bits);
    if (!dtype) return false;
    out.cell = {static_cast<char*>(tensor.data) + tensor.byte_offset, *dtype};
    out.device_type = tensor.device.type;
    out.set_shape(tensor.ndim, tensor.shape, tensor.strides);
    return owns_memory(object, out);
  }

  bool read_python(PyObject* object, Description& out) const {
    namespace py = pybind11;
    const py::object described = describe_(py::handle(object));
    if (described.is_none()) return false;
    const auto [address, code, bits, device_type, shape, strides] =
        described.cast<std::tuple<uintptr_t, uint8_t, uint8_t, int32_t, py::tuple, py::tuple>>();
    const auto dtype = dtype_from(code, bits);
    if (!dtype) return false;
    out.cell = {reinterpret_cast<void*>(address), *dtype};
    out.device_type = device_type;
    int64_t sizes[Description::kMaxDims], steps[Description::kMaxDims];
    for (size_t i = 0; i < shape.size(); ++i) {
      sizes[i] = shape[i].cast<int64_t>();
      steps[i] = strides[i].cast<int64_t>();
    }
    out.set_shape(static_cast<int32_t>(shape.size()), sizes, steps);
    return owns_memory(object, out);
  }

  static std::optional<DType> dtype_from(uint8_t code, uint8_t bits) {
    if (code == dlpack::kFloat && bits == 32) return DType::float32;
    if (code == dlpack::kFloat && bits == 64) return DType::float64;
    if (code == dlpack::kFloat && bits == 16) return DType::float16;
    if (code == dlpack::kBFloat && bits == 16) return DType::bfloat16;
    return std::nullopt;
  }

  // A lazily negated real tensor is the imaginary part of a lazily conjugated one. Its strides give it away,
  // except where it has a single element.
  static bool owns_memory(PyObject* object, const Description& out) {
    if (out.numel == 0) return true;
    if (out.cell.address == nullptr) return false;
    return out.numel > 1 || !pybind11::handle(object).attr("is_neg")().cast<bool>();
  }

  const dlpack::ExchangeAPI* api_ = nullptr;
  pybind11::object describe_;
};

struct TableFromPython {
  TensorTable table;
  std::vector<int64_t> irregular;  // rows that kernels cannot take as they are; the table must not be used then
  bool has_float64 = false;
};

// One list of tensors per column, None where a row has no tensor in that column. The cells of a row must lie on
// `device_types`, and have the same shape and the same dense strides; rows where that is not so are reported.
// `scalars`, where given, becomes one more column: a float32 per row.
inline TableFromPython table_from_python(const TensorReader& reader, pybind11::list columns,
                                         pybind11::object scalars, const std::vector<int32_t>& device_types) {
  const bool has_scalars = !scalars.is_none();
  const size_t width = columns.size();
  TableFromPython result{TensorTable(static_cast<int64_t>(width + has_scalars)), {}, false};
  const auto rows = width == 0 ? 0 : PyList_GET_SIZE(columns[0].ptr());
  std::vector<Cell> cells(width + has_scalars);
  Description first, next;
  const auto on_device = [&](const Description& d) {
    return std::find(device_types.begin(), device_types.end(), d.device_type) != device_types.end();
  };
  for (Py_ssize_t row = 0; row < rows; ++row) {
    bool regular = true, seen = false;
    for (size_t column = 0; column < width && regular; ++column) {
      PyObject* tensor = PyList_GET_ITEM(PyList_GET_ITEM(columns.ptr(), column), row);
      cells[column] = Cell{};
      if (tensor == Py_None) continue;
      Description& description = seen ? next : first;
      regular = reader.read(tensor, description) && on_device(description) &&
                (seen ? next.same_order(first) : first.dense());
      seen = true;
      cells[column] = description.cell;
      result.has_float64 |= description.cell.dtype == DType::float64;
    }
    if (has_scalars && regular) {
      regular = reader.read(PyList_GET_ITEM(scalars.ptr(), row), next) && on_device(next) && next.numel == 1 &&
                next.cell.dtype == DType::float32;
      cells[width] = next.cell;
    }
    if (!regular) {
      result.irregular.push_back(row);
    } else {
      result.table.add_row(cells.data(), seen ? first.numel : 0);
    }
  }
  return result;
}

}  // namespace trainops
