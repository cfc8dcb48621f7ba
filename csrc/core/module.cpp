// The Python module trainops._core: builds the tables of all compiled backends and of Triton. It has no kernel.
#include <cstdlib>

#include "../math/guard.h"
#include "../math/storage.h"
#include "device_words.h"
#include "graph_flags.h"
#include "operands.h"
#include "python_table.h"

namespace py = pybind11;
using namespace trainops;

namespace {

py::bytes as_bytes(const Words& words) {
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

// A table's words, with the table that they are read from.
struct PythonWords {
  py::object table;
  DeviceWords words;
};

PythonWords words_of(const py::object& table, int64_t chunk_numel, bool by_kind) {
  const auto& self = table.cast<const PythonTable&>();
  return {table, DeviceWords(self.table(), self.group_rows(), chunk_numel, by_kind)};
}

// Names of dtypes, as torch has them.
const char* name_of(DType dtype) {
#define TRAINOPS_DTYPE(name, ...) #name,
  constexpr const char* names[] = {TRAINOPS_DTYPES(TRAINOPS_DTYPE) "int16", "uint8", "stochastic", "signed_codes",
                                   "unsigned_codes"};
#undef TRAINOPS_DTYPE
  return dtype == DType::none ? nullptr : names[static_cast<int>(dtype)];
}

py::list sections_of(const DeviceWords& words) {
  py::list sections;
  for (const Section& section : words.sections()) {
    py::list kind;
    for (const DType dtype : section.kind) kind.append(name_of(dtype));
    sections.append(py::make_tuple(py::tuple(kind), section.first_chunk, section.chunk_count));
  }
  return sections;
}

// The words of a setting for a device (schema.h): a number, or the address of a tensor on that device.
void put_setting(const TensorReader& reader, py::handle setting, int64_t* words) {
  if (PyNumber_Check(setting.ptr()) && (PyFloat_Check(setting.ptr()) || PyLong_Check(setting.ptr()))) {
    words[kForm] = kDouble;
    words[kValue] = bit_cast<int64_t>(setting.cast<double>());
    return;
  }
  Description description;
  if (!reader.read(setting.ptr(), description) || description.numel != 1 ||
      (description.cell.dtype != DType::float32 && description.cell.dtype != DType::float64)) {
    throw py::type_error("a setting is a number, or a tensor with one float32 or float64");
  }
  words[kForm] = description.cell.dtype == DType::float32 ? kFloatAddress : kDoubleAddress;
  words[kValue] = reinterpret_cast<intptr_t>(description.cell.address);
}

py::bytes step_words(const TensorReader& reader, const py::object& max_norm, const std::vector<double>& ema_decays,
                     const Seeds& seeds, const py::list& groups) {
  if (ema_decays.size() > kMaxAverages) throw py::value_error("no step has so many averages");
  Words words(kGroups);
  put_setting(reader, max_norm, &words[kMaxNorm]);
  words[kSeed] = seeds.params;
  for (size_t i = 0; i < ema_decays.size(); ++i) words[kEMADecay + i] = bit_cast<int64_t>(ema_decays[i]);
  std::copy(std::begin(seeds.averages), std::end(seeds.averages), &words[kEMASeed]);
  for (const auto group : groups) {
    for (const auto setting : group) {
      words.resize(words.size() + kSettingWords);
      put_setting(reader, setting, &words[words.size() - kSettingWords]);
    }
  }
  return as_bytes(words);
}

// Whether DropPath's operands are plain, small tensors on the CPU; with a residual, of one type and contiguous; layer
// scale of up to one dimension; and the environment asks for no backend. In Python these questions would cost as much
// as one of PyTorch's operations.
bool are_small(const TensorReader& reader, const py::object& branch, const py::object& residual,
               const py::object& layer_scale, int64_t largest) {
  Description first, other;
  const char* const asked = std::getenv("TRAINOPS_BACKEND");
  if (asked != nullptr && *asked != '\0') return false;
  if (!reader.is_plain(branch.ptr()) || !reader.read(branch.ptr(), first) || !first.in_host_memory()) return false;
  if (first.numel > largest) return false;
  const auto fits = [&](const py::object& operand) {
    return reader.is_plain(operand.ptr()) && reader.read(operand.ptr(), other) && other.in_host_memory() &&
           other.cell.dtype == first.cell.dtype && other.contiguous();
  };
  if (!residual.is_none() && !(first.contiguous() && fits(residual) && first.same_order(other))) return false;
  return layer_scale.is_none() || (fits(layer_scale) && other.ndim <= 1);
}

#define TRAINOPS_WORD(id, name, ...) {name, static_cast<int>(id)},
#define TRAINOPS_QUOTED(name) #name,

void define_schemas(py::module_& m) {
  py::class_<Column>(m, "Column")
      .def_readonly("name", &Column::name)
      .def_property_readonly("written", &Column::written)
      .def_property_readonly("optional", &Column::optional)
      .def_property_readonly("one_per_row", &Column::one_per_row)
      .def_property_readonly("of_param", &Column::of_param)
      .def_property_readonly("codes", [](const Column& self) { return name_of(self.codes()); });
  py::class_<Schema>(m, "Schema")
      .def_readonly("columns", &Schema::columns)
      .def_readonly("settings", &Schema::settings)
      .def_readonly("measured", &Schema::measured);
  py::dict all;
  for (const Schema& schema : schemas()) all[py::str(schema.name)] = schema;
  m.attr("SCHEMAS") = all;
  m.attr("FURTHER_AVERAGES") = further_averages();
  m.attr("STEP_COLUMNS") = std::map<std::string, int>{TRAINOPS_STEP_COLUMNS(TRAINOPS_WORD)};
  m.attr("WORDS") = std::map<std::string, std::map<std::string, int>>{
      {"row", {TRAINOPS_ROW_WORDS(TRAINOPS_WORD)}},      {"chunk", {TRAINOPS_CHUNK_WORDS(TRAINOPS_WORD)}},
      {"step", {TRAINOPS_STEP_WORDS(TRAINOPS_WORD)}},    {"setting", {TRAINOPS_SETTING_WORDS(TRAINOPS_WORD)}},
      {"form", {TRAINOPS_SETTING_FORMS(TRAINOPS_WORD)}},
  };
  m.attr("GUARD") = std::vector<std::string>{TRAINOPS_GUARD(TRAINOPS_QUOTED)};
  m.attr("LEAST_DEVIATION") = kLeastDeviation;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Tables of tensors for the kernels of trainops.";
  define_schemas(m);
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<>())
      .def("configure", &TensorReader::configure, py::kw_only(), py::arg("api"), py::arg("describe"),
           py::arg("plain_types"));
  py::class_<Rounding>(m, "Rounding")
      .def(py::init([](bool params, bool codes, std::vector<py::dict> average_places, const py::object& origin_of) {
             return Rounding{params, codes, std::move(average_places), origin_of};
           }),
           py::kw_only(), py::arg("params"), py::arg("codes"), py::arg("average_places"), py::arg("origin_of"));
  py::class_<Seeds>(m, "Seeds")
      .def(py::init([](uint32_t params, const std::vector<uint32_t>& averages) {
             if (averages.size() > kMaxAverages) throw py::value_error("no step has so many averages");
             Seeds seeds{params, {}};
             std::copy(averages.begin(), averages.end(), seeds.averages);
             return seeds;
           }),
           py::kw_only(), py::arg("params"), py::arg("averages"));
  py::class_<PythonTable>(m, "Table")
      .def(py::init<const TensorReader&, const std::string&, const py::dict&, const std::string&,
                    std::vector<int64_t>, const std::vector<PythonPlaces>&>(),
           py::arg("reader"), py::arg("kind"), py::arg("columns"), py::kw_only(), py::arg("device_type"),
           py::arg("group_rows") = std::vector<int64_t>{}, py::arg("places") = std::vector<PythonPlaces>{},
           py::keep_alive<1, 2>())
      .def(py::init<const TensorReader&, const std::string&, const py::list&, const py::dict&, const py::list&,
                    const py::list&, const py::list&, const std::string&, const Rounding&>(),
           py::arg("reader"), py::arg("rule"), py::kw_only(), py::arg("param_groups"), py::arg("state"),
           py::arg("averages"), py::arg("buffers"), py::arg("states"), py::arg("device_type"), py::arg("rounding"),
           py::keep_alive<1, 2>())
      .def_readonly("irregular", &PythonTable::irregular)
      .def_readonly("regular", &PythonTable::regular)
      .def_readonly("params", &PythonTable::params)
      .def_readonly("averaged", &PythonTable::averaged)
      .def_readonly("has_shards", &PythonTable::has_shards)
      .def_readonly("left", &PythonTable::left)
      .def_property_readonly("kind", [](const PythonTable& self) { return self.schema().name; })
      .def_property_readonly("group_rows", &PythonTable::group_rows)
      .def_property_readonly("averages", [](const PythonTable& self) { return self.schema().averages; })
      .def_property_readonly("rows", &PythonTable::rows)
      .def_property("has_float64", &PythonTable::has_float64, &PythonTable::set_has_float64)
      .def_property_readonly("is_special", &PythonTable::is_special)
      .def_property_readonly("device_index", &PythonTable::device_index)
      .def("words", &words_of, py::kw_only(), py::arg("chunk_numel"), py::arg("by_kind"));
  m.attr("RAISE_FLAG") = reinterpret_cast<uintptr_t>(&raise_flag);
  m.def("new_flag", &new_flag);
  m.def("take_flag", &take_flag, py::arg("flag"));
  py::class_<PythonWords>(m, "DeviceWords")
      .def_property_readonly("chunk_count", [](const PythonWords& self) { return self.words.chunk_count(); })
      .def_property_readonly("all_chunks", [](const PythonWords& self) { return self.words.all_chunks(); })
      .def_property_readonly("sections", [](const PythonWords& self) { return sections_of(self.words); })
      .def_property_readonly("layout", [](const PythonWords& self) { return as_bytes(self.words.layout()); })
      .def_property_readonly("rows", [](const PythonWords& self) { return as_bytes(self.words.rows()); })
      .def_property_readonly("chunks", [](const PythonWords& self) { return as_bytes(self.words.chunks()); });
  py::class_<DropPath>(m, "DropPath")
      .def(py::init(&drop_path_operands), py::arg("reader"), py::kw_only(), py::arg("device_type"), py::arg("out"),
           py::arg("residual"), py::arg("branch"), py::arg("layer_scale"), py::arg("mask"), py::arg("rows"),
           py::arg("samples"), py::arg("sample_numel"), py::arg("channels"));
  py::class_<DropPathBackward>(m, "DropPathBackward")
      .def(py::init(&drop_path_backward_operands), py::arg("reader"), py::kw_only(), py::arg("device_type"),
           py::arg("of_branch"), py::arg("of_layer_scale"), py::arg("grad"), py::arg("branch"),
           py::arg("layer_scale"), py::arg("mask"), py::arg("rows"), py::arg("samples"), py::arg("sample_numel"),
           py::arg("channels"));
  m.def("are_small", &are_small, py::arg("reader"), py::arg("branch"), py::arg("residual"), py::arg("layer_scale"),
        py::arg("largest"));
  m.def("local_tensors", &local_tensors, py::arg("reader"), py::arg("tensors"));
  m.def("shards_of_gradients", &shards_of_gradients, py::arg("reader"), py::arg("param_groups"));
  m.def("step_words", &step_words, py::kw_only(), py::arg("reader"), py::arg("max_norm"), py::arg("ema_decays"),
        py::arg("seeds"), py::arg("groups"));
}
