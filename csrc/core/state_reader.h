// Collects the rows of a step straight from an optimizer's `param_groups` and `state`. Python would take several
// times as long.
#pragma once

#include <vector>

#include "table_builder.h"

namespace trainops {

// Takes ownership of a new reference. Throws if it is null.
inline pybind11::object take_ownership(PyObject* object) {
  if (object == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(object);
}

// After backward, tensor objects are not cached: the Python object, the C++ object that it points to, and the storage
// that this points to. Each stage prefetches the next stage's memory, some rows ahead. Prefetching an invalid address
// is harmless.
inline void prefetch(const void* object) {
#if defined(__GNUC__)
  __builtin_prefetch(object);
#else
  (void)object;
#endif
}

// Prefetches three cache lines of each object that a tensor's Python object points to. The pointers follow its head.
inline void prefetch_pointees(const void* object) {
  constexpr int kHead = 2, kPointers = 2;
  void* const* pointers = static_cast<void* const*>(object) + kHead;
  for (int i = 0; i < kPointers; ++i) {
    for (int line = 0; line < 3; ++line) prefetch(static_cast<const char*>(pointers[i]) + 64 * line);
  }
}

class StateReader {
 public:
  // `averages` maps id(param) to the shadow weight of an EMA.
  StateReader(TableBuilder& builder, const pybind11::dict& state, const pybind11::dict& averages)
      : builder_(builder), state_(state), averages_(averages), columns_(builder.schema.columns.size()) {
    for (const Column& column : builder.schema.columns) {
      names_.push_back(take_ownership(PyUnicode_InternFromString(column.name)));
    }
  }

  // Notes the parameters of a group that have a gradient, with the state that the group uses, by name. False if one
  // is irregular: it has no state yet, or is of a subclass.
  bool add_group(const pybind11::dict& group, const pybind11::tuple& states) {
    const pybind11::object all = group["params"];
    if (!PyList_Check(all.ptr())) return false;
    std::vector<bool> used(columns_);
    for (size_t column = kState; column < columns_; ++column) used[column] = states.contains(names_[column]);
    const size_t before = params.size();
    const Py_ssize_t count = PyList_GET_SIZE(all.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (i + kAhead < count) prefetch_pointees(PyList_GET_ITEM(all.ptr(), i + kAhead));
      if (i + 2 * kAhead < count) prefetch(PyList_GET_ITEM(all.ptr(), i + 2 * kAhead));
      if (!add_param(PyList_GET_ITEM(all.ptr(), i), used)) return false;
    }
    group_rows.push_back(static_cast<int64_t>(params.size() - before));
    return true;
  }

  // Adds all rows to the table. False where kernels cannot take one: other devices, odd strides.
  bool add_rows() {
    const size_t count = tensors_.size(), ahead = kAhead * columns_;
    for (size_t i = 0; i < count; i += columns_) {
      for (size_t column = 0; column < columns_; ++column) {
        if (i + 2 * ahead + column < count) prefetch(tensors_[i + 2 * ahead + column]);
        if (i + ahead + column < count) prefetch_pointees(tensors_[i + ahead + column]);
      }
      if (!builder_.add_row(&tensors_[i])) return false;
    }
    return true;
  }

  pybind11::list params;            // those that have a gradient
  std::vector<int64_t> group_rows;  // how many of them each group has
  int64_t averaged = 0;             // how many of them have an average

 private:
  static constexpr Py_ssize_t kAhead = 6;  // rows

  bool add_param(PyObject* param, const std::vector<bool>& used) {
    if (!builder_.reader.is_plain(param)) return false;
    auto grad = take_ownership(PyObject_GetAttr(param, names_[kGrad].ptr()));
    if (grad.is_none()) return true;
    PyObject* const own = state_of(param);
    if (own == nullptr || !PyDict_Check(own)) return false;
    const size_t begin = tensors_.size();
    tensors_.resize(begin + columns_, Py_None);
    PyObject** const row = &tensors_[begin];
    row[kParam] = param;
    row[kGrad] = grad.ptr();
    row[kAverage] = average_of(param);
    row[kStep] = PyDict_GetItemWithError(own, names_[kStep].ptr());
    if (row[kStep] == nullptr) return false;
    for (size_t column = kState; column < columns_; ++column) {
      if (!used[column]) continue;
      row[column] = PyDict_GetItemWithError(own, names_[column].ptr());
      if (row[column] == nullptr) return false;
    }
    grads_.push_back(std::move(grad));
    params.append(pybind11::handle(param));
    return true;
  }

  // States are nearly always kept in the order of the parameters: the next one is found without a hash, which for
  // tensors is a Python function.
  PyObject* state_of(PyObject* param) {
    PyObject *key = nullptr, *value = nullptr;
    if (PyDict_Next(state_.ptr(), &position_, &key, &value) && key == param) return value;
    return PyDict_GetItemWithError(state_.ptr(), param);
  }

  PyObject* average_of(PyObject* param) {
    if (averages_.empty()) return Py_None;
    const auto id = take_ownership(PyLong_FromVoidPtr(param));
    PyObject* const average = PyDict_GetItemWithError(averages_.ptr(), id.ptr());
    averaged += average != nullptr;
    return average == nullptr ? Py_None : average;
  }

  TableBuilder& builder_;
  const pybind11::dict& state_;
  const pybind11::dict& averages_;
  Py_ssize_t position_ = 0;  // in the state
  size_t columns_;
  std::vector<pybind11::object> names_, grads_;
  std::vector<PyObject*> tensors_;  // row by row; all are kept alive by the optimizer, and the gradients by grads_
};

}  // namespace trainops
