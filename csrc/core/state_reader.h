// Collects the rows of a step straight from an optimizer's `param_groups` and `state`. Python would take several
// times as long. Of a DTensor, the row has this rank's shard.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "rounding.h"
#include "shards.h"
#include "spans.h"
#include "table_builder.h"

namespace trainops {

class StateReader {
 public:
  // `averages`: of each EMA, a map from id(param) to the shadow weight.
  StateReader(TableBuilder& builder, const pybind11::dict& state, const pybind11::list& averages,
              const Rounding& rounding)
      : averaged(averages.size()),
        builder_(builder),
        state_(state),
        rounding_(rounding),
        columns_(builder.schema.columns.size()),
        alike_(columns_) {
    for (const auto its : averages) averages_.push_back(its.cast<pybind11::dict>());
    for (const Column& column : builder.schema.columns) {
      names_.push_back(take_ownership(PyUnicode_InternFromString(column.name)));
      const std::string codes = std::string(column.name) + "_codes";
      names_of_codes_.push_back(take_ownership(PyUnicode_InternFromString(codes.c_str())));
    }
  }

  // Notes the parameters of a group that have a gradient, with the state that the group uses, by name. False if one
  // is irregular: it has no state yet, or is of a subclass that is no DTensor, or its state is placed otherwise. (A
  // master is looked for as well; float32 has none.)
  bool add_group(const pybind11::dict& group, const pybind11::tuple& states) {
    const pybind11::object all = group["params"];
    if (!PyList_Check(all.ptr())) return false;
    std::vector<PyObject*> keys(columns_);
    for (size_t column = kMaster; column < builder_.schema.first_further(); ++column) {
      if (states.contains(names_[column])) keys[column] = names_[column].ptr();
      if (states.contains(names_of_codes_[column])) keys[column] = names_of_codes_[column].ptr();
    }
    const size_t before = params.size();
    reserve(PyList_GET_SIZE(all.ptr()));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(all.ptr()); ++i) {
      const Py_ssize_t count = PyList_GET_SIZE(all.ptr());  // code of Python, which a tensor may run, may change it
      if (i + kAhead < count) prefetch_pointees(PyList_GET_ITEM(all.ptr(), i + kAhead));
      if (i + 2 * kAhead < count) prefetch(PyList_GET_ITEM(all.ptr(), i + 2 * kAhead));
      if (!add_param(borrowed(PyList_GET_ITEM(all.ptr(), i)), keys)) return false;
    }
    if (has_shards && !take_shards(before, keys)) return false;
    group_rows.push_back(static_cast<int64_t>(params.size() - before));
    return true;
  }

  // Adds all rows to the table. False where kernels cannot take one: other devices, odd strides. Or where rows
  // share elements of a parameter, and so must be updated one after the other.
  bool add_rows() {
    const size_t count = tensors_.size(), ahead = kAhead * columns_;
    std::vector<PyObject*> row(columns_);
    for (size_t i = 0; i < count; i += columns_) {
      for (size_t column = 0; column < columns_; ++column) {
        if (i + 2 * ahead + column < count) prefetch(tensors_[i + 2 * ahead + column].ptr());
        if (i + ahead + column < count) prefetch_pointees(tensors_[i + ahead + column].ptr());
        row[column] = tensors_[i + column].ptr();
      }
      if (!builder_.add_row(row.data(), places_[i / columns_])) return false;
      const DType param = builder_.table.cell(builder_.table.rows() - 1, kParam).dtype;
      if (lacks_master_[i / columns_] && may_have_master(param, DType::float32)) return false;
    }
    builder_.keep(std::move(tensors_));
    return !ParamSpans(builder_.table).overlap();
  }

  pybind11::list params;            // those that have a gradient
  std::vector<int64_t> group_rows;  // how many of them each group has
  std::vector<int64_t> averaged;    // how many of them have each average
  bool has_shards = false;          // whether one is a DTensor

 private:
  static constexpr int kLookAhead = 8;  // entries of the state

  // References are counted: tensors run code of Python when they are hashed or asked for their gradient.
  static pybind11::object borrowed(PyObject* object) {
    return pybind11::reinterpret_borrow<pybind11::object>(object == nullptr ? Py_None : object);
  }

  // Makes room for the rows of a group, but at least doubles it: there may be many groups.
  void reserve(size_t rows) {
    if (places_.size() + rows <= places_.capacity()) return;
    const size_t room = std::max(places_.size() + rows, 2 * places_.capacity());
    tensors_.reserve(room * columns_);
    places_.reserve(room);
    lacks_master_.reserve(room);
  }

  // `keys`: of the state, by column; null where the group uses none.
  bool add_param(const pybind11::object& param, const std::vector<PyObject*>& keys) {
    const int64_t place = place_++;
    const bool is_plain = builder_.reader.is_plain(param.ptr());
    if (!is_plain && !shards_.shard_of(param)) return false;
    const auto grad = take_ownership(PyObject_GetAttr(param.ptr(), names_[kGrad].ptr()));
    if (grad.is_none()) {
      next_state(param.ptr());  // passes over it
      return true;
    }
    const pybind11::object own = state_of(param.ptr());
    if (!PyDict_Check(own.ptr())) return false;
    const size_t begin = tensors_.size();
    tensors_.resize(begin + columns_, pybind11::none());
    pybind11::object* const row = &tensors_[begin];
    row[kParam] = param;
    row[kGrad] = grad;
    find_averages(param.ptr(), row);
    row[kStep] = borrowed(find(own.ptr(), names_[kStep].ptr()));
    if (row[kStep].is_none()) return false;
    for (size_t column = kMaster; column < columns_; ++column) {
      if (keys[column] == nullptr) continue;
      row[column] = borrowed(find(own.ptr(), keys[column]));
      if (row[column].is_none() && column != kMaster) return false;
    }
    lacks_master_.push_back(keys[kMaster] != nullptr && row[kMaster].is_none());
    params.append(param);
    add_places(param, place, is_plain);
    has_shards |= !is_plain;
    return true;
  }

  void add_places(const pybind11::object& param, int64_t place, bool is_plain) {
    Places places;
    bool is_random = rounding_.params || rounding_.codes;
    if (is_random) places.first = place;
    places.rounds_first = rounding_.params;
    for (size_t i = 0; i < rounding_.average_places.size(); ++i) {
      places.averages[i] = rounding_.average_place(i, param.ptr());
      is_random |= places.averages[i] >= 0;
    }
    if (is_random && !is_plain) places.origin = rounding_.origin_of(param).cast<int64_t>();
    places_.push_back(places);
  }

  // Puts the shards of DTensors in their place, in the rows from `begin` on.
  bool take_shards(size_t begin, const std::vector<PyObject*>& keys) {
    const size_t count = places_.size(), ahead = kAhead * columns_;
    for (size_t i = begin * columns_; i < count * columns_; i += columns_) {
      for (size_t j = i + ahead; j < std::min(i + ahead + columns_, count * columns_); ++j) {
        prefetch_slots(tensors_[j].ptr());
      }
      const pybind11::object param = tensors_[i + kParam];
      if (!builder_.reader.is_plain(param.ptr()) && !take_shards(param, &tensors_[i], keys)) return false;
    }
    return true;
  }

  // The same in one row. False where the shards do not belong together. Codes are plain
  // tensors, of a shard's elements.
  bool take_shards(const pybind11::object& param, pybind11::object* row, const std::vector<PyObject*>& keys) {
    const pybind11::object spec = shards_.spec_of(param);
    if (!spec) return false;
    for (size_t column = 0; column < columns_; ++column) {
      if (row[column].is_none() || builder_.schema.columns[column].one_per_row()) continue;
      if (keys[column] == names_of_codes_[column].ptr()) continue;
      const pybind11::object local = shards_.shard_of(row[column]), its = shards_.spec_of(row[column]);
      if (!local || !its) return false;
      row[column] = local;
      auto& [known, like] = alike_[column];  // those of state are nearly always one object for all parameters
      if (its.is(spec) || (its.is(known) && spec.is(like))) continue;
      if (!shards_.placed_alike(its, spec)) return false;
      known = its;
      like = spec;
    }
    return true;
  }

  // The state of a parameter if it is one of the next entries; null if it is none of them. States are nearly always
  // kept in the order of the parameters, and are found so without a hash, which for tensors is a Python function.
  PyObject* next_state(PyObject* param) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = position_;
    for (int i = 0; i < kLookAhead && PyDict_Next(state_.ptr(), &position, &key, &value); ++i) {
      if (key == param) {
        position_ = position;
        return value;
      }
    }
    return nullptr;
  }

  pybind11::object state_of(PyObject* param) {
    if (PyObject* const state = next_state(param)) return borrowed(state);
    return borrowed(find(state_.ptr(), param));
  }

  // Puts a parameter's averages in their place.
  void find_averages(PyObject* param, pybind11::object* row) {
    if (averages_.empty()) return;
    const auto id = take_ownership(PyLong_FromVoidPtr(param));
    for (size_t i = 0; i < averages_.size(); ++i) {
      PyObject* const average = find(averages_[i].ptr(), id.ptr());
      averaged[i] += average != nullptr;
      row[builder_.schema.column_of_average(i)] = borrowed(average);
    }
  }

  TableBuilder& builder_;
  const pybind11::dict& state_;
  std::vector<pybind11::dict> averages_;
  const Rounding& rounding_;
  int64_t place_ = 0;        // of the next parameter, counted over all groups, whether it has a gradient or not
  Py_ssize_t position_ = 0;  // in the state
  size_t columns_;
  std::vector<pybind11::object> names_, names_of_codes_;
  ShardReader shards_;
  std::vector<std::pair<pybind11::object, pybind11::object>> alike_;  // of each column, two specs found equal
  std::vector<pybind11::object> tensors_;                             // row by row
  std::vector<Places> places_;                                        // of each row
  std::vector<bool> lacks_master_;  // of each row: whether its group has masters, and its state has none
};

}  // namespace trainops
