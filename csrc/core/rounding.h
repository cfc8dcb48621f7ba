// What of a step is rounded stochastically, as Python says it.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "table.h"

namespace trainops {

// Takes ownership of a new reference. Throws if it is null.
inline pybind11::object take_ownership(PyObject* object) {
  if (object == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(object);
}

// The value of a key in a dict, null if there is none. Its reference is borrowed.
inline PyObject* find(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

struct Rounding {
  bool params;                                 // those of bfloat16, by their place
  bool codes;                                  // 8-bit state, if there is some, by its parameter's place
  std::vector<pybind11::dict> average_places;  // of each average: the places of its tensors, by id(what it follows)
  pybind11::object origin_of;                  // a function: the index of the first element of a shard, for a DTensor

  // The place of what the i-th average has of a tensor; negative where it is rounded to nearest.
  int64_t average_place(size_t i, PyObject* tensor) const {
    if (i >= average_places.size() || average_places[i].empty()) return -1;
    PyObject* const found = find(average_places[i].ptr(), take_ownership(PyLong_FromVoidPtr(tensor)).ptr());
    return found == nullptr ? -1 : pybind11::handle(found).cast<int64_t>();
  }
};

}  // namespace trainops
