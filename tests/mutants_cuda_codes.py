"""Faults of 8-bit state in the CUDA kernels: see ``mutants.py``."""

from mutants import planted, tests_of

CUDA = tests_of("cuda_codes")

CUDA_CODES = [
    *planted(
        "csrc/cuda/codes.cuh",
        CUDA,
        {
            "codes: cuda: a scale of some lanes of a block": (
                "scale_of_lanes<kCodeBlock / 8>(largest)",
                "scale_of_lanes<kCodeBlock / 16>(largest)",
            ),
            "codes: cuda: a scale of half a warp, one by one": (
                "scale_of_lanes<kCodeBlock>(exists",
                "scale_of_lanes<kCodeBlock / 2>(exists",
            ),
            "codes: cuda: random bits of the pack's place are not used": (
                "words[j] = word_of_codes(random, begin + 2 * j);",
                "words[j] = word_of_codes(random, 2 * j);",
            ),
            "codes: cuda: a pack with small numbers is taken for any other": (
                "|| Code<is_signed>::is_odd(x[j], first);",
                ";",
            ),
            "codes: cuda: a pack with a NaN is taken for any other": ("!(fabsf(x[j]) < INFINITY) ||", "false ||"),
            "codes: cuda: infinity is decoded as a number": ("+ 0x02020202u;", "+ 0x01010101u;"),
            "codes: cuda: unaligned codes in the other order": (
                "codes |= static_cast<uint64_t>(address[j]) << (8 * j);",
                "codes |= static_cast<uint64_t>(address[j]) << (8 * (7 - j));",
            ),
            "codes: cuda: wide reads of codes at multiples of 4": (
                "if (is_multiple(address, 8)) {\n    codes =",
                "if (is_multiple(address, 4)) {\n    codes =",
            ),
            "codes: cuda: wide writes of codes at multiples of 4": (
                "if (is_multiple(address, 8)) {\n    *reinterpret_cast",
                "if (is_multiple(address, 4)) {\n    *reinterpret_cast",
            ),
        },
    ),
    *planted(
        "csrc/cuda/cells.cuh",
        CUDA,
        {"codes: cuda: all have a sign": ("kSignedStates<Rule> >> i & 1u", "true")},
    ),
    *planted(
        "csrc/cuda/lanes.cuh",
        CUDA,
        {
            "codes: cuda: packs take some of a block": ("has_codes_ ? kCodeBlock : stride", "stride"),
            "codes: cuda: halves of a pack of codes far apart": (
                "itemsize(cell.dtype) <= 2",
                "itemsize(cell.dtype) == 2",
            ),
        },
    ),
    *planted(
        "csrc/cuda/update.cu",
        CUDA,
        {
            "codes: cuda: lanes behind the end stay away": ("range.end + threadIdx.x % kWarp :", "range.end :"),
            "codes: cuda: lanes behind the end write": (
                "!may_have_codes || i < range.end;",
                "true;",
            ),
            "codes: cuda: the random bits of the parameter": (
                "randoms[slot] = {param, random_of_codes(param)};",
                "randoms[slot] = {param, param};",
            ),
        },
    ),
]
