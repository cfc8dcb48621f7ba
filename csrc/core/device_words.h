// A Table as 64-bit words for the memory of a device (the words of a row: schema.h).
//
// A chunk is up to `chunk_numel` elements of one row, the unit of a block's or program's work. A row without elements
// has one empty chunk.
//
// Kernels for which types are data (CUDA) take the chunks in the order of the rows. Others are compiled for a
// combination of types (Triton): for them, rows of one combination form a section, whose chunks follow each other.
#pragma once

#include <cstdint>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "schema.h"
#include "table.h"

namespace trainops {

using Words = std::vector<int64_t>;

inline int64_t chunks_of_row(int64_t numel, int64_t chunk_numel) {
  return numel == 0 ? 1 : (numel + chunk_numel - 1) / chunk_numel;
}

// Consecutive chunks of rows that have the same types, column by column.
struct Section {
  std::vector<DType> kind;
  int64_t first_chunk, chunk_count;
};

class DeviceWords {
 public:
  // `group_rows`: how many rows each group has.
  DeviceWords(const Table& table, const std::vector<int64_t>& group_rows, int64_t chunk_numel, bool by_kind)
      : table_(table),
        group_rows_(group_rows),
        chunk_numel_(chunk_numel),
        first_chunks_(table.rows()),
        positions_(table.rows()) {
    for (int64_t row = 1; row < table.rows(); ++row) {
      first_chunks_[row] = first_chunks_[row - 1] + chunks_of_row(table.numel(row - 1), chunk_numel);
    }
    std::vector<int64_t> all(table.rows());
    std::iota(all.begin(), all.end(), 0);
    if (by_kind) {
      split(all);
    } else {
      add_section({}, std::move(all));
    }
  }

  int64_t chunk_count() const { return chunk_count_; }
  const std::vector<Section>& sections() const { return sections_; }

  // All that the chunks depend on.
  Words layout() const {
    Words words;
    words.reserve(2 * table_.rows() + 1);
    words.push_back(chunk_numel_);
    for (int64_t row = 0; row < table_.rows(); ++row) {
      words.push_back(table_.numel(row));
      words.push_back(positions_[row]);
    }
    return words;
  }

  Words rows() const {
    Words words;
    words.reserve(table_.rows() * (kAddresses + table_.columns()));
    int64_t row = 0;
    for (size_t group = 0; group < group_rows_.size(); ++group) {
      for (const int64_t end = row + group_rows_[group]; row < end; ++row) add_row(words, row, group);
    }
    return words;
  }

  Words chunks() const {
    Words words;
    words.reserve(kChunkWords * chunk_count_);
    for (const std::vector<int64_t>& members : members_) {
      for (const int64_t row : members) {
        const int64_t count = chunks_of_row(table_.numel(row), chunk_numel_);
        for (int64_t i = 0; i < count; ++i) {
          const size_t begin = words.size();
          words.resize(begin + kChunkWords);
          words[begin + kChunkRow] = row;
          words[begin + kChunkBegin] = i * chunk_numel_;
        }
      }
    }
    return words;
  }

 private:
  std::vector<DType> kind_of(int64_t row) const {
    std::vector<DType> kind(table_.columns());
    for (int64_t column = 0; column < table_.columns(); ++column) kind[column] = table_.cell(row, column).dtype;
    return kind;
  }

  // Sections in the order of their first rows.
  void split(const std::vector<int64_t>& rows) {
    std::map<std::vector<DType>, size_t> known;
    std::vector<std::pair<std::vector<DType>, std::vector<int64_t>>> found;
    for (const int64_t row : rows) {
      std::vector<DType> kind = kind_of(row);
      const auto [entry, is_new] = known.try_emplace(kind, found.size());
      if (is_new) found.emplace_back(std::move(kind), std::vector<int64_t>{});
      found[entry->second].second.push_back(row);
    }
    for (auto& [kind, members] : found) add_section(std::move(kind), std::move(members));
  }

  void add_section(std::vector<DType> kind, std::vector<int64_t> members) {
    const int64_t first = chunk_count_;
    for (const int64_t row : members) {
      positions_[row] = chunk_count_;
      chunk_count_ += chunks_of_row(table_.numel(row), chunk_numel_);
    }
    sections_.push_back({std::move(kind), first, chunk_count_ - first});
    members_.push_back(std::move(members));
  }

  void add_row(Words& words, int64_t row, int64_t group) const {
    int64_t dtypes = 0;
    for (int64_t column = 0; column < table_.columns(); ++column) {
      dtypes |= dtype_bits(table_.cell(row, column).dtype, column);
    }
    const size_t begin = words.size();
    words.resize(begin + kAddresses);
    words[begin + kNumel] = table_.numel(row);
    words[begin + kFirstChunk] = first_chunks_[row];
    words[begin + kGroup] = group;
    words[begin + kDTypes] = dtypes;
    for (int64_t column = 0; column < table_.columns(); ++column) {
      words.push_back(reinterpret_cast<intptr_t>(table_.cell(row, column).address));
    }
  }

  const Table& table_;
  const std::vector<int64_t>& group_rows_;
  int64_t chunk_numel_, chunk_count_ = 0;
  std::vector<int64_t> first_chunks_;  // of each row, counted in the order of the rows
  std::vector<int64_t> positions_;     // of each row's first chunk in chunks()
  std::vector<Section> sections_;
  std::vector<std::vector<int64_t>> members_;
};

}  // namespace trainops
