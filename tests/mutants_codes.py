"""Faults of 8-bit state: see ``mutants.py``."""

from mutants import planted, tests_of

SPECIFICATION = tests_of("codes", k="within or again or alone or mean_of_codes or zero_only or of_second_moments")

CODE_STATE = tests_of("code_state", k="others_know")
REFERENCE = tests_of("codes", "code_state", k="not (triton or cuda or cpu-cpu)")
CUDA = tests_of("cuda_codes")
CPU = tests_of("codes", "code_state", k="cpu-cpu")

CODES = [
    *planted(
        "trainops/reference_codes.py",
        SPECIFICATION,
        {
            "codes: random bits are not used": ("(finite + random - first)", "(finite + NEAREST - first)"),
            "codes: scales too small for the largest": ("ROUND_SCALE = 0x2FFFFF", "ROUND_SCALE = 0"),
            "codes: the scale of a NaN": ("torch.where(size < INFINITE, size, 0)", "size.clamp(max=INFINITE - 1)"),
            "codes: small first moments are lost": ("is_up = size > threshold.view(torch.int32)", "is_up = size < 0"),
            "codes: a small second moment becomes zero": ("is_up = size > 0\n", "is_up = size < 0\n"),
            "codes: an infinity is not known": ("torch.where(magnitude == code.last - 1, torch.inf, value)", "value"),
            "codes: second moments take the bits of first ones": (
                "odd.bool() == code.is_signed",
                "odd.bool()",
            ),
        },
    ),
    *planted(
        "trainops/loading.py",
        CODE_STATE,
        {
            "codes: exported without their values": (
                "exported[name] = values_of_codes(param, name, codes, torch.bfloat16)",
                "exported[name] = torch.zeros_like(param, dtype=torch.bfloat16)",
            ),
            "codes: they stay in what is exported": (
                "exported.pop(codes_key(name), None)",
                "exported.get(codes_key(name))",
            ),
        },
    ),
    *planted(
        "trainops/reference_codes.py",
        REFERENCE,
        {
            "codes: in the order of indices": (
                "values = torch.empty_like(layout, dtype=torch.float32)",
                "values = torch.empty(layout.shape, dtype=torch.float32, device=layout.device)",
            ),
        },
    ),
    *planted(
        "trainops/loading.py",
        REFERENCE,
        {
            "codes: state dicts are the live state": ("exported = dict(state)", "exported = state"),
            "codes: a pickled state is refused": ("is_pickled = self._loading is None", "is_pickled = False"),
        },
    ),
    *planted(
        "trainops/reference_rounding.py",
        REFERENCE,
        {
            "codes: the place is forgotten": (
                "key: Any = _key(seed, place, step)  # other",
                "key: Any = _key(seed, 0, step)  # other",
            ),
        },
    ),
    *planted(
        "csrc/math/codes.h",
        CPU,
        {
            "codes: C++ forgets the sign of what is odd": (
                "const uint32_t sign = is_signed ? bits >> 24 & 0x80u : 0u;",
                "const uint32_t sign = 0u;",
            ),
            "codes: C++ rounds a zero up": (
                "const uint32_t least = size < 1 ? 0u : 1u;",
                "const uint32_t least = 1u;",
            ),
            "codes: C++ has other scales": ("kRoundScale = 0x2fffff", "kRoundScale = 0x1fffff"),
        },
    ),
    *planted(
        "csrc/cpu/codes.cpp",
        CPU,
        {
            "codes: a block with a NaN is taken for any other": (
                "if (largest >= static_cast<uint32_t>(kInfinity)) {",
                "if (false) {",
            ),
            "codes: the last block's random bits": ("count_code_blocks(size) * kPairs", "size / kCodeBlock * kPairs"),
            "codes: NaN is decoded as a number": ("largest < last - 1;", "largest <= last;"),
            "codes: odd elements are not looked at again": ("(is_signed ? 1 : 0)", "(is_signed ? -1 : 0)"),
            "codes: odd elements that random bits made a one": ("(is_signed ? 1 : 0)", "0"),
            "codes: small second moments are not looked at again": ("(is_signed ? 1 : 0)", "(is_signed ? 1 : -1)"),
            "codes: the other half's random bits": ("(is_signed ? lower_half : upper_half)", "upper_half"),
            "codes: the last block's neighbours": (
                "std::fill(even + (size + 1) / 2, even + whole / 2 + kPairs, 0.0f);",
                "",
            ),
        },
    ),
    *planted(
        "csrc/core/table_builder.h",
        CPU,
        {
            "codes: of another size": (
                "codes.numel == param.numel + count_code_blocks(param.numel)",
                "codes.numel >= 0",
            ),
        },
    ),
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
