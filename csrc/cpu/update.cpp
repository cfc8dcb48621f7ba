// A step of any rule (math/adamw.h), with unscaling and clipping as a factor, and the average (math/ema.h), in one
// pass: every column is read and, where it is written, written once. With AdamW in float32, that is 28 bytes per
// element, 8 more with AMSGrad and 8 more with an average. Arithmetic in float32, or float64 for float64 parameters.
#include <algorithm>

#include "../core/rules.h"
#include "../math/rule.h"
#include "convert.h"
#include "elements.h"
#include "ema.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

// Applies a formula that takes the columns of state `i...`.
template <typename Formula, typename S, typename Scalars, size_t... i>
TRAINOPS_HOST_DEVICE void apply(Formula formula, S* param, const S* grad, S* const* state, int64_t size,
                                const Scalars& s, std::index_sequence<i...>) {
  using T = Wide<S>;
  const auto element = [&](T& p, T g, auto&... values) TRAINOPS_INLINE {
    T own[kLength<sizeof...(i)>] = {values...};
    formula(p, g, own, s);
    ((values = own[i]), ...);
  };
  for_each_element(size, element, param, grad, state[i]...);
}

template <typename Rule, typename S>
TRAINOPS_HOST_DEVICE void update_run(S* param, const S* grad, S* const* state, int states, int64_t size,
                                     const typename Rule::template Scalars<Wide<S>> s) {
  Rule::template with_formula<true>(states, s, [&](auto formula) TRAINOPS_INLINE {
    apply(formula, param, grad, state, size, s, std::make_index_sequence<decltype(formula)::states>{});
  });
}

// One named function for each rule and type, because only those can be compiled for several instruction sets.
#define TRAINOPS_UPDATE(dtype, S, Rule)                                                                            \
  TRAINOPS_MULTIVERSION void update_tile(Rule, S* param, const S* grad, S* const* state, int states, int64_t size, \
                                         const Rule::Scalars<Wide<S>>& s) {                                        \
    update_run<Rule>(param, grad, state, states, size, s);                                                         \
  }
#define TRAINOPS_UPDATE_ALL(Rule, name) TRAINOPS_DTYPES(TRAINOPS_UPDATE, Rule)
TRAINOPS_RULES(TRAINOPS_UPDATE_ALL)
#undef TRAINOPS_UPDATE_ALL
#undef TRAINOPS_UPDATE

// The number of state columns that a row has. Optional ones are last.
template <typename Rule>
int states_of(const Table& table, int64_t row) {
  int states = 0;
  while (states < Rule::kStates && table.cell(row, kState + states).dtype != DType::none) ++states;
  return states;
}

// The average follows the parameter as it was stored, so that a fused step and a step followed by an update of
// the average give the same bits.
template <typename Rule, typename S>
void update_piece(const Table& table, const Piece& piece, int states,
                  const typename Rule::template Scalars<double>& wide, double ema_decay) {
  const auto scalars = rounded<Rule, Wide<S>>(wide);
  const auto cell = [&](int column) -> const Cell& { return table.cell(piece.row, column); };
  S buffers[kState + Rule::kStates][kTileNumel];
  for_each_tile(piece, [&](int64_t begin, int64_t size) {
    const auto read = [&](int column) { return load(cell(column), begin, size, buffers[column]); };
    S* const param = read(kParam);
    S* state[kLength<Rule::kStates>];
    for (int i = 0; i < states; ++i) state[i] = read(kState + i);
    update_tile(Rule{}, param, read(kGrad), state, states, size, scalars);
    for (int i = 0; i < states; ++i) store(cell(kState + i), begin, size, state[i]);
    store(cell(kParam), begin, size, param);
    if (cell(kAverage).dtype != DType::none) ema_tile(cell(kAverage), cell(kParam), begin, size, ema_decay);
  });
}

template <typename Rule>
void update_table(const Table& table, const Chunks& chunks, const GroupSettings& groups, double grad_coefficient,
                  double ema_decay) {
  // Consecutive rows of a group nearly always share their step count, and with it two powers and a root.
  std::vector<typename Rule::template Scalars<double>> scalars;
  std::vector<size_t> scalars_of_row;
  double last_step = 0.0;
  for (size_t group = 0; group < groups.rows.size(); ++group) {
    const auto settings = settings_from<Rule>(groups.numbers[group].data());
    for (int64_t i = 0; i < groups.rows[group]; ++i) {
      const auto row = static_cast<int64_t>(scalars_of_row.size());
      const double step = *static_cast<float*>(table.cell(row, kStep).address) += 1.0f;
      if (i == 0 || step != last_step) scalars.push_back(Rule::scalars(settings, step, grad_coefficient));
      last_step = step;
      scalars_of_row.push_back(scalars.size() - 1);
    }
  }

  chunks.for_each_piece(Order::kBackward, [&](int64_t, const Piece& piece) {
    const auto& s = scalars[scalars_of_row[piece.row]];
    const int states = states_of<Rule>(table, piece.row);
    Cell cells[2 + Rule::kStates] = {table.cell(piece.row, kParam), table.cell(piece.row, kGrad)};
    for (int i = 0; i < states; ++i) cells[2 + i] = table.cell(piece.row, kState + i);
    with_type(cells, cells + 2 + states,
              [&](auto type) { update_piece<Rule, decltype(type)>(table, piece, states, s, ema_decay); });
  });
}

}  // namespace

void update(const std::string& rule, const Table& table, const Chunks& chunks, const GroupSettings& groups,
            double grad_coefficient, double ema_decay) {
  with_rule(rule, [&](auto its) { update_table<decltype(its)>(table, chunks, groups, grad_coefficient, ema_decay); });
}

}  // namespace trainops::cpu
