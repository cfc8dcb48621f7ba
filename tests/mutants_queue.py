"""Faults of the queue that CUDA's blocks draw chunks from, of what is fetched ahead, and of the width of accesses."""

from mutants import planted, tests_of

QUEUE = [
    *planted(
        "csrc/cuda/common.cuh",
        tests_of("adamw", "adamw_range", k="cuda-cpu"),
        {
            "cuda queue: the counter is not reset": (
                "if (turn == count_ + gridDim.x - 1) *drawn_ = 0;",
                "",
            ),
            "cuda queue: the counter is reset a draw too early": (
                "if (turn == count_ + gridDim.x - 1) *drawn_ = 0;",
                "if (turn == count_ + gridDim.x - 2) *drawn_ = 0;",
            ),
            "cuda queue: a chunk is drawn twice": (
                "turn = __shfl_sync(kAllLanes, turn, 0);",
                "turn = __shfl_sync(kAllLanes, turn, 0);\n    turn -= turn == 1;",
            ),
            "cuda queue: a chunk is lost": ("if (turn >= count_) {", "if (turn + 1 >= count_) {"),
            "cuda queue: the first row for all": (
                "row_of(table_, words[kChunkRow])",
                "row_of(table_, 0)",
            ),
            "cuda queue: the next row in the slot that is in use": (
                "slot_ ^= 1;\n    if (is_drawer()) draw(slot_);",
                "if (is_drawer()) draw(slot_);\n    slot_ ^= 1;",
            ),
            "cuda queue: a word of a row is not read": (
                "if (lane < table_.row_words) slot",
                "if (lane < table_.row_words - 1) slot",
            ),
            "cuda queue: whole chunks from the last but one": (
                "? table_.whole_chunks - 1 - turn : turn",
                "? table_.whole_chunks - 2 - turn : turn",
            ),
        },
    ),
    *planted(
        "csrc/cuda/common.cuh",
        tests_of("cuda"),
        {
            "cuda queue: the partial sum of a row's first chunk for all": (
                "words[kFirstChunk] + begin / kChunkNumel;",
                "words[kFirstChunk];",
            ),
        },
    ),
    *planted(
        "csrc/cuda/common.cuh",
        tests_of("ptx_cuda", "ptx_races", k="interleaving or no_race"),
        {
            "cuda queue: drawn without an atomic": ("turn = atomicAdd(drawn_, 1u);", "turn = (*drawn_)++;"),
        },
    ),
    *planted(
        "csrc/core/device_words.h",
        tests_of("core"),
        {
            "cuda queue: the smallest chunk first": (
                "table_.numel(a) % chunk_numel_ > table_.numel(b) % chunk_numel_",
                "table_.numel(a) % chunk_numel_ < table_.numel(b) % chunk_numel_",
            ),
            "cuda queue: the layout of a list by kind": ("    words.push_back(by_kind_);\n", ""),
        },
    ),
    *planted(
        "csrc/cuda/update.cu",
        tests_of("adamw_range", "cuda", k="cuda-cpu or settings"),
        {
            "cuda queue: another step count in a group": (
                "last.group == group && last.step == step",
                "last.group == group",
            ),
            "cuda queue: another group at a step count": (
                "last.group == group && last.step == step",
                "last.step == step",
            ),
            "cuda queue: the scalars of the chunk before": (
                "of_slots[chunk.slot].scalars",
                "of_slots[chunk.slot ^ 1].scalars",
            ),
        },
    ),
    *planted(
        "csrc/cuda/lanes.cuh",
        tests_of("cuda", "ptx_cuda", k="test_unaligned or bits_of_the_shim or an_unaligned_tensor"),
        {
            "cuda width: addresses at multiples of 8 are read at once": (
                "if (is_multiple(address, 16)) return load_16(address);",
                "if (is_multiple(address, 8)) return load_16(address);",
            ),
            "cuda width: addresses at multiples of 8 are written at once": (
                "if (is_multiple(address, 16)) return store_16(address, half);",
                "if (is_multiple(address, 8)) return store_16(address, half);",
            ),
            "cuda width: every tensor is read in words": (
                "if (is_multiple(address, 16)) return load_16(address);\n",
                "",
            ),
            "cuda width: every tensor is written in words": (
                "if (is_multiple(address, 16)) return store_16(address, half);\n",
                "",
            ),
            "cuda width: the halves of a word exchanged": (
                "shorts[2 * i] | static_cast<uint32_t>(shorts[2 * i + 1]) << 16",
                "shorts[2 * i + 1] | static_cast<uint32_t>(shorts[2 * i]) << 16",
            ),
            "cuda width: the upper half of a word is not written": (
                "      shorts[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);\n",
                "",
            ),
            "cuda width: 16-bit elements at an odd address in words": (
                "  const uint32_t words[4] = {half.x, half.y, half.z, half.w};\n  if (is_multiple(address, 4)) {",
                "  const uint32_t words[4] = {half.x, half.y, half.z, half.w};\n  if (is_multiple(address, 2)) {",
            ),
        },
    ),
]
