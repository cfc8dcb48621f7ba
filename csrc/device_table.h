// A TensorTable as words for the memory of a device: trainops/device_table.py describes them.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor_table.h"

namespace trainops {

using Words = std::vector<int64_t>;

// A row without elements has one chunk, too.
inline int64_t chunks_of_row(int64_t numel, int64_t chunk_numel) {
  return numel == 0 ? 1 : (numel + chunk_numel - 1) / chunk_numel;
}

inline int64_t count_chunks(const TensorTable& table, int64_t chunk_numel) {
  int64_t chunks = 0;
  for (int64_t row = 0; row < table.rows(); ++row) chunks += chunks_of_row(table.numel(row), chunk_numel);
  return chunks;
}

inline Words numel_words(const TensorTable& table) {
  Words words(table.rows());
  for (int64_t row = 0; row < table.rows(); ++row) words[row] = table.numel(row);
  return words;
}

// Number of elements, first chunk, group, dtypes, addresses. `group_rows`: how many rows each group has.
inline Words row_words(const TensorTable& table, const std::vector<int64_t>& group_rows, int64_t chunk_numel) {
  Words words;
  words.reserve(table.rows() * (4 + table.columns()));
  int64_t row = 0, chunk = 0;
  for (size_t group = 0; group < group_rows.size(); ++group) {
    for (const int64_t last = row + group_rows[group]; row < last; ++row) {
      int64_t dtypes = 0;
      for (int64_t column = 0; column < table.columns(); ++column) {
        dtypes |= static_cast<int64_t>(table.cell(row, column).dtype) << (4 * column);
      }
      words.insert(words.end(), {table.numel(row), chunk, static_cast<int64_t>(group), dtypes});
      for (int64_t column = 0; column < table.columns(); ++column) {
        words.push_back(reinterpret_cast<intptr_t>(table.cell(row, column).address));
      }
      chunk += chunks_of_row(table.numel(row), chunk_numel);
    }
  }
  return words;
}

// Row and first element of every chunk.
inline Words chunk_words(const TensorTable& table, int64_t chunk_numel) {
  Words words;
  words.reserve(2 * count_chunks(table, chunk_numel));
  for (int64_t row = 0; row < table.rows(); ++row) {
    for (int64_t i = 0; i < chunks_of_row(table.numel(row), chunk_numel); ++i) {
      words.insert(words.end(), {row, i * chunk_numel});
    }
  }
  return words;
}

}  // namespace trainops
