// A Table as 64-bit words for the memory of a device (the words of a row: schema.h).
//
// A chunk is up to `chunk_numel` elements of one row, the unit of a block's or program's work. A row without elements
// has one empty chunk. Chunks have numbers, in which those of a row follow each other.
//
// Kernels for which types are data (CUDA) draw chunks from a queue. The whole ones are listed first, by their number;
// then the others, the largest first, so that the last blocks end at nearly the same time.
//
// Chunks of buffers (schema.h) come after all others.
//
// Other kernels are compiled for a combination of types (Triton): for them, rows of one combination form a section,
// whose chunks follow each other. They are listed by their number.
#pragma once

#include <algorithm>
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

// Chunks of `chunk_numel` elements: these are the first in the list for a queue.
inline int64_t count_whole_chunks(const Table& table, int64_t chunk_numel) {
  int64_t count = 0;
  for (int64_t row = 0; row < table.rows(); ++row) count += table.numel(row) / chunk_numel;
  return count;
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
        by_kind_(by_kind),
        first_chunks_(table.all_rows()),
        positions_(table.all_rows()) {
    for (int64_t row = 1; row < table.all_rows(); ++row) {
      first_chunks_[row] = first_chunks_[row - 1] + chunks_of_row(table.numel(row - 1), chunk_numel);
    }
    add_rows(0, table.rows());
    chunk_count_ = all_chunks_;
    if (table.all_rows() > table.rows()) add_rows(table.rows(), table.all_rows());
  }

  int64_t chunk_count() const { return chunk_count_; }
  int64_t all_chunks() const { return all_chunks_; }  // with those of buffers
  const std::vector<Section>& sections() const { return sections_; }

  // All that the chunks depend on.
  Words layout() const {
    Words words;
    words.reserve(2 * table_.all_rows() + 3);
    words.push_back(chunk_numel_);
    words.push_back(by_kind_);
    if (table_.all_rows() > table_.rows()) words.push_back(table_.rows());
    for (int64_t row = 0; row < table_.all_rows(); ++row) {
      words.push_back(table_.numel(row));
      words.push_back(positions_[row]);
    }
    return words;
  }

  Words rows() const {
    Words words;
    words.reserve(table_.all_rows() * (kAddresses + table_.columns()));
    int64_t row = 0;
    for (size_t group = 0; group < group_rows_.size(); ++group) {
      for (const int64_t end = row + group_rows_[group]; row < end; ++row) add_row(words, row, group);
    }
    for (; row < table_.all_rows(); ++row) add_row(words, row, 0);
    return words;
  }

  Words chunks() const {
    Words words;
    words.reserve(kChunkWords * all_chunks_);
    for (const std::vector<int64_t>& members : members_) {
      std::vector<int64_t> with_rest;
      for (const int64_t row : members) {
        const int64_t whole = table_.numel(row) / chunk_numel_;
        for (int64_t i = 0; i < whole; ++i) add_chunk(words, row, i);
        if (whole == chunks_of_row(table_.numel(row), chunk_numel_)) continue;
        by_kind_ ? add_chunk(words, row, whole) : with_rest.push_back(row);
      }
      std::stable_sort(with_rest.begin(), with_rest.end(), [&](int64_t a, int64_t b) {
        return table_.numel(a) % chunk_numel_ > table_.numel(b) % chunk_numel_;
      });
      for (const int64_t row : with_rest) add_chunk(words, row, table_.numel(row) / chunk_numel_);
    }
    return words;
  }

 private:
  void add_rows(int64_t begin, int64_t end) {
    std::vector<int64_t> rows(end - begin);
    std::iota(rows.begin(), rows.end(), begin);
    if (by_kind_) {
      split(rows);
    } else {
      add_section({}, std::move(rows));
    }
  }

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
    const int64_t first = all_chunks_;
    for (const int64_t row : members) {
      positions_[row] = all_chunks_;
      all_chunks_ += chunks_of_row(table_.numel(row), chunk_numel_);
    }
    sections_.push_back({std::move(kind), first, all_chunks_ - first});
    members_.push_back(std::move(members));
  }

  // The i-th chunk of a row.
  void add_chunk(Words& words, int64_t row, int64_t i) const {
    const size_t begin = words.size();
    words.resize(begin + kChunkWords);
    words[begin + kChunkRow] = row;
    words[begin + kChunkBegin] = i * chunk_numel_;
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
    const Places& places = table_.places(row);
    words[begin + kFirstPlace] = places.first;
    std::copy(std::begin(places.averages), std::end(places.averages), &words[begin + kAveragePlace]);
    words[begin + kOrigin] = places.origin;
    for (int64_t column = 0; column < table_.columns(); ++column) {
      words.push_back(reinterpret_cast<intptr_t>(table_.cell(row, column).address));
    }
  }

  const Table& table_;
  const std::vector<int64_t>& group_rows_;
  int64_t chunk_numel_, chunk_count_ = 0, all_chunks_ = 0;
  bool by_kind_;
  std::vector<int64_t> first_chunks_;  // of each row, counted in the order of the rows
  std::vector<int64_t> positions_;     // of each row's first chunk in chunks(), if by kind
  std::vector<Section> sections_;
  std::vector<std::vector<int64_t>> members_;
};

}  // namespace trainops
