"""Faults of 8-bit state: see ``mutants.py``."""

from mutants import planted, tests_of

SPECIFICATION = tests_of("codes", k="within or again or alone or mean_of_codes or zero_only or of_second_moments")

CODE_STATE = tests_of("code_state", k="others_know")
REFERENCE = tests_of("codes", "code_state", k="not (triton or cuda or cpu-cpu)")
CPU = tests_of("codes", "code_state", k="cpu-cpu")

TRITON = tests_of("codes", "triton_bits", k="(triton-cpu and same_codes) or code")

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
        "triton_kernels/codes.py",
        TRITON,
        {
            "codes: Triton has other scales": ("tl.constexpr(0x2FFFFF)", "tl.constexpr(0x1FFFFF)"),
            "codes: Triton has other bits than the parameter's": (
                "return mix(key ^ tl.full((), OF_CODES, tl.uint32)), origin",
                "return mix(key), origin",
            ),
            "codes: Triton gives both moments the same halves": (
                "tl.interleave(upper, lower)",
                "tl.interleave(lower, upper)",
            ),
            "codes: Triton rounds small first moments up": (
                "is_up = finite > (random.to(tl.float32) * unit).to(tl.int32, bitcast=True)",
                "is_up = finite > 0",
            ),
            "codes: Triton makes a small second moment zero": (
                "        is_up = finite > 0\n",
                "        is_up = finite < 0\n",
            ),
            "codes: Triton takes the scale of an infinity": (
                "finite = tl.where(size < INFINITE, size, 0)",
                "finite = tl.minimum(size, INFINITE - 1)",
            ),
            "codes: Triton writes infinities as numbers": ("codes = tl.where(size == INFINITE, last - 1, codes)", ""),
            "codes: Triton writes NaN as a number": ("codes = tl.where(size > INFINITE, last, codes)", ""),
            "codes: Triton forgets signs": ("codes = codes | ((bits >> 24) & 0x80)", "codes = codes | 0"),
            "codes: Triton reads NaN as a number": ("magnitude >= last - 1, INFINITE", "magnitude > last, INFINITE"),
            "codes: Triton reads a zero as the smallest": ("bits = tl.where(magnitude == 0, 0, bits)", ""),
            "codes: Triton keeps the scale of a last block that is short": (
                "return offset + tl.arange(0, BLOCK // CODE_BLOCK) * CODE_BLOCK < end",
                "return offset + (1 + tl.arange(0, BLOCK // CODE_BLOCK)) * CODE_BLOCK <= end",
            ),
            "codes: Triton takes the scales of the first block": (
                "(offset // CODE_BLOCK + tl.arange(0, BLOCK // CODE_BLOCK))",
                "tl.arange(0, BLOCK // CODE_BLOCK)",
            ),
        },
    ),
    *planted(
        "triton_kernels/update.py",
        TRITON,
        {
            "codes: Triton's blocks are shorter than those of codes": ("CODES and BLOCK >= 8 * CODE_BLOCK", "CODES"),
            "codes: Triton takes codes for scales": (
                "        numel = tl.load(words + NUMEL)\n",
                "        numel = tl.load(words + NUMEL) * 0\n",
            ),
        },
    ),
]
