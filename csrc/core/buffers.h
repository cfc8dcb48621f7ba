// Adds a model's buffers, which no gradient moves, to the rows of a step: their averages move, or are copies, in the
// same launch.
#pragma once

#include "rounding.h"
#include "spans.h"
#include "table_builder.h"

namespace trainops {

// `buffers`: for each average a list of (average, buffer, whether it moves, its place). Returns for each the ids of
// the buffers that kernels cannot take, or not in this launch: those that share memory with a parameter.
inline pybind11::list add_buffers(TableBuilder& builder, const pybind11::list& buffers, const Rounding& rounding) {
  namespace py = pybind11;
  py::list left;
  const ParamSpans params(builder.table);
  for (size_t i = 0; i < buffers.size(); ++i) {
    py::list ids;
    for (const auto pair : buffers[i].cast<py::list>()) {
      const auto [average, buffer, moves, _] = pair.cast<std::tuple<py::object, py::object, bool, int64_t>>();
      const auto shared = [&](const void* address, int64_t bytes) { return params.touch(address, bytes); };
      if (!builder.add_buffer(i, buffer.ptr(), average.ptr(), moves, shared,
                              rounding.average_place(i, buffer.ptr()))) {
        ids.append(py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(buffer.ptr())));
      }
    }
    left.append(ids);
  }
  return left;
}

}  // namespace trainops
