// The operands of kernels that take no table, read from Python's arguments.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "drop_path.h"
#include "tensor.h"

namespace trainops {

// The memory of operands, which all lie on one device. An empty cell for None.
class Operands {
 public:
  Operands(const TensorReader& reader, const std::string& device_type)
      : reader_(reader), device_types_(device_types(device_type)), device_type_(device_type) {}

  Cell operator()(const pybind11::object& tensor) {
    if (tensor.is_none()) return {};
    Description description;
    if (!reader_.read(tensor.ptr(), description) ||
        std::find(device_types_.begin(), device_types_.end(), description.device_type) == device_types_.end()) {
      throw pybind11::type_error("not a plain floating-point tensor on a " + device_type_ + " device");
    }
    device = description.device_id;
    return description.cell;
  }

  int device = 0;  // of the last one

 private:
  const TensorReader& reader_;
  std::vector<int32_t> device_types_;
  std::string device_type_;
};

// The arguments that both kernels of DropPath take. `rows`: the address of an int64 for each sample, or 0.
template <typename Args>
Args with_operands(Operands& cell, const pybind11::object& branch, const pybind11::object& layer_scale,
                   const pybind11::object& mask, uintptr_t rows, int64_t samples, int64_t sample_numel,
                   int64_t channels) {
  Args args{};
  args.branch = cell(branch);
  args.layer_scale = cell(layer_scale);
  args.mask = cell(mask);
  args.rows = reinterpret_cast<const int64_t*>(rows);
  args.samples = samples;
  args.sample_numel = sample_numel;
  args.channels = channels;
  args.device = cell.device;
  return args;
}

inline DropPath drop_path_operands(const TensorReader& reader, const std::string& device_type,
                                   const pybind11::object& out, const pybind11::object& residual,
                                   const pybind11::object& branch, const pybind11::object& layer_scale,
                                   const pybind11::object& mask, uintptr_t rows, int64_t samples,
                                   int64_t sample_numel, int64_t channels) {
  Operands cell(reader, device_type);
  auto args = with_operands<DropPath>(cell, branch, layer_scale, mask, rows, samples, sample_numel, channels);
  args.out = cell(out);
  args.residual = cell(residual);
  return args;
}

inline DropPathBackward drop_path_backward_operands(const TensorReader& reader, const std::string& device_type,
                                                    const pybind11::object& of_branch,
                                                    const pybind11::object& of_layer_scale,
                                                    const pybind11::object& grad, const pybind11::object& branch,
                                                    const pybind11::object& layer_scale, const pybind11::object& mask,
                                                    uintptr_t rows, int64_t samples, int64_t sample_numel,
                                                    int64_t channels) {
  Operands cell(reader, device_type);
  auto args = with_operands<DropPathBackward>(cell, branch, layer_scale, mask, rows, samples, sample_numel, channels);
  args.of_branch = cell(of_branch);
  args.of_layer_scale = cell(of_layer_scale);
  args.grad = cell(grad);
  return args;
}

}  // namespace trainops
