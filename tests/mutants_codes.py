"""Faults of 8-bit state: see ``mutants.py``."""

from mutants import planted, tests_of

SPECIFICATION = tests_of("codes", k="within or again or alone or mean_of_codes or zero_only or of_second_moments")

CODE_STATE = tests_of("code_state", k="others_know")

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
                "(words >> 12) if code.is_signed else",
                "(words >> 12) if True else",
            ),
        },
    ),
    *planted(
        "trainops/loading.py",
        CODE_STATE,
        {
            "codes: exported without their values": (
                "local(exported[name]).copy_(decoded(codes, code, local(param)))",
                "pass",
            ),
            "codes: they stay in what is exported": (
                "exported.pop(codes_key(name), None)",
                "exported.get(codes_key(name))",
            ),
        },
    ),
]
