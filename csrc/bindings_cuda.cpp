// The Python module trainops._cuda: turns Python objects into tables and addresses, and launches the kernels in
// cuda/. What the arguments mean is documented in cuda/kernels.h and trainops/backends/cuda.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/kernels.h"
#include "device_table.h"
#include "python_tables.h"

namespace py = pybind11;
using namespace trainops;

namespace {

TensorReader& reader = *new TensorReader;  // never destroyed: the interpreter is gone by then

py::bytes as_bytes(const Words& words) {
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

// A table of tensors on one device.
class Table : public PythonTable {
 public:
  Table(const py::list& columns, const py::object& scalars, size_t measured, const std::vector<int64_t>& group_rows)
      : Table(columns.size(), !scalars.is_none(), measured) {
    add_rows(columns, scalars);
    complete(group_rows.empty() ? std::vector<int64_t>{rows()} : group_rows);
  }

  int64_t chunk_count() const { return count_chunks(builder_.table, cuda::kChunkNumel); }
  int32_t device_index() const { return std::max(builder_.device_id, 0); }
  py::bytes numels() const { return as_bytes(numel_words(builder_.table)); }
  py::bytes rows_for_device() const { return as_bytes(row_words(builder_.table, group_rows_, cuda::kChunkNumel)); }
  py::bytes chunks_for_device() const { return as_bytes(chunk_words(builder_.table, cuda::kChunkNumel)); }

  // The table whose words lie at such addresses.
  cuda::DeviceTable at(uintptr_t rows, uintptr_t chunks) const {
    const TensorTable& table = regular_table();
    return {reinterpret_cast<const int64_t*>(rows), reinterpret_cast<const int64_t*>(chunks), table.rows(),
            chunk_count(), 4 + table.columns()};
  }

 protected:
  Table() : Table(cuda::kStep, true, cuda::kGrad) {}
  void complete(const std::vector<int64_t>& group_rows) { group_rows_ = group_rows; }

 private:
  Table(size_t columns, bool has_scalar, size_t measured)
      : PythonTable({reader, columns, has_scalar, measured, {TRAINOPS_DEVICE_TYPE}}) {}

  std::vector<int64_t> group_rows_;
};

// Addresses come from Python as numbers; 0 is none.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Where the words of a table lie, and where to launch.
using Words2 = std::pair<uintptr_t, uintptr_t>;

cuda::Queue queue_of(const Table& table, uintptr_t stream) { return {table.device_index(), at<void>(stream)}; }

void norms(const Table& table, Words2 words, int64_t column, const std::string& kind, uintptr_t grad_scale,
           uintptr_t counter, uintptr_t partials, uintptr_t total, uintptr_t total_out, uintptr_t norms_out,
           uintptr_t stream) {
  const Norm norm = kind == "l1" ? Norm::l1 : kind == "l2" ? Norm::l2 : Norm::inf;
  cuda::norms(
      {table.at(words.first, words.second), column, at<const float>(grad_scale), at<unsigned>(counter),
       at<double>(partials), at<double>(total), at<void>(total_out), at<void>(norms_out), table.has_float64()},
      norm, queue_of(table, stream));
}

void scale(const Table& table, Words2 words, uintptr_t coefficient, bool is_double, uintptr_t stream) {
  const Cell cell{at<void>(coefficient), is_double ? DType::float64 : DType::float32};
  cuda::scale(table.at(words.first, words.second), cell, queue_of(table, stream));
}

void clamp(const Table& table, Words2 words, double bound, uintptr_t stream) {
  cuda::clamp(table.at(words.first, words.second), bound, queue_of(table, stream));
}

void ema(const Table& table, Words2 words, double decay, uintptr_t skip, uintptr_t stream) {
  cuda::ema(table.at(words.first, words.second), decay, at<const bool>(skip), queue_of(table, stream));
}

// `settings`: words for the launch to carry, or the address of more words than it carries.
void adamw(const Table& table, Words2 words, const py::object& settings, uintptr_t norm, uintptr_t grad_scale,
           uintptr_t found_inf, bool clips, bool skip_nonfinite, uintptr_t skip, uintptr_t skipped_steps,
           uintptr_t counter, uintptr_t stream) {
  cuda::AdamWArgs args{};
  args.table = table.at(words.first, words.second);
  if (py::isinstance<py::bytes>(settings)) {
    const auto carried = settings.cast<std::string_view>();
    if (carried.size() > sizeof(args.inline_settings)) throw std::length_error("too many settings for a launch");
    std::copy(carried.begin(), carried.end(), reinterpret_cast<char*>(args.inline_settings));
  } else {
    args.settings = at<const int64_t>(settings.cast<uintptr_t>());
  }
  args.norm = at<const double>(norm);
  args.grad_scale = at<const float>(grad_scale);
  args.found_inf = at<const float>(found_inf);
  args.clips = clips;
  args.skip_nonfinite = skip_nonfinite;
  args.skip = at<bool>(skip);
  args.skipped_steps = at<int64_t>(skipped_steps);
  args.counter = at<unsigned>(counter);
  cuda::adamw(args, queue_of(table, stream));
}

class Operands {
 public:
  Cell read(const py::object& tensor) {
    if (tensor.is_none()) return {};
    Description description;
    if (!reader.read(tensor.ptr(), description) || description.device_type != TRAINOPS_DEVICE_TYPE) {
      throw py::type_error("not a plain floating-point tensor on a device of this backend");
    }
    device_ = description.device_id;
    return description.cell;
  }
  cuda::Queue queue(uintptr_t stream) const { return {device_, at<void>(stream)}; }

 private:
  int device_ = 0;
};

// `rows`: the address of an int64 for each sample.
void drop_path(const py::object& out, const py::object& residual, const py::object& branch,
               const py::object& layer_scale, const py::object& mask, uintptr_t rows, int64_t samples,
               int64_t sample_numel, int64_t channels, uintptr_t stream) {
  Operands o;
  const cuda::DropPath args{o.read(out),  o.read(residual),        o.read(branch), o.read(layer_scale),
                            o.read(mask), at<const int64_t>(rows), samples,        sample_numel,
                            channels};
  cuda::drop_path(args, o.queue(stream));  // which is known when all have been read
}

void drop_path_backward(const py::object& of_branch, const py::object& of_layer_scale, const py::object& grad,
                        const py::object& branch, const py::object& layer_scale, const py::object& mask,
                        uintptr_t rows, int64_t samples, int64_t sample_numel, int64_t channels, uintptr_t partials,
                        uintptr_t stream) {
  Operands o;
  const cuda::DropPathBackward args{
      o.read(of_branch),   o.read(of_layer_scale),  o.read(grad), o.read(branch), o.read(layer_scale),
      o.read(mask),        at<const int64_t>(rows), samples,      sample_numel,   channels,
      at<double>(partials)};
  cuda::drop_path_backward(args, o.queue(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The compiled CUDA kernels of trainops.";
  m.attr("DEVICE_TYPE") = TRAINOPS_DEVICE_TYPE == dlpack::kCUDA ? "cuda" : "cpu";
  m.attr("INLINE_SETTINGS") = cuda::kInlineSettings * sizeof(int64_t);
  m.def("configure", [](py::object api, py::object describe, py::tuple plain_types) {
    reader.configure(std::move(api), std::move(describe), std::move(plain_types));
  });
  m.def("devices", [] {
    const cuda::Devices found = cuda::devices();
    return py::make_tuple(found.count, found.error, found.name);
  });
  define_tables<Table>(m)
      .def(py::init<const py::list&, const py::object&, size_t, const std::vector<int64_t>&>(), py::arg("columns"),
           py::arg("scalars") = py::none(), py::arg("measured") = 0, py::arg("group_rows") = std::vector<int64_t>())
      .def_property_readonly("chunk_count", &Table::chunk_count)
      .def_property_readonly("device_index", &Table::device_index)
      .def_property_readonly("numels", &Table::numels)
      .def_property_readonly("row_words", &Table::rows_for_device)
      .def_property_readonly("chunk_words", &Table::chunks_for_device);
  m.def("norms", &norms);
  m.def("scale", &scale);
  m.def("clamp", &clamp);
  m.def("ema", &ema);
  m.def("adamw", &adamw);
  m.def("drop_path", &drop_path);
  m.def("drop_path_backward", &drop_path_backward);
  m.def("drop_path_partials", &cuda::drop_path_partials);
}
