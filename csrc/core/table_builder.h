// Collects rows of tensors in a Table, and refuses those that kernels cannot take as they are.
#pragma once

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "../math/codes.h"
#include "schema.h"
#include "tensor.h"

namespace trainops {

class TableBuilder {
 public:
  // `device_types`: DLPack's numbers. Tensors that are not in host memory have to lie on one device.
  TableBuilder(const TensorReader& reader, Schema kind, std::vector<int32_t> device_types)
      : table(static_cast<int64_t>(kind.columns.size())),
        reader(reader),
        schema(std::move(kind)),
        device_types_(std::move(device_types)),
        cells_(schema.columns.size()) {}

  // Adds a row: one tensor or None for each column. Returns false and adds nothing if kernels cannot take the row.
  // Its tensors must have the same shape and the same dense strides. With a place, bfloat16 is rounded
  // stochastically. Whoever adds a row has its tensors kept.
  bool add_row(PyObject* const* tensors, const Places& places = {}) {
    const Description* first = nullptr;
    for (size_t i = 0; i < cells_.size(); ++i) {
      const Column& column = schema.columns[i];
      cells_[i] = Cell{};
      if (tensors[i] == Py_None) {
        if (!column.optional()) return false;
        continue;
      }
      Description& description = first == nullptr && !column.one_per_row() ? first_ : next_;
      const DType integers = column.of_param()               ? DType::int16
                             : column.codes() != DType::none ? DType::byte
                                                             : DType::none;
      if (!reader.is_plain(tensors[i]) || !read(tensors[i], description, integers)) return false;
      if (column.of_param() && !may_have_master(cells_[kParam].dtype, description.cell.dtype)) return false;
      if (column.one_per_row()) {
        if (description.numel != 1 || description.cell.dtype != DType::float32) return false;
      } else if (description.cell.dtype == DType::byte) {
        if (first == nullptr || !are_codes_of(*first, description)) return false;
        description.cell.dtype = column.codes();
        is_special = true;
      } else {
        if (maybe_negated(tensors[i], description)) return false;
        if (first == nullptr ? !description.dense() : !description.same_order(*first)) return false;
        first = &first_;
      }
      cells_[i] = description.cell;
    }
    has_float64 |= cells_[schema.measured].dtype == DType::float64;
    if (places.first >= 0 && places.rounds_first) round_stochastically(cells_[0]);
    for (size_t i = 0; i < schema.averages; ++i) {
      if (places.averages[i] >= 0) round_stochastically(cells_[schema.column_of_average(i)]);
    }
    table.add_row(cells_.data(), first == nullptr ? 0 : first->numel, places);
    return true;
  }

  // Adds the row of a buffer of a step, with one of its averages, which moves or is a copy of the buffer's bits.
  // Returns false and adds nothing if kernels cannot take it, or shared(address, bytes) is true. `place`: of an
  // average that is rounded stochastically; else negative.
  template <typename Shared>
  bool add_buffer(size_t average_index, PyObject* buffer, PyObject* average, bool moves, Shared shared,
                  int64_t place) {
    const auto can_read = [&](PyObject* tensor, Description& description) {
      if (!reader.is_plain(tensor)) return false;
      const bool is_read = moves ? reader.read(tensor, description) : reader.read_bytes(tensor, description);
      return is_read && lies_here(description) && !maybe_negated(tensor, description);
    };
    if (!can_read(buffer, first_) || !can_read(average, next_)) return false;
    if (!first_.dense() || !next_.same_order(first_) || (!moves && !next_.same_type(first_))) return false;
    const int64_t bytes = first_.numel * first_.bits / 8;
    if (shared(first_.cell.address, bytes)) return false;
    if (first_.numel == 0) return true;
    std::fill(cells_.begin(), cells_.end(), Cell{});
    cells_[kParam] = first_.cell;
    Cell& its = cells_[schema.column_of_average(average_index)] = next_.cell;
    Places places;
    if (place >= 0) round_stochastically(its);
    places.averages[average_index] = place;
    table.add_buffer(cells_.data(), moves ? first_.numel : bytes, places);
    keep(buffer);
    keep(average);
    return true;
  }

  // Tensors of the table live as long as it does: kernels run without the interpreter lock.
  void keep(PyObject* tensor) { kept_.push_back(pybind11::reinterpret_borrow<pybind11::object>(tensor)); }

  void keep(std::vector<pybind11::object>&& tensors) {
    if (kept_.empty()) kept_.swap(tensors);
    std::move(tensors.begin(), tensors.end(), std::back_inserter(kept_));
  }

  Table table;
  const TensorReader& reader;
  const Schema schema;
  bool has_float64 = false;  // in the column that is measured
  bool is_special = false;   // whether some of it is stochastic or codes: kernels have code of their own for this
  int32_t device_id = -1;    // negative until there is a tensor that is not in host memory

 private:
  void round_stochastically(Cell& cell) {
    if (cell.dtype != DType::bfloat16) return;
    cell.dtype = DType::stochastic;
    is_special = true;
  }

  bool read(PyObject* tensor, Description& description, DType integers) {
    return reader.read(tensor, description, integers) && lies_here(description);
  }

  // Whether a tensor has the size of the codes of a parameter, which no arithmetic in float64 works on.
  bool are_codes_of(const Description& param, const Description& codes) const {
    return codes.contiguous() && codes.ndim <= 1 && codes.numel == param.numel + count_code_blocks(param.numel) &&
           cells_[kParam].dtype != DType::float64;
  }

  // Whether a tensor lies on the device of the table.
  bool lies_here(const Description& description) {
    if (std::find(device_types_.begin(), device_types_.end(), description.device_type) == device_types_.end()) {
      return false;
    }
    if (description.in_host_memory()) return true;
    if (device_id < 0) device_id = description.device_id;
    return device_id == description.device_id;
  }

  std::vector<int32_t> device_types_;
  std::vector<Cell> cells_;
  std::vector<pybind11::object> kept_;
  Description first_, next_;
};

}  // namespace trainops
