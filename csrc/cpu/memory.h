// Large results in huge pages.
#pragma once

#include "../core/table.h"

namespace trainops::cpu {

// Asks for huge pages under the `numel` elements of a result that is about to be written for the first time. Mapping
// fresh memory in pages of 4 KiB takes several times as long as writing to it. Results of less than some huge pages,
// and systems that do not give them to who asks, are left alone; memory that is mapped already stays as it is. The
// request outlives the result: whoever is given these addresses next gets huge pages, too.
void want_huge_pages(const Cell& cell, int64_t numel);

}  // namespace trainops::cpu
