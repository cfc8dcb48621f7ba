// Large results in huge pages.
#pragma once

#include "../core/table.h"

namespace trainops::cpu {

// Asks for huge pages under the `numel` elements of a result that is about to be written for the first time. Mapping
// fresh memory in pages of 4 KiB takes several times as long as writing to it. Does nothing for results under four
// huge pages, or without MADV_HUGEPAGE. Memory that is already mapped stays as it is. The setting stays with the
// address range.
void want_huge_pages(const Cell& cell, int64_t numel);

}  // namespace trainops::cpu
