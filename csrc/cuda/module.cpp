// The Python module trainops._cuda: launches the kernels, without the interpreter lock: a launch waits where the
// device's queue is full. Tables are those of trainops._core, and Python has put their words into the memory of the
// device. kernels.h and StepControl (trainops/adapters/interface.py) explain the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <string>
#include <string_view>

#include "../core/device_words.h"
#include "../core/python_table.h"
#include "../math/statistics.h"
#include "kernels.h"

namespace py = pybind11;
using namespace trainops;

namespace {

// Addresses come from Python as numbers; 0 is none.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A table in the memory of a device, and the stream to launch on.
struct StagedTable {
  py::object words;  // whoever owns that memory
  cuda::DeviceTable table;
  cuda::Queue queue;
  std::string kind;
  int measured;
  bool has_float64;

  // The table, of a kind that a kernel is made for.
  const cuda::DeviceTable& of(const char* expected) const {
    if (kind != expected) throw py::value_error("a table of kind " + kind + " is none of " + expected);
    return table;
  }
};

StagedTable stage(const PythonTable& table, const py::object& words, uintptr_t rows, uintptr_t chunks,
                  int64_t chunk_count, int64_t all_chunks, uintptr_t stream) {
  StagedTable staged;
  staged.words = words;
  staged.table.rows = at<const int64_t>(rows);
  staged.table.chunks = at<const int64_t>(chunks);
  staged.table.row_count = table.table().rows();
  staged.table.chunk_count = chunk_count;
  staged.table.all_chunks = all_chunks;
  staged.table.whole_chunks = count_whole_chunks(table.table(), cuda::kChunkNumel);
  staged.table.row_words = kAddresses + table.table().columns();
  staged.table.is_special = table.is_special();
  staged.queue = {table.device_index(), at<void>(stream)};
  staged.kind = table.schema().name;
  staged.measured = table.schema().measured;
  staged.has_float64 = table.has_float64();
  return staged;
}

void reduce(const StagedTable& staged, const std::string& statistic, uintptr_t grad_scale, uintptr_t counters,
            uintptr_t partials, uintptr_t total, uintptr_t total_out, uintptr_t rows_out, uintptr_t histogram,
            uintptr_t guard, uintptr_t found_inf) {
  cuda::ReduceArgs args{};
  args.table = staged.table;  // of any kind: the column that is measured
  args.column = staged.measured;
  args.grad_scale = at<const float>(grad_scale);
  args.counters = at<cuda::ReduceCounters>(counters);
  args.partials = at<void>(partials);
  args.total = at<double>(total);
  args.total_out = at<void>(total_out);
  args.rows_out = at<void>(rows_out);
  args.histogram = at<unsigned long long>(histogram);
  args.out_is_double = staged.has_float64;
  args.guard = at<Guard>(guard);
  args.found_inf = at<const float>(found_inf);
  cuda::reduce(statistic, args, staged.queue);
}

void judge(const StagedTable& staged, uintptr_t guard, uintptr_t norm, uintptr_t found_inf) {
  cuda::judge({at<Guard>(guard), at<const double>(norm), at<const float>(found_inf)}, staged.queue);
}

void scale(const StagedTable& staged, uintptr_t coefficient, bool is_float64, uintptr_t counters) {
  const Cell cell{at<void>(coefficient), is_float64 ? DType::float64 : DType::float32};
  cuda::scale(staged.of("transform"), cell, at<cuda::Counters>(counters), staged.queue);
}

void clamp(const StagedTable& staged, double bound, uintptr_t counters) {
  cuda::clamp(staged.of("transform"), bound, at<cuda::Counters>(counters), staged.queue);
}

void ema(const StagedTable& staged, double decay, uint32_t seed, uintptr_t skip, uintptr_t counters) {
  cuda::ema(staged.of("ema"), decay, seed, at<const bool>(skip), at<cuda::Counters>(counters), staged.queue);
}

// `words`: bytes passed as kernel arguments, or the device address of a longer list.
void update(const StagedTable& staged, const py::object& words, uintptr_t norm, uintptr_t grad_scale,
            uintptr_t found_inf, bool clips, bool skip_nonfinite, uintptr_t guard, uintptr_t skip,
            uintptr_t skipped_steps, uintptr_t counters) {
  cuda::UpdateArgs args{};
  args.table = staged.table;
  if (py::isinstance<py::bytes>(words)) {
    const auto carried = words.cast<std::string_view>();
    if (carried.size() > sizeof(args.inline_words)) throw std::length_error("too many words for a launch");
    std::copy(carried.begin(), carried.end(), reinterpret_cast<char*>(args.inline_words));
  } else {
    args.words = at<const int64_t>(words.cast<uintptr_t>());
  }
  args.norm = at<const double>(norm);
  args.grad_scale = at<const float>(grad_scale);
  args.found_inf = at<const float>(found_inf);
  args.clips = clips;
  args.skip_nonfinite = skip_nonfinite;
  args.guard = at<const Guard>(guard);
  args.skip = at<bool>(skip);
  args.skipped_steps = at<int64_t>(skipped_steps);
  args.counters = at<cuda::Counters>(counters);
  py::gil_scoped_release release;
  cuda::update(staged.kind, args, staged.queue);
}

void drop_path(const DropPath& operands, uintptr_t stream) { cuda::drop_path(operands, at<void>(stream)); }

void drop_path_backward(const DropPathBackward& operands, uintptr_t partials, uintptr_t stream) {
  cuda::drop_path_backward({operands, at<double>(partials)}, at<void>(stream));
}

}  // namespace

#define TRAINOPS_STATE_WORDS(Statistic, name) {name, state_words<Statistic>},

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The compiled CUDA kernels of trainops.";
  m.attr("DEVICE_TYPE") = TRAINOPS_DEVICE_TYPE == dlpack::kCUDA ? "cuda" : "cpu";
  m.attr("CHUNK_NUMEL") = cuda::kChunkNumel;
  m.attr("STATE_WORDS") = std::map<std::string, int>{TRAINOPS_STATISTICS(TRAINOPS_STATE_WORDS)};
  m.attr("INLINE_BYTES") = cuda::kInlineWords * sizeof(int64_t);
  m.def("devices", [] {
    const cuda::Devices found = cuda::devices();
    return py::make_tuple(found.names, found.error);
  });
  m.def("refusal", &cuda::refusal, py::kw_only(), py::arg("device"));
  py::class_<StagedTable>(m, "StagedTable", py::module_local())
      .def(py::init(&stage), py::keep_alive<1, 2>(), py::arg("table"), py::kw_only(), py::arg("words"),
           py::arg("rows"), py::arg("chunks"), py::arg("chunk_count"), py::arg("all_chunks"), py::arg("stream"));
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("reduce", &reduce, Unlocked(), py::arg("staged"), py::kw_only(), py::arg("statistic"), py::arg("grad_scale"),
        py::arg("counters"), py::arg("partials"), py::arg("total"), py::arg("total_out"), py::arg("rows_out"),
        py::arg("histogram") = 0, py::arg("guard") = 0, py::arg("found_inf") = 0);
  m.def("judge", &judge, Unlocked(), py::arg("staged"), py::kw_only(), py::arg("guard"), py::arg("norm"),
        py::arg("found_inf"));
  m.def("scale", &scale, Unlocked(), py::arg("staged"), py::kw_only(), py::arg("coefficient"), py::arg("is_float64"),
        py::arg("counters"));
  m.def("clamp", &clamp, Unlocked(), py::arg("staged"), py::kw_only(), py::arg("bound"), py::arg("counters"));
  m.def("ema", &ema, Unlocked(), py::arg("staged"), py::kw_only(), py::arg("decay"), py::arg("seed"), py::arg("skip"),
        py::arg("counters"));
  m.def("update", &update, py::arg("staged"), py::kw_only(), py::arg("words"), py::arg("norm"), py::arg("grad_scale"),
        py::arg("found_inf"), py::arg("clips"), py::arg("skip_nonfinite"), py::arg("guard"), py::arg("skip"),
        py::arg("skipped_steps"), py::arg("counters"));
  m.def("drop_path", &drop_path, Unlocked(), py::arg("operands"), py::kw_only(), py::arg("stream"));
  m.def("drop_path_backward", &drop_path_backward, Unlocked(), py::arg("operands"), py::kw_only(),
        py::arg("partials"), py::arg("stream"));
  m.def("drop_path_partials", &cuda::drop_path_partials, py::kw_only(), py::arg("samples"), py::arg("sample_numel"),
        py::arg("channels"));
}
