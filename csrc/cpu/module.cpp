// The Python module trainops._cpu: calls the kernels, and returns numbers. All but those of a small
// DropPath run without the interpreter lock. Tables are those of trainops._core. StepControl
// (trainops/adapters/interface.py) explains the arguments of a step.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../core/operands.h"
#include "../core/python_table.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;
using namespace trainops;

namespace {

// Writes the statistics of rows into the memory of a tensor.
void write(const std::vector<double>& values, uintptr_t to, bool is_float64) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (is_float64) {
      reinterpret_cast<double*>(to)[i] = values[i];
    } else {
      reinterpret_cast<float*>(to)[i] = static_cast<float>(values[i]);
    }
  }
}

Description described(const TensorReader& reader, const py::object& tensor) {
  Description description;
  if (!reader.read(tensor.ptr(), description) || !description.in_host_memory()) {
    throw py::type_error("not a plain floating-point tensor on the CPU");
  }
  return description;
}

double reduce(const PythonTable& table, const std::string& statistic, uintptr_t rows_out) {
  py::gil_scoped_release release;
  const cpu::Chunks chunks(table.table("reduce"));
  const cpu::Result result = cpu::reduce(statistic, table.table(), chunks, table.schema().measured);
  write(result.rows, rows_out, table.has_float64());
  return result.total;
}

void count_exponents(const PythonTable& table, uintptr_t counts) {
  py::gil_scoped_release release;
  const cpu::Chunks chunks(table.table("reduce"));
  cpu::count_exponents(table.table(), chunks, table.schema().measured, reinterpret_cast<int64_t*>(counts));
}

void scale(const PythonTable& table, double coefficient) {
  py::gil_scoped_release release;
  cpu::scale(table.table("transform"), coefficient);
}

void clamp(const PythonTable& table, double bound) {
  py::gil_scoped_release release;
  cpu::clamp(table.table("transform"), bound);
}

void ema(const PythonTable& table, double decay, uint32_t seed) {
  py::gil_scoped_release release;
  cpu::ema(table.table("ema"), decay, seed);
}

// Returns the norm (of the unscaled gradients, NaN if it is not needed) and whether the step was skipped.
std::tuple<double, bool> update(const PythonTable& table, const std::vector<std::vector<double>>& settings,
                                std::optional<double> max_norm, bool skip_nonfinite, double grad_scale,
                                bool found_inf, std::optional<double> total_norm, std::vector<double> ema_decays,
                                const Seeds& seeds, uintptr_t norms_out, uintptr_t guard_address) {
  if (settings.size() != table.group_rows().size()) throw py::value_error("there is another number of groups");
  for (const auto& group : settings) {
    if (group.size() != table.schema().settings.size())
      throw py::value_error("a group has another number of settings");
  }
  ema_decays.resize(kMaxAverages);
  py::gil_scoped_release release;
  const cpu::Chunks chunks(table.table());
  double norm = total_norm.value_or(std::nan(""));
  if (norms_out != 0) {
    cpu::Result result = cpu::reduce("l2_norm", table.table(), chunks, kGrad);
    for (double& row : result.rows) row /= grad_scale;
    write(result.rows, norms_out, table.has_float64());
    norm = result.total / grad_scale;
  }
  Control control;
  control.clips = max_norm.has_value();
  control.skip_nonfinite = skip_nonfinite;
  control.max_norm = max_norm.value_or(0.0);
  Decision decision = decide(control, norm, grad_scale, found_inf);
  if (auto* const guard = reinterpret_cast<Guard*>(guard_address)) {
    *guard = judged(*guard, norm, decision.skips);
    decision.skips |= guard->verdict != 0.0;
  }
  if (!decision.skips) {
    const cpu::GroupSettings groups{table.group_rows(), settings};
    cpu::update(table.schema().name, table.table(), chunks, groups, decision.coefficient, ema_decays, seeds);
  }
  return {norm, decision.skips};
}

// A small DropPath. Its operands are plain tensors on the CPU, contiguous, of one type and, with layer scale, not
// empty; layer scale has one factor for each element of the last dimension.

void scale_kept(const TensorReader& reader, const py::object& mask, double keep_prob) {
  const Description kept = described(reader, mask);
  cpu::scale_kept(kept.cell, kept.numel, keep_prob);
}

void restore_dropped(const TensorReader& reader, const py::object& out, const py::object& residual,
                     const py::object& mask) {
  const Description whole = described(reader, out), kept = described(reader, mask);
  if (kept.numel == 0) return;
  cpu::RestoreDropped args;
  args.out = whole.cell;
  args.residual = described(reader, residual).cell;
  args.mask = kept.cell;
  args.samples = kept.numel;
  args.sample_numel = whole.numel / kept.numel;
  cpu::restore_dropped(args);
}

template <typename Args>
Args small_operands(const TensorReader& reader, const py::object& branch, const py::object& layer_scale,
                    const py::object& mask) {
  const Description whole = described(reader, branch), factors = described(reader, layer_scale);
  const Description kept = described(reader, mask);
  Args args{};
  args.branch = whole.cell;
  args.layer_scale = factors.cell;
  args.mask = kept.cell;
  args.samples = kept.numel;
  args.sample_numel = whole.numel / kept.numel;
  args.channels = factors.numel;
  return args;
}

void drop_path_small(const TensorReader& reader, const py::object& out, const py::object& residual,
                     const py::object& branch, const py::object& layer_scale, const py::object& mask) {
  auto args = small_operands<DropPath>(reader, branch, layer_scale, mask);
  args.out = described(reader, out).cell;
  args.residual = described(reader, residual).cell;
  cpu::drop_path(args);
}

void drop_path_small_backward(const TensorReader& reader, const py::object& of_branch,
                              const py::object& of_layer_scale, const py::object& grad, const py::object& branch,
                              const py::object& layer_scale, const py::object& mask) {
  auto args = small_operands<DropPathBackward>(reader, branch, layer_scale, mask);
  args.of_branch = described(reader, of_branch).cell;
  args.of_layer_scale = described(reader, of_layer_scale).cell;
  args.grad = described(reader, grad).cell;
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
  m.def("instruction_set", &cpu::instruction_set);
  m.def("threads", &threads);
  m.def("reduce", &reduce, py::arg("table"), py::kw_only(), py::arg("statistic"), py::arg("rows_out"));
  m.def("count_exponents", &count_exponents, py::arg("table"), py::kw_only(), py::arg("counts"));
  m.def("scale", &scale, py::arg("table"), py::kw_only(), py::arg("coefficient"));
  m.def("clamp", &clamp, py::arg("table"), py::kw_only(), py::arg("bound"));
  m.def("ema", &ema, py::arg("table"), py::kw_only(), py::arg("decay"), py::arg("seed"));
  m.def("update", &update, py::arg("table"), py::kw_only(), py::arg("settings"), py::arg("max_norm"),
        py::arg("skip_nonfinite"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("total_norm"),
        py::arg("ema_decays"), py::arg("seeds"), py::arg("norms_out"), py::arg("guard") = 0);
  m.def("drop_path", &cpu::drop_path, py::arg("operands"), py::call_guard<py::gil_scoped_release>());
  m.def("drop_path_backward", &cpu::drop_path_backward, py::arg("operands"),
        py::call_guard<py::gil_scoped_release>());
  m.def("scale_kept", &scale_kept, py::arg("reader"), py::kw_only(), py::arg("mask"), py::arg("keep_prob"));
  m.def("restore_dropped", &restore_dropped, py::arg("reader"), py::kw_only(), py::arg("out"), py::arg("residual"),
        py::arg("mask"));
  m.def("drop_path_small", &drop_path_small, py::arg("reader"), py::kw_only(), py::arg("out"), py::arg("residual"),
        py::arg("branch"), py::arg("layer_scale"), py::arg("mask"));
  m.def("drop_path_small_backward", &drop_path_small_backward, py::arg("reader"), py::kw_only(), py::arg("of_branch"),
        py::arg("of_layer_scale"), py::arg("grad"), py::arg("branch"), py::arg("layer_scale"), py::arg("mask"));
}
