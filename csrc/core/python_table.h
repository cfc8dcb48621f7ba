// The class Table of trainops._core, which the modules with kernels take.
#pragma once

#include <pybind11/stl.h>

#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffers.h"
#include "rules.h"
#include "state_reader.h"

namespace trainops {

// The places of a row: the first, those of its averages, the origin, and whether the first column is rounded.
using PythonPlaces = std::tuple<int64_t, std::vector<int64_t>, int64_t, bool>;

inline Places places_from(const PythonPlaces& python) {
  Places places;
  const auto& [first, averages, origin, rounds_first] = python;
  if (averages.size() > kMaxAverages) throw std::invalid_argument("no row has so many averages");
  places.first = first;
  std::copy(averages.begin(), averages.end(), places.averages);
  places.origin = origin;
  places.rounds_first = rounds_first;
  return places;
}

class PythonTable {
 public:
  // `columns`: a list of equal length for each column by name; optional ones may be left out, or hold None. `places`:
  // of each row, as in table.h; none where nothing is rounded stochastically.
  PythonTable(const TensorReader& reader, const std::string& kind, const pybind11::dict& columns,
              const std::string& device_type, std::vector<int64_t> group_rows,
              const std::vector<PythonPlaces>& places)
      : builder_(reader, schema_named(kind, averages_in(columns)), device_types(device_type)),
        group_rows_(std::move(group_rows)) {
    const std::vector<PyObject*> lists = lists_of(columns);
    const Py_ssize_t rows = PyList_GET_SIZE(lists[0]);
    if (!places.empty() && static_cast<Py_ssize_t>(places.size()) != rows) {
      throw std::invalid_argument("there are as many places as rows");
    }
    std::vector<PyObject*> tensors(lists.size());
    for (Py_ssize_t row = 0; row < rows; ++row) {
      for (size_t i = 0; i < lists.size(); ++i) tensors[i] = lists[i] ? PyList_GET_ITEM(lists[i], row) : Py_None;
      const Places its = places.empty() ? Places{} : places_from(places[row]);
      if (builder_.add_row(tensors.data(), its)) {
        for (PyObject* const tensor : tensors) builder_.keep(tensor);
      } else {
        irregular.push_back(row);
      }
    }
    if (group_rows_.empty()) group_rows_.push_back(rows);
    if (std::accumulate(group_rows_.begin(), group_rows_.end(), int64_t{0}) != rows) {
      throw std::invalid_argument("groups have as many rows as the table");
    }
  }

  // The rows of a step (state_reader.h, buffers.h); `states`: a tuple of names for each group.
  PythonTable(const TensorReader& reader, const std::string& rule, const pybind11::list& param_groups,
              const pybind11::dict& state, const pybind11::list& averages, const pybind11::list& buffers,
              const pybind11::list& states, const std::string& device_type, const Rounding& rounding)
      : builder_(reader, schema_named(rule, averages.size()), device_types(device_type)) {
    StateReader rows(builder_, state, averages, rounding);
    size_t index = 0;
    for (const auto group : param_groups) {
      if (!rows.add_group(group.cast<pybind11::dict>(), states[index++].cast<pybind11::tuple>())) return;
    }
    if (!rows.add_rows()) return;
    params = rows.params;
    averaged = std::move(rows.averaged);
    has_shards = rows.has_shards;
    group_rows_ = std::move(rows.group_rows);
    regular = table().rows() > 0;
    if (regular && !buffers.empty()) left = add_buffers(builder_, buffers, rounding);
  }

  // The table for kernels. Throws if some rows are irregular.
  const Table& table() const {
    if (!irregular.empty()) throw std::logic_error("this table has rows that kernels cannot take");
    return builder_.table;
  }

  // The same, of a kind that a kernel is made for.
  const Table& table(const std::string& kind) const {
    if (schema().name != kind)
      throw std::invalid_argument("a table of kind " + schema().name + " is none of " + kind);
    return table();
  }

  const Schema& schema() const { return builder_.schema; }
  const std::vector<int64_t>& group_rows() const { return group_rows_; }
  int64_t rows() const { return builder_.table.rows(); }
  bool has_float64() const { return builder_.has_float64; }
  bool is_special() const { return builder_.is_special; }
  void set_has_float64(bool has) { builder_.has_float64 = has; }  // results have the type that it asks for
  int32_t device_index() const { return std::max(builder_.device_id, 0); }

  std::vector<int64_t> irregular;  // the rows that kernels cannot take as they are
  bool regular = false;            // of the rows of a step: whether there are any, and kernels can take all
  pybind11::list params;           // of the rows of a step
  std::vector<int64_t> averaged;   // how many of them have each average
  bool has_shards = false;         // of the rows of a step: whether a parameter is a DTensor
  pybind11::list left;             // for each average, the ids of buffers that the table has not

 private:
  static size_t averages_in(const pybind11::dict& columns) {
    const auto& further = further_averages();
    return 1 +
           std::count_if(further.begin(), further.end(), [&](const Column& x) { return columns.contains(x.name); });
  }

  std::vector<PyObject*> lists_of(const pybind11::dict& columns) const {
    std::vector<PyObject*> lists;
    Py_ssize_t found = 0;
    for (const Column& column : schema().columns) {
      PyObject* const list = PyDict_GetItemString(columns.ptr(), column.name);
      if (list == nullptr && !column.optional()) {
        throw std::invalid_argument("a table of kind " + schema().name + " has a column " + column.name);
      }
      if (list != nullptr &&
          (!PyList_Check(list) || (found > 0 && PyList_GET_SIZE(list) != PyList_GET_SIZE(lists[0])))) {
        throw std::invalid_argument("columns are lists of one length");
      }
      found += list != nullptr;
      lists.push_back(list);
    }
    if (found != PyDict_Size(columns.ptr())) {
      throw std::invalid_argument("a table of kind " + schema().name + " has no such column");
    }
    return lists;
  }

  TableBuilder builder_;
  std::vector<int64_t> group_rows_;
};

}  // namespace trainops
