// The columns of a row, as a step of a rule takes them.
#pragma once

#include <algorithm>

#include "../core/rules.h"
#include "codes.h"
#include "convert.h"

namespace trainops::cpu {

// The number of state columns that a row has. Optional ones are last.
template <typename Rule>
int states_of(const Table& table, int64_t row) {
  int states = 0;
  while (states < Rule::kStates && table.cell(row, kState + states).dtype != DType::none) ++states;
  return states;
}

// The cells of a row.
template <typename Rule>
struct Row {
  Weight weight;
  Cell grad, average[kMaxAverages], state[kLength<Rule::kStates>];
  int averages, states;
  bool has_codes = false;  // among the state

  // Its step count is that of this step.
  Row(const Table& table, int64_t row, const Seeds& seeds)
      : weight{table.cell(row, kParam), table.cell(row, kMaster)},
        grad(table.cell(row, kGrad)),
        averages(averages_in<Rule>(table.columns())),
        states(states_of<Rule>(table, row)) {
    for (int i = 0; i < averages; ++i) average[i] = table.cell(row, column_of_average<Rule>(i));
    for (int i = 0; i < states; ++i) state[i] = table.cell(row, kState + i);
    const Places& places = table.places(row);
    const auto origin = static_cast<uint32_t>(places.origin);
    if (places.first >= 0) {
      const float step = *static_cast<const float*>(table.cell(row, kStep).address);
      weight.param.random = {random_key(seeds.params, places.first, step), origin};
    }
    for (int i = 0; i < states; ++i) {
      has_codes |= is_codes(state[i].dtype);
      state[i].scales = static_cast<uint8_t*>(state[i].address) + table.numel(row);
    }
    for (int i = 0; i < averages; ++i)
      average[i].random = {random_key(seeds.averages[i], places.averages[i]), origin};
  }

  bool has_states_of(DType dtype) const {
    return std::all_of(state, state + states, [&](const Cell& cell) { return cell.dtype == dtype; });
  }
  bool has_codes_alone() const {
    return states > 0 && std::all_of(state, state + states, [](const Cell& cell) { return is_codes(cell.dtype); });
  }
};

// The state of a tile: its columns where they lie, or the buffers through which they go.
template <typename Rule, typename Column>
class State {
  using M = std::remove_pointer_t<Column>;

 public:
  void load(const Row<Rule>& row, int64_t begin, int64_t size) {
    for (int i = 0; i < row.states; ++i) columns[i] = cpu::load(row.state[i], begin, size, buffers_[i]);
  }

  void store(const Row<Rule>& row, int64_t begin, int64_t size) {
    if (may_have_codes && row.has_codes) random_words(random_of_codes(row.weight.param.random), begin, size, words_);
    for (int i = 0; i < row.states; ++i) {
      if constexpr (may_have_codes) {
        if (is_codes(row.state[i].dtype)) {
          write_codes(row.state[i], begin, size, columns[i], words_);
          continue;
        }
      }
      cpu::store(row.state[i], begin, size, columns[i]);
    }
  }

  Column columns[kLength<Rule::kStates>];

 private:
  static constexpr bool may_have_codes = std::is_same_v<M, float>;
  M buffers_[kLength<Rule::kStates>][kTileNumel];
  uint32_t words_[may_have_codes ? kTileNumel / 2 : 1];
};

// State that is codes alone.
template <typename Rule>
class State<Rule, CodesColumn> {
 public:
  void load(const Row<Rule>& row, int64_t begin, int64_t size) {
    for (int i = 0; i < row.states; ++i) {
      read_codes(row.state[i], begin, size, before_[i]);
      columns[i] = {before_[i], even_[i], odd_[i]};
    }
  }

  void store(const Row<Rule>& row, int64_t begin, int64_t size) {
    random_words(random_of_codes(row.weight.param.random), begin, size, words_);
    for (int i = 0; i < row.states; ++i) write_codes(row.state[i], begin, size, even_[i], odd_[i], words_);
  }

  CodesColumn columns[kLength<Rule::kStates>];

 private:
  BFloat16 before_[kLength<Rule::kStates>][kTileNumel];
  float even_[kLength<Rule::kStates>][kTileNumel / 2], odd_[kLength<Rule::kStates>][kTileNumel / 2];
  uint32_t words_[kTileNumel / 2];
};

}  // namespace trainops::cpu
