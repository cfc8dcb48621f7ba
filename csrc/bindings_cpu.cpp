// The Python module trainops._cpu: turns Python objects into tables and scalars, calls the kernels in cpu/ without
// the interpreter lock, and returns numbers. What the arguments mean is documented in trainops/backends/cpu.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "python_tables.h"

namespace py = pybind11;
using namespace trainops;

namespace {

TensorReader& reader = *new TensorReader;  // never destroyed: the interpreter is gone by then

// A table in host memory, cut for the CPU.
class Table : public PythonTable {
 public:
  Table(const py::list& columns, const py::object& scalars, size_t measured)
      : Table(columns.size(), !scalars.is_none(), measured) {
    add_rows(columns, scalars);
    complete();
  }

  const TensorTable& get() const { return regular_table(); }

 protected:
  Table() : Table(cpu::kStep, true, cpu::kGrad) {}
  void complete(const std::vector<int64_t>& = {}) { builder_.table.cut(cpu::kChunkNumel); }

 private:
  Table(size_t columns, bool has_scalar, size_t measured)
      : PythonTable({reader, columns, has_scalar, measured, {dlpack::kCPU, dlpack::kPinned}}) {}
};

Cell read_cell(const py::object& tensor) {
  if (tensor.is_none()) return {};
  Description description;
  if (!reader.read(tensor.ptr(), description) || description.device_type == dlpack::kCUDA) {
    throw py::type_error("not a plain floating-point tensor in host memory");
  }
  return description.cell;
}

void write(const std::vector<double>& values, const Cell& to) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (to.dtype == DType::float64) {
      static_cast<double*>(to.address)[i] = values[i];
    } else {
      static_cast<float*>(to.address)[i] = static_cast<float>(values[i]);
    }
  }
}

double norms(const Table& table, const std::string& kind, const py::object& out) {
  const Norm norm = kind == "l1" ? Norm::l1 : kind == "l2" ? Norm::l2 : Norm::inf;
  const Cell to = read_cell(out);
  py::gil_scoped_release release;
  const cpu::Norms result = cpu::norms(table.get(), 0, norm);
  write(result.rows, to);
  return result.total;
}

void scale(const Table& table, double coefficient) {
  py::gil_scoped_release release;
  cpu::scale(table.get(), 0, coefficient);
}

void clamp(const Table& table, double bound) {
  py::gil_scoped_release release;
  cpu::clamp(table.get(), 0, bound);
}

void ema(const Table& table, double decay) {
  py::gil_scoped_release release;
  cpu::ema(table.get(), 0, 1, decay);
}

using Group = std::tuple<int64_t, double, double, double, double, double, bool>;

// Returns the norm (of the unscaled gradients, NaN where none was asked for) and whether the step was skipped.
std::tuple<double, bool> adamw_step(const Table& table, const std::vector<Group>& groups,
                                    std::optional<double> max_norm, bool skip_nonfinite, double grad_scale,
                                    bool found_inf, std::optional<double> total_norm, double ema_decay,
                                    const py::object& norms_out) {
  const Cell to = read_cell(norms_out);
  std::vector<cpu::AdamWGroup> settings;
  for (const auto& [rows, lr, beta1, beta2, eps, weight_decay, maximize] : groups) {
    settings.push_back({rows, {lr, beta1, beta2, eps, weight_decay, maximize}});
  }
  py::gil_scoped_release release;
  double norm = total_norm.value_or(std::nan(""));
  if (!total_norm && (max_norm || skip_nonfinite)) {
    cpu::Norms result = cpu::norms(table.get(), cpu::kGrad, Norm::l2);
    for (double& row : result.rows) row /= grad_scale;
    write(result.rows, to);
    norm = result.total / grad_scale;
  }
  if (found_inf || (skip_nonfinite && !is_finite(norm))) return {norm, true};
  const double coefficient = step_coefficient(max_norm.has_value(), norm, max_norm.value_or(0.0), grad_scale);
  cpu::adamw(table.get(), settings, coefficient, ema_decay);
  return {norm, false};
}

// The address of one int64 for each sample; null for None.
const int64_t* read_rows(const py::object& rows) {
  return rows.is_none() ? nullptr : reinterpret_cast<const int64_t*>(rows.attr("data_ptr")().cast<uintptr_t>());
}

void drop_path(const py::object& out, const py::object& residual, const py::object& branch,
               const py::object& layer_scale, const py::object& mask, const py::object& rows, int64_t samples,
               int64_t sample_numel, int64_t channels) {
  const cpu::DropPath args{read_cell(out),  read_cell(residual), read_cell(branch), read_cell(layer_scale),
                           read_cell(mask), read_rows(rows),     samples,           sample_numel,
                           channels};
  py::gil_scoped_release release;
  cpu::drop_path(args);
}

void drop_path_backward(const py::object& of_branch, const py::object& of_layer_scale, const py::object& grad,
                        const py::object& branch, const py::object& layer_scale, const py::object& mask,
                        const py::object& rows, int64_t samples, int64_t sample_numel, int64_t channels) {
  const cpu::DropPathBackward args{
      read_cell(of_branch), read_cell(of_layer_scale), read_cell(grad), read_cell(branch), read_cell(layer_scale),
      read_cell(mask),      read_rows(rows),           samples,         sample_numel,      channels};
  py::gil_scoped_release release;
  cpu::drop_path_backward(args);
}

int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The compiled CPU kernels of trainops.";
  m.def("configure", [](py::object api, py::object describe, py::tuple plain_types) {
    reader.configure(std::move(api), std::move(describe), std::move(plain_types));
  });
  m.def("instruction_set", &cpu::instruction_set);
  m.def("threads", &threads);
  define_tables<Table>(m).def(py::init<const py::list&, const py::object&, size_t>(), py::arg("columns"),
                              py::arg("scalars") = py::none(), py::arg("measured") = 0);
  m.def("norms", &norms);
  m.def("scale", &scale);
  m.def("clamp", &clamp);
  m.def("ema", &ema);
  m.def("adamw_step", &adamw_step);
  m.def("drop_path", &drop_path);
  m.def("drop_path_backward", &drop_path_backward);
}
