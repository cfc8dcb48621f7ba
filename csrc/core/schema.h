// The columns of a step and of EMA, and the words of a table on a device. Their order is written only here.
//
// A rule's formula file lists its state and its settings (math/adamw.h). rules.h lists all kinds of table. C++ makes
// enumerators of these lists; Python and Triton read them by name from trainops._core.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "table.h"

namespace trainops {

// The use of a column. Without a flag, every row has a tensor there, and kernels only read it. The last two say that
// it may be kept in 8 bits, and whether it is of either sign (math/codes.h).
enum Use : int {
  kRead = 0,
  kWritten = 1,
  kOptional = 2,
  kOnePerRow = 4,
  kOfParam = 8,
  kSignedCodes = 16,
  kUnsignedCodes = 32
};

struct Column {
  const char* name;
  int use;

  bool written() const { return use & kWritten; }
  bool optional() const { return use & kOptional; }
  bool one_per_row() const { return use & kOnePerRow; }  // a float32 for the row, not a number for each element
  bool of_param() const { return use & kOfParam; }       // a master: its type has to suit the parameter's

  // The type of the column where it is kept in 8 bits, each with a number for every element, and one for the block of
  // elements that share a scale; `none` where it cannot be.
  DType codes() const {
    return use & kSignedCodes ? DType::signed_codes : use & kUnsignedCodes ? DType::unsigned_codes : DType::none;
  }
};

// Lists are written as macros, of which these make enumerators, columns, fields and names.
#define TRAINOPS_ENUMERATOR(id, ...) id,
#define TRAINOPS_COLUMN(id, name, use) Column{name, use},
#define TRAINOPS_FIELD(name) double name;
#define TRAINOPS_NAME(name) #name,

// Every rule's rows begin with these; its state follows.
#define TRAINOPS_STEP_COLUMNS(column)                                                                              \
  column(kParam, "param", kWritten) column(kGrad, "grad", kRead) column(kAverage, "average", kWritten | kOptional) \
      column(kStep, "step", kWritten | kOnePerRow) column(kMaster, "master", kWritten | kOptional | kOfParam)
enum StepColumn : int { TRAINOPS_STEP_COLUMNS(TRAINOPS_ENUMERATOR) kState };

// A step moves up to so many averages. Columns of the further ones come behind the rule's state, in tables that have
// some. In the row of a buffer, which has no gradient, `param` is the buffer, and an average moves or, as bytes, is a
// copy.
#define TRAINOPS_FURTHER_AVERAGES(column)                                                                 \
  column(kAverage2, "average2", kWritten | kOptional) column(kAverage3, "average3", kWritten | kOptional) \
      column(kAverage4, "average4", kWritten | kOptional)
enum FurtherAverage : int { TRAINOPS_FURTHER_AVERAGES(TRAINOPS_ENUMERATOR) kFurtherAverages };
static_assert(kMaxAverages == 1 + kFurtherAverages, "each average has a column");

// How many averages the rows of a table of that many columns may have, and their columns.
template <typename Rule>
TRAINOPS_HOST_DEVICE int averages_in(int64_t columns) {
  return static_cast<int>(columns) - kState - Rule::kStates + 1;
}
template <typename Rule>
TRAINOPS_HOST_DEVICE int column_of_average(int i) {
  return i == 0 ? kAverage : kState + Rule::kStates + i - 1;
}

// The columns of an EMA outside of a step.
#define TRAINOPS_EMA_COLUMNS(column) column(kEMAAverage, "average", kWritten) column(kEMATensor, "tensor", kRead)
enum EMAColumn : int { TRAINOPS_EMA_COLUMNS(TRAINOPS_ENUMERATOR) };

// A table on a device is 64-bit words. A row is these words, then one address per column. `dtypes` holds the
// type of each column, and the last words are its places (table.h).
#define TRAINOPS_ROW_WORDS(word)                                                                                   \
  word(kNumel, "numel") word(kFirstChunk, "first_chunk") word(kGroup, "group") word(kDTypes, "dtypes")             \
      word(kFirstPlace, "first_place") word(kAveragePlace, "average_place") word(kAveragePlace2, "average_place2") \
          word(kAveragePlace3, "average_place3") word(kAveragePlace4, "average_place4") word(kOrigin, "origin")
enum RowWord : int { TRAINOPS_ROW_WORDS(TRAINOPS_ENUMERATOR) kAddresses };

// A chunk of a table (device_words.h) is its row, and its first element there.
#define TRAINOPS_CHUNK_WORDS(word) word(kChunkRow, "row") word(kChunkBegin, "begin")
enum ChunkWord : int { TRAINOPS_CHUNK_WORDS(TRAINOPS_ENUMERATOR) kChunkWords };

// A step's settings on a device are these words, then those of each setting of each group. The form of a setting says
// what its value is: a double, or the address of a float or of a double on the device. The largest norm is a setting.
// The seeds are those of parameters and of averages that are rounded stochastically.
#define TRAINOPS_STEP_WORDS(word)                                                                                  \
  word(kMaxNorm, "max_norm") word(kMaxNormValue, "max_norm_value") word(kEMADecay, "ema_decay")                    \
      word(kEMADecay2, "ema_decay2") word(kEMADecay3, "ema_decay3") word(kEMADecay4, "ema_decay4")                 \
          word(kSeed, "seed") word(kEMASeed, "ema_seed") word(kEMASeed2, "ema_seed2") word(kEMASeed3, "ema_seed3") \
              word(kEMASeed4, "ema_seed4")
#define TRAINOPS_SETTING_WORDS(word) word(kForm, "form") word(kValue, "value")
#define TRAINOPS_SETTING_FORMS(word) \
  word(kDouble, "double") word(kFloatAddress, "float_address") word(kDoubleAddress, "double_address")
enum StepWord : int { TRAINOPS_STEP_WORDS(TRAINOPS_ENUMERATOR) kGroups };
enum SettingWord : int { TRAINOPS_SETTING_WORDS(TRAINOPS_ENUMERATOR) kSettingWords };
enum SettingForm : int64_t { TRAINOPS_SETTING_FORMS(TRAINOPS_ENUMERATOR) };
static_assert(kMaxNormValue - kMaxNorm == kValue - kForm, "the largest norm has the words of a setting");
static_assert(kSeed - kEMADecay == kMaxAverages && kGroups - kEMASeed == kMaxAverages, "each average has these");

struct Schema {
  std::string name;
  std::vector<Column> columns;
  std::vector<const char*> settings;  // of a rule
  int measured;                       // the column whose norm is taken; of no use for `ema` and `transform`
  size_t averages = 1;                // of a rule: how many a row may have

  size_t first_further() const { return columns.size() - (averages - 1); }
  size_t column_of_average(size_t i) const { return i == 0 ? kAverage : first_further() + i - 1; }
};

template <typename Rule>
Schema schema_of_rule(const char* name) {
  static_assert(kState + Rule::kStates + kFurtherAverages <= kMaxColumns, "the types of a row fit into one word");
  Schema schema{name, {TRAINOPS_STEP_COLUMNS(TRAINOPS_COLUMN)}, {}, kGrad};
  schema.columns.insert(schema.columns.end(), std::begin(Rule::state), std::end(Rule::state));
  schema.settings.assign(std::begin(Rule::setting_names), std::end(Rule::setting_names));
  return schema;
}

}  // namespace trainops
