// Reads this rank's shards of DTensors. In Python, each question would cost as much as a row of a kernel's table.
#pragma once

#include <utility>
#include <vector>

#include "prefetch.h"
#include "rounding.h"
#include "tensor.h"

namespace trainops {

class ShardReader {
 public:
  ShardReader() {
    const auto interned = [](const char* name) { return take_ownership(PyUnicode_InternFromString(name)); };
    local_ = interned("_local_tensor");
    spec_ = interned("_spec");
    mesh_ = interned("mesh");
    placements_ = interned("placements");
  }

  // This rank's shard; how the whole is placed. Null where there is no such thing.
  pybind11::object shard_of(const pybind11::object& x) const { return attribute(x, local_); }
  pybind11::object spec_of(const pybind11::object& x) const { return attribute(x, spec_); }

  // Whether what two specs describe is placed alike: on one mesh, in the same way.
  bool placed_alike(const pybind11::object& a, const pybind11::object& b) const {
    return a.is(b) || (equal(a, b, mesh_) && equal(a, b, placements_));
  }

 private:
  static pybind11::object attribute(const pybind11::object& x, const pybind11::object& name) {
    PyObject* const found = PyObject_GetAttr(x.ptr(), name.ptr());
    if (found == nullptr) PyErr_Clear();
    return pybind11::reinterpret_steal<pybind11::object>(found);
  }

  static bool equal(const pybind11::object& a, const pybind11::object& b, const pybind11::object& name) {
    const pybind11::object first = a.attr(name), second = b.attr(name);
    const int answer = PyObject_RichCompareBool(first.ptr(), second.ptr(), Py_EQ);
    if (answer < 0) throw pybind11::error_already_set();
    return answer == 1;
  }

  pybind11::object local_, spec_, mesh_, placements_;  // names
};

// `tensors`, which may be None, with this rank's shard in place of each DTensor. None where one is something else.
inline pybind11::object local_tensors(const TensorReader& reader, const pybind11::list& tensors) {
  const ShardReader shards;
  pybind11::list found;
  for (const auto item : tensors) {
    auto x = pybind11::reinterpret_borrow<pybind11::object>(item);
    if (!x.is_none() && !reader.is_plain(x.ptr())) {
      x = shards.shard_of(x);
      if (!x || !reader.is_plain(x.ptr())) return pybind11::none();
    }
    found.append(x);
  }
  return found;
}

// The shards of all gradients, and whether one is of float64; None unless every parameter has a gradient, all are
// placed alike, and kernels can read the shards, which lie on one device.
inline pybind11::object shards_of_gradients(const TensorReader& reader, const pybind11::list& param_groups) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  std::vector<pybind11::object> params, grads;
  for (const auto group : param_groups) {
    for (const auto param : pybind11::list(group["params"])) {
      params.push_back(pybind11::reinterpret_borrow<pybind11::object>(param));
    }
  }
  const Py_ssize_t count = static_cast<Py_ssize_t>(params.size());
  if (count == 0) return pybind11::none();
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch_pointees(params[i + kAhead].ptr());
    if (reader.is_plain(params[i].ptr())) return pybind11::none();
    grads.push_back(take_ownership(PyObject_GetAttr(params[i].ptr(), grad_name)));
    if (grads[i].is_none()) return pybind11::none();
  }
  const ShardReader shards;
  pybind11::list found;
  pybind11::object first, before;  // the first spec, and the last that was found to be like it
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch_slots(grads[i + kAhead].ptr());
    for (pybind11::object its : {shards.spec_of(params[i]), shards.spec_of(grads[i])}) {
      if (!its) return pybind11::none();
      if (!first) first = its;
      if (its.is(first) || its.is(before)) continue;
      if (!shards.placed_alike(its, first)) return pybind11::none();
      before = std::move(its);
    }
    const pybind11::object shard = shards.shard_of(grads[i]);
    if (!shard || !reader.is_plain(shard.ptr())) return pybind11::none();
    found.append(shard);
  }
  Description description;
  int32_t device = 0;
  bool has_float64 = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch_pointees(PyList_GET_ITEM(found.ptr(), i + kAhead));
    if (!reader.read(PyList_GET_ITEM(found.ptr(), i), description)) return pybind11::none();
    const int32_t its = description.in_host_memory() ? -1 : description.device_id;
    if (i > 0 && its != device) return pybind11::none();
    device = its;
    has_float64 |= description.cell.dtype == DType::float64;
  }
  return pybind11::make_tuple(found, has_float64);
}

}  // namespace trainops
