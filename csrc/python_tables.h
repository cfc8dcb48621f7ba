// The tables of the Python modules, as far as all modules have the same: TensorTable is made of lists of tensors, and
// AdamWTable of an optimizer's containers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "tensor_table_from_python.h"

namespace trainops {

// What a module's Table starts from. It has a constructor without arguments, for the columns of an AdamW step, and
// complete(group_rows), to be called when all rows are there.
class PythonTable {
 public:
  explicit PythonTable(TableBuilder builder) : builder_(std::move(builder)) {}

  const std::vector<int64_t>& irregular() const { return irregular_; }
  bool has_float64() const { return builder_.has_float64; }
  int64_t rows() const { return builder_.table.rows(); }

 protected:
  // Adds a row for every index of the lists `columns`, and notes those that kernels cannot take as they are.
  void add_rows(const pybind11::list& columns, const pybind11::object& scalars) {
    std::vector<PyObject*> tensors(columns.size());
    const Py_ssize_t rows = columns.empty() ? 0 : PyList_GET_SIZE(columns[0].ptr());
    for (const auto column : columns) {
      if (!PyList_Check(column.ptr()) || PyList_GET_SIZE(column.ptr()) != rows) {
        throw pybind11::value_error("columns are lists of one length");
      }
    }
    for (Py_ssize_t row = 0; row < rows; ++row) {
      for (size_t i = 0; i < tensors.size(); ++i)
        tensors[i] = PyList_GET_ITEM(PyList_GET_ITEM(columns.ptr(), i), row);
      PyObject* scalar = scalars.is_none() ? nullptr : PyList_GET_ITEM(scalars.ptr(), row);
      const bool plain = std::all_of(tensors.begin(), tensors.end(), [&](PyObject* tensor) {
        return tensor == Py_None || builder_.reader.is_plain(tensor);
      });
      if (!plain || !builder_.add_row(tensors.data(), tensors.size(), scalar)) irregular_.push_back(row);
    }
  }

  const TensorTable& regular_table() const {
    if (!irregular_.empty()) throw std::logic_error("this table has rows that kernels cannot take");
    return builder_.table;
  }

  TableBuilder builder_;

 private:
  std::vector<int64_t> irregular_;
};

// Names under which torch keeps gradients and the state of AdamW. Interned strings are the interpreter's own.
struct StateNames {
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* exp_avg = PyUnicode_InternFromString("exp_avg");
  PyObject* exp_avg_sq = PyUnicode_InternFromString("exp_avg_sq");
  PyObject* max_exp_avg_sq = PyUnicode_InternFromString("max_exp_avg_sq");
  PyObject* step = PyUnicode_InternFromString("step");

  StateNames() = default;
  StateNames(const StateNames&) = delete;
  ~StateNames() {
    for (PyObject* name : {grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step}) Py_DECREF(name);
  }
};

// The table of an AdamW step straight from an optimizer's `param_groups` and `state`: what the general path collects
// in Python, in a fraction of the time. `averages` maps id(param) to the shadow weight of an EMA. `regular` is false
// where anything is out of the ordinary: no state yet, subclasses of tensors, other devices, odd strides.
template <typename Table>
class AdamWTable : public Table {
 public:
  AdamWTable(const pybind11::list& param_groups, const pybind11::dict& state, const pybind11::dict& averages)
      : averages_(averages) {
    for (const auto group : param_groups) {
      if (!add_group(group.cast<pybind11::dict>(), state)) return;
    }
    this->complete(group_rows);
    regular = true;
  }

  bool regular = false;
  pybind11::list params;            // those that have a gradient
  std::vector<int64_t> group_rows;  // how many of them each group has
  int64_t averaged = 0;             // how many of them have an average

 private:
  bool add_group(const pybind11::dict& group, const pybind11::dict& state) {
    const pybind11::object all = group["params"];
    if (!PyList_Check(all.ptr())) return false;
    const bool amsgrad = pybind11::bool_(group["amsgrad"]);
    const size_t before = params.size();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(all.ptr()); ++i) {
      PyObject* param = PyList_GET_ITEM(all.ptr(), i);
      if (!this->builder_.reader.is_plain(param)) return false;
      const auto grad = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(param, names_.grad));
      if (!grad) throw pybind11::error_already_set();
      if (grad.is_none()) continue;
      PyObject* own = PyDict_GetItemWithError(state.ptr(), param);
      if (own == nullptr || !PyDict_Check(own)) return false;
      PyObject* const exp_avg = PyDict_GetItem(own, names_.exp_avg);
      PyObject* const exp_avg_sq = PyDict_GetItem(own, names_.exp_avg_sq);
      PyObject* const max_exp_avg_sq = amsgrad ? PyDict_GetItem(own, names_.max_exp_avg_sq) : Py_None;
      PyObject* const step = PyDict_GetItem(own, names_.step);
      if (exp_avg == nullptr || exp_avg_sq == nullptr || max_exp_avg_sq == nullptr || step == nullptr) return false;
      PyObject* const tensors[] = {param, grad.ptr(), exp_avg, exp_avg_sq, max_exp_avg_sq, average_of(param)};
      if (!this->builder_.add_row(tensors, 6, step)) return false;
      params.append(pybind11::handle(param));
    }
    group_rows.push_back(static_cast<int64_t>(params.size() - before));
    return true;
  }

  PyObject* average_of(PyObject* param) {
    if (averages_.empty()) return Py_None;
    const auto id = pybind11::reinterpret_steal<pybind11::object>(PyLong_FromVoidPtr(param));
    PyObject* average = PyDict_GetItem(averages_.ptr(), id.ptr());
    averaged += average != nullptr;
    return average == nullptr ? Py_None : average;
  }

  const pybind11::dict averages_;
  const StateNames names_;
};

// Adds both to a module. The constructor of the first, and what else it has, is for the module to add.
template <typename Table>
pybind11::class_<Table> define_tables(pybind11::module_& m) {
  pybind11::class_<Table> table(m, "TensorTable");
  table.def_property_readonly("irregular", &Table::irregular)
      .def_property_readonly("has_float64", &Table::has_float64)
      .def_property_readonly("rows", &Table::rows);
  using Collected = AdamWTable<Table>;
  pybind11::class_<Collected, Table>(m, "AdamWTable")
      .def(pybind11::init<const pybind11::list&, const pybind11::dict&, const pybind11::dict&>())
      .def_readonly("regular", &Collected::regular)
      .def_readonly("params", &Collected::params)
      .def_readonly("group_rows", &Collected::group_rows)
      .def_readonly("averaged", &Collected::averaged);
  return table;
}

}  // namespace trainops
