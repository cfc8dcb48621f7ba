// AdamW with clipping, unscaling and EMA in one pass: the formulas are in math/adamw.h and math/ema.h.
// Reads grad, reads and writes param, exp_avg, exp_avg_sq (28 bytes per float32 element), max_exp_avg_sq with
// AMSGrad (8 more) and ema where there is one (8 more). Arithmetic in float32, or float64 for float64 parameters.
#include "convert.h"
#include "elements.h"
#include "ema.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

// `max_exp_avg_sq` is null without AMSGrad.
template <typename S, typename T = Wide<S>>
TRAINOPS_HOST_DEVICE void update(S* param, const S* grad, S* exp_avg, S* exp_avg_sq, S* max_exp_avg_sq, int64_t size,
                                 const AdamWScalars<T> s) {
  const auto plain = [&](T& p, T g, T& m, T& v)
                         TRAINOPS_INLINE { adamw_element<false, false, T>(p, g, m, v, nullptr, s); };
  const auto small = [&](T& p, T g, T& m, T& v)
                         TRAINOPS_INLINE { adamw_element<false, true, T>(p, g, m, v, nullptr, s); };
  const auto amsgrad = [&](T& p, T g, T& m, T& v, T& v_max)
                           TRAINOPS_INLINE { adamw_element<true>(p, g, m, v, &v_max, s); };
  if (max_exp_avg_sq != nullptr) {
    for_each_element(size, amsgrad, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq);
  } else if (s.small()) {
    for_each_element(size, small, param, grad, exp_avg, exp_avg_sq);
  } else {
    for_each_element(size, plain, param, grad, exp_avg, exp_avg_sq);
  }
}

#define TRAINOPS_ADAMW(S)                                                                                      \
  TRAINOPS_MULTIVERSION void adamw_tile(S* param, const S* grad, S* exp_avg, S* exp_avg_sq, S* max_exp_avg_sq, \
                                        int64_t size, const AdamWScalars<Wide<S>>& s) {                        \
    update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, size, s);                                         \
  }
TRAINOPS_ADAMW(float)
TRAINOPS_ADAMW(double)
TRAINOPS_ADAMW(BFloat16)
TRAINOPS_ADAMW(Float16)
#undef TRAINOPS_ADAMW

// The average follows the parameter as it was stored, so that a fused step and a step followed by an update of
// the average give the same bits.
template <typename S>
void adamw_piece(const TensorTable& table, const Piece& piece, const AdamWScalars<double>& s, double ema_decay) {
  const AdamWScalars<Wide<S>> scalars(s);
  const auto cell = [&](AdamWColumn column) -> const Cell& { return table.cell(piece.row, column); };
  const bool amsgrad = cell(kMaxExpAvgSq).address != nullptr;
  const bool average = cell(kEMA).address != nullptr;
  S buffers[kAdamWColumns][kTileNumel];
  for_each_tile(piece, [&](int64_t begin, int64_t size) {
    const auto read = [&](AdamWColumn column) { return load(cell(column), begin, size, buffers[column]); };
    S* param = read(kParam);
    S* exp_avg = read(kExpAvg);
    S* exp_avg_sq = read(kExpAvgSq);
    S* max_exp_avg_sq = amsgrad ? read(kMaxExpAvgSq) : nullptr;
    adamw_tile(param, read(kGrad), exp_avg, exp_avg_sq, max_exp_avg_sq, size, scalars);
    if (amsgrad) store(cell(kMaxExpAvgSq), begin, size, max_exp_avg_sq);
    store(cell(kExpAvg), begin, size, exp_avg);
    store(cell(kExpAvgSq), begin, size, exp_avg_sq);
    store(cell(kParam), begin, size, param);
    if (average) ema_tile(cell(kEMA), cell(kParam), begin, size, ema_decay);
  });
}

}  // namespace

void adamw(const TensorTable& table, const std::vector<AdamWGroup>& groups, double grad_coefficient,
           double ema_decay) {
  // Consecutive rows of a group nearly always share their step count, and with it two powers and a root.
  std::vector<AdamWScalars<double>> scalars;
  std::vector<size_t> scalars_of_row;
  double last_step = 0.0;
  for (const AdamWGroup& group : groups) {
    for (int64_t i = 0; i < group.rows; ++i) {
      const int64_t row = static_cast<int64_t>(scalars_of_row.size());
      const double step = *static_cast<float*>(table.cell(row, kStep).address) += 1.0f;
      if (i == 0 || step != last_step) scalars.emplace_back(group.settings, step, grad_coefficient);
      last_step = step;
      scalars_of_row.push_back(scalars.size() - 1);
    }
  }

  for_each_piece(table, [&](int64_t, const Piece& piece) {
    const AdamWScalars<double>& s = scalars[scalars_of_row[piece.row]];
    const auto cell = [&](AdamWColumn column) { return table.cell(piece.row, column); };
    with_type({cell(kParam), cell(kGrad), cell(kExpAvg), cell(kExpAvgSq), cell(kMaxExpAvgSq)},
              [&](auto type) { adamw_piece<decltype(type)>(table, piece, s, ema_decay); });
  });
}

}  // namespace trainops::cpu
