// A step of any rule (math/adamw.h), with unscaling and clipping as a factor, and the averages (math/ema.h), in one
// pass: every column is read and, where it is written, written once. With AdamW in float32, that is 28 bytes per
// element, 8 more with AMSGrad and 8 more with each average; 26 with an average, where bfloat16 weights have a split
// master (math/storage.h) and bfloat16 moments. Arithmetic in float32, or float64 for float64 parameters.
#include <algorithm>
#include <cstring>

#include "../core/rules.h"
#include "../math/rule.h"
#include "elements.h"
#include "ema.h"
#include "kernels.h"
#include "row.h"

namespace trainops::cpu {
namespace {

// Applies a formula that takes the columns of state `i...`.
template <typename Isa, typename Formula, typename Weights, typename G, typename M, typename Scalars, size_t... i>
TRAINOPS_HOST_DEVICE void apply(Formula formula, Weights weights, const G* grad, M const* state, int64_t size,
                                const Scalars& s, std::index_sequence<i...>) {
  using T = Wide<G>;
  const auto element = [&](T& weight, T g, auto&... values) TRAINOPS_INLINE {
    T own[kLength<sizeof...(i)>] = {values...};
    formula(weight, g, own, s);
    ((values = own[i]), ...);
  };
  for_each_element<Isa>(size, element, weights, grad, state[i]...);
}

template <typename Isa, typename Rule, typename Weights, typename G, typename M>
TRAINOPS_HOST_DEVICE void update_run(Weights weights, const G* grad, M const* state, int states, int64_t size,
                                     const typename Rule::template Scalars<Wide<G>> s) {
  Rule::template with_formula<true>(states, s, [&](auto formula) TRAINOPS_INLINE {
    apply<Isa>(formula, weights, grad, state, size, s, std::make_index_sequence<decltype(formula)::states>{});
  });
}

// Expands macro(weights, gradient, state, Rule) for the columns that have loops of their own. CONTRIBUTING.md says
// which.
#define TRAINOPS_SAME_TYPE(dtype, S, macro, Rule) macro(S*, S, S*, Rule)
#define TRAINOPS_LOOPS(macro, Rule)                                                                \
  TRAINOPS_DTYPES(TRAINOPS_SAME_TYPE, macro, Rule)                                                 \
  macro(float*, float, BFloat16*, Rule) macro(SplitWeights, BFloat16, BFloat16*, Rule)             \
      macro(SplitWeights, BFloat16, float*, Rule) macro(SplitWeights, BFloat16, CodesColumn, Rule) \
          macro(StochasticColumn, BFloat16, BFloat16*, Rule)

// One named function for each, because only those can be compiled for several instruction sets.
#define TRAINOPS_UPDATE_FOR(Isa, target, Weights, G, M, Rule)                                             \
  target void update_tile(Rule, Weights weights, const G* grad, M const* state, int states, int64_t size, \
                          const Rule::Scalars<Wide<G>>& s) {                                              \
    update_run<Isa, Rule>(weights, grad, state, states, size, s);                                         \
  }
#define TRAINOPS_UPDATE(Weights, G, M, Rule) TRAINOPS_VERSIONS(TRAINOPS_UPDATE_FOR, Weights, G, M, Rule)
#define TRAINOPS_UPDATE_ALL(Rule, name) TRAINOPS_LOOPS(TRAINOPS_UPDATE, Rule)
TRAINOPS_RULES(TRAINOPS_UPDATE_ALL)
#undef TRAINOPS_UPDATE_ALL
#undef TRAINOPS_UPDATE
#undef TRAINOPS_UPDATE_FOR
#undef TRAINOPS_LOOPS
#undef TRAINOPS_SAME_TYPE

// The columns of a loop. Those of other types go through tiles: of float, or of double.
template <typename W, typename G, typename M>
struct Loop {
  using Weights = W;
  using Grad = G;
  using State = M;
};

// Calls function(loop) with the loop for a row.
template <typename Rule, typename Function>
void with_loop(const Row<Rule>& row, Function function) {
  const Weight& weight = row.weight;
  const bool is_bfloat16 = row.states > 0 && row.has_states_of(DType::bfloat16);
  if (weight.is_split() && row.grad.dtype == DType::bfloat16) {
    if (is_bfloat16) return function(Loop<SplitWeights, BFloat16, BFloat16*>{});
    if (row.has_codes_alone()) return function(Loop<SplitWeights, BFloat16, CodesColumn>{});
    return function(Loop<SplitWeights, BFloat16, float*>{});
  }
  if (weight.param.dtype == DType::stochastic && row.grad.dtype == DType::bfloat16 &&
      row.has_states_of(DType::bfloat16)) {
    return function(Loop<StochasticColumn, BFloat16, BFloat16*>{});
  }
  if (weight.param.dtype == DType::float32 && row.grad.dtype == DType::float32 && is_bfloat16) {
    return function(Loop<float*, float, BFloat16*>{});
  }
  Cell cells[3 + Rule::kStates] = {weight.param, weight.master, row.grad};
  std::copy(row.state, row.state + row.states, cells + 3);
  with_type(cells, cells + 3 + row.states, [&](auto type) {
    using S = decltype(type);
    function(Loop<S*, S, S*>{});
  });
}

// The averages follow the weight as it was stored, so that a fused step and a step followed by an update of the
// average give the same bits.
template <typename Rule>
void move_averages(const Row<Rule>& row, int64_t begin, int64_t size, const std::vector<double>& ema_decays) {
  for (int i = 0; i < row.averages; ++i) {
    if (row.average[i].dtype != DType::none) ema_tile(row.average[i], row.weight, begin, size, ema_decays[i]);
  }
}

template <typename Rule, typename Its>
void update_piece(const Row<Rule>& row, const Piece& piece, const typename Rule::template Scalars<double>& wide,
                  const std::vector<double>& ema_decays) {
  using G = typename Its::Grad;
  using Weights = typename Its::Weights;
  constexpr bool in_place = !std::is_pointer_v<Weights>;
  const auto scalars = rounded<Rule, Wide<G>>(wide);
  State<Rule, typename Its::State> state;
  G weight_buffer[kTileNumel], grad_buffer[kTileNumel];
  for_each_tile(piece, [&](int64_t begin, int64_t size) {
    const auto weights = [&] {
      if constexpr (std::is_same_v<Weights, SplitWeights>) {
        return split_weights(row.weight, begin);
      } else if constexpr (in_place) {
        return stochastic_column(row.weight.param, begin);
      } else {
        return load(row.weight, begin, size, weight_buffer);
      }
    }();
    state.load(row, begin, size);
    const G* const grad = load(row.grad, begin, size, grad_buffer);
    update_tile(Rule{}, weights, grad, state.columns, row.states, size, scalars);
    state.store(row, begin, size);
    if constexpr (!in_place) store(row.weight, begin, size, weights);
    move_averages(row, begin, size, ema_decays);
  });
}

// The averages of a buffer.
template <typename Rule>
void follow_piece(const Row<Rule>& row, const Piece& piece, const std::vector<double>& ema_decays) {
  const Cell& buffer = row.weight.param;
  if (buffer.dtype != DType::byte) {
    return for_each_tile(piece, [&](int64_t begin, int64_t size) { move_averages(row, begin, size, ema_decays); });
  }
  for (int i = 0; i < row.averages; ++i) {
    auto* const copy = static_cast<char*>(row.average[i].address);
    if (copy != nullptr)
      std::memcpy(copy + piece.begin, static_cast<char*>(buffer.address) + piece.begin, piece.size);
  }
}

template <typename Rule>
void update_table(const Table& table, const Chunks& chunks, const GroupSettings& groups, double grad_coefficient,
                  const std::vector<double>& ema_decays, const Seeds& seeds) {
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
    const Row<Rule> row(table, piece.row, seeds);
    with_loop(row, [&](auto loop) { update_piece<Rule, decltype(loop)>(row, piece, s, ema_decays); });
  });
  Chunks(table, table.rows(), table.all_rows()).for_each_piece(Order::kForward, [&](int64_t, const Piece& piece) {
    follow_piece(Row<Rule>(table, piece.row, seeds), piece, ema_decays);
  });
}

}  // namespace

void update(const std::string& rule, const Table& table, const Chunks& chunks, const GroupSettings& groups,
            double grad_coefficient, const std::vector<double>& ema_decays, const Seeds& seeds) {
  with_rule(rule, [&](auto its) {
    update_table<decltype(its)>(table, chunks, groups, grad_coefficient, ema_decays, seeds);
  });
}

}  // namespace trainops::cpu
