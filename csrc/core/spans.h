// Where the parameters of a table lie in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "schema.h"
#include "table.h"

namespace trainops {

class ParamSpans {
 public:
  explicit ParamSpans(const Table& table) {
    spans_.reserve(table.rows());
    for (int64_t row = 0; row < table.rows(); ++row) {
      const Cell& cell = table.cell(row, kParam);
      const auto begin = reinterpret_cast<uintptr_t>(cell.address);
      if (table.numel(row) > 0) spans_.emplace_back(begin, begin + itemsize(cell.dtype) * table.numel(row));
    }
    std::sort(spans_.begin(), spans_.end());
  }

  // Whether a parameter is there twice, or shares elements with another one.
  bool overlap() const {
    const auto meet = [](const auto& span, const auto& next) { return next.first < span.second; };
    return std::adjacent_find(spans_.begin(), spans_.end(), meet) != spans_.end();
  }

  // Whether a parameter has some of these bytes, where none overlap.
  bool touch(const void* address, int64_t bytes) const {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    const auto ends_before = [](const auto& span, uintptr_t place) { return span.second <= place; };
    const auto next = std::lower_bound(spans_.begin(), spans_.end(), begin, ends_before);
    return next != spans_.end() && next->first < begin + bytes;
  }

 private:
  std::vector<std::pair<uintptr_t, uintptr_t>> spans_;  // from the first byte to behind the last, in this order
};

}  // namespace trainops
