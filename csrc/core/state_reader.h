// The rows of a step, straight from an optimizer's `param_groups` and `state`: what would take Python several times
// as long to collect.
#pragma once

#include <vector>

#include "table_builder.h"

namespace trainops {

// A reference that is counted.
inline pybind11::object stolen(PyObject* object) {
  if (object == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(object);
}

class StateReader {
 public:
  // `averages` maps id(param) to the shadow weight of an EMA.
  StateReader(TableBuilder& builder, const pybind11::dict& state, const pybind11::dict& averages)
      : builder_(builder), state_(state), averages_(averages), tensors_(builder.schema.columns.size()) {
    for (const Column& column : builder.schema.columns) {
      names_.push_back(stolen(PyUnicode_InternFromString(column.name)));
    }
  }

  // Adds the parameters of a group that have a gradient, with the state that the group uses, by name. False where
  // anything is out of the ordinary: no state yet, subclasses of tensors, other devices, odd strides.
  bool add_group(const pybind11::dict& group, const pybind11::tuple& states) {
    const pybind11::object all = group["params"];
    if (!PyList_Check(all.ptr())) return false;
    std::vector<bool> used(tensors_.size());
    for (size_t column = kState; column < used.size(); ++column) used[column] = states.contains(names_[column]);
    const size_t before = params.size();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(all.ptr()); ++i) {
      if (!add_param(PyList_GET_ITEM(all.ptr(), i), used)) return false;
    }
    group_rows.push_back(static_cast<int64_t>(params.size() - before));
    return true;
  }

  pybind11::list params;            // those that have a gradient
  std::vector<int64_t> group_rows;  // how many of them each group has
  int64_t averaged = 0;             // how many of them have an average

 private:
  bool add_param(PyObject* param, const std::vector<bool>& used) {
    if (!builder_.reader.is_plain(param)) return false;
    const auto grad = stolen(PyObject_GetAttr(param, names_[kGrad].ptr()));
    if (grad.is_none()) return true;
    PyObject* const own = state_of(param);
    if (own == nullptr || !PyDict_Check(own)) return false;
    tensors_[kParam] = param;
    tensors_[kGrad] = grad.ptr();
    tensors_[kAverage] = average_of(param);
    tensors_[kStep] = PyDict_GetItemWithError(own, names_[kStep].ptr());
    if (tensors_[kStep] == nullptr) return false;
    for (size_t column = kState; column < tensors_.size(); ++column) {
      tensors_[column] = used[column] ? PyDict_GetItemWithError(own, names_[column].ptr()) : Py_None;
      if (tensors_[column] == nullptr) return false;
    }
    if (!builder_.add_row(tensors_.data())) return false;
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
    const auto id = stolen(PyLong_FromVoidPtr(param));
    PyObject* const average = PyDict_GetItemWithError(averages_.ptr(), id.ptr());
    averaged += average != nullptr;
    return average == nullptr ? Py_None : average;
  }

  TableBuilder& builder_;
  const pybind11::dict& state_;
  const pybind11::dict& averages_;
  Py_ssize_t position_ = 0;  // in the state
  std::vector<pybind11::object> names_;
  std::vector<PyObject*> tensors_;
};

}  // namespace trainops
