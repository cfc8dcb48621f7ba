// AdamW with clipping, unscaling and EMA in one pass: the formulas are in math/adamw.h and math/ema.h.
// Reads grad, reads and writes param, exp_avg, exp_avg_sq (28 bytes per float32 element), max_exp_avg_sq with
// AMSGrad (8 more) and ema where there is one (8 more). Arithmetic in float32, or float64 for float64 parameters.
#include "convert.h"
#include "ema.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

template <bool amsgrad, typename T>
TRAINOPS_HOST_DEVICE void update(T* __restrict param, const T* __restrict grad, T* __restrict exp_avg,
                                 T* __restrict exp_avg_sq, T* __restrict max_exp_avg_sq, int64_t size,
                                 const AdamWScalars<T> s) {
  for (int64_t i = 0; i < size; ++i) {
    T largest = amsgrad ? max_exp_avg_sq[i] : T(0);
    adamw_element<amsgrad>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], &largest, s);
    if (amsgrad) max_exp_avg_sq[i] = largest;
  }
}

#define TRAINOPS_ADAMW(T)                                                                                        \
  TRAINOPS_MULTIVERSION void adamw_tile(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t size,        \
                                        const AdamWScalars<T>& s) {                                              \
    update<false, T>(param, grad, exp_avg, exp_avg_sq, nullptr, size, s);                                        \
  }                                                                                                              \
  TRAINOPS_MULTIVERSION void amsgrad_tile(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq, \
                                          int64_t size, const AdamWScalars<T>& s) {                              \
    update<true>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, size, s);                                     \
  }
TRAINOPS_ADAMW(float)
TRAINOPS_ADAMW(double)
#undef TRAINOPS_ADAMW

// The average follows the parameter as it was stored, so that a fused step and a step followed by an update of
// the average give the same bits.
template <typename T>
void adamw_piece(const TensorTable& table, const Piece& piece, const AdamWScalars<T>& scalars, double ema_decay) {
  const auto cell = [&](AdamWColumn column) -> const Cell& { return table.cell(piece.row, column); };
  const bool amsgrad = cell(kMaxExpAvgSq).address != nullptr;
  const bool average = cell(kEMA).address != nullptr;
  T buffers[kAdamWColumns][kTileNumel];
  for_each_tile(piece, [&](int64_t begin, int64_t size) {
    const auto read = [&](AdamWColumn column) { return load(cell(column), begin, size, buffers[column]); };
    T* param = read(kParam);
    T* exp_avg = read(kExpAvg);
    T* exp_avg_sq = read(kExpAvgSq);
    if (amsgrad) {
      T* max_exp_avg_sq = read(kMaxExpAvgSq);
      amsgrad_tile(param, read(kGrad), exp_avg, exp_avg_sq, max_exp_avg_sq, size, scalars);
      store(cell(kMaxExpAvgSq), begin, size, max_exp_avg_sq);
    } else {
      adamw_tile(param, read(kGrad), exp_avg, exp_avg_sq, size, scalars);
    }
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
    if (table.cell(piece.row, kParam).dtype == DType::float64) {
      adamw_piece<double>(table, piece, s, ema_decay);
    } else {
      adamw_piece<float>(table, piece, AdamWScalars<float>(s), ema_decay);
    }
  });
}

}  // namespace trainops::cpu
