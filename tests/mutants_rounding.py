"""Faults of stochastic rounding: see ``mutants.py``."""

from mutants import planted, tests_of

REFERENCE = tests_of("random_bits", "stochastic_rounding", "stochastic_averages", k="not (triton or cuda or cpu-cpu)")
CPU = tests_of("stochastic_rounding", "stochastic_averages", k="cpu-cpu or compiled or threads")
CUDA = tests_of("stochastic_rounding", "stochastic_averages", k="cuda-cpu or compiled")
SHARDS = tests_of("stochastic_shards")

ROUNDING = [
    *planted(
        "trainops/reference_rounding.py",
        REFERENCE,
        {
            "random bits: the seed's upper half": ("^ seed >> 32)", "^ 0)"),
            "random bits: one mixing less": ("mix(seed ^ place & WORD)", "(seed ^ place & WORD)"),
            "random bits: elements in the order of their indices": (
                "index = torch.empty_like(x, dtype=torch.int64)",
                "index = torch.empty(x.shape, dtype=torch.int64, device=x.device)",
            ),
            "stochastic: NaN": ("torch.where(x.isnan(), 0x7FC00000, bits)", "bits"),
        },
    ),
    *planted(
        "csrc/math/random.h",
        CPU,
        {
            "random bits: the lower half": (
                "static_cast<uint32_t>(i))) >> 16",
                "static_cast<uint32_t>(i))) & 0xffffu",
            ),
            "random bits: the step is forgotten": (
                "return mix(random_key(seed, place) ^ static_cast<uint32_t>(static_cast<int64_t>(step)))",
                "return random_key(seed, place)",
            ),
        },
    ),
    *planted(
        "csrc/math/storage.h",
        CPU,
        {
            "stochastic: NaN in C++": (
                "return x != x ? 0x7fc00000u : bit_cast<uint32_t>(x) + random_bits",
                "return bit_cast<uint32_t>(x) + random_bits",
            )
        },
    ),
    *planted(
        "csrc/cpu/elements.h",
        CPU,
        {
            "stochastic: the second of a pair has the bits of the first": (
                "column.random.bits(2 * pair + 1)",
                "column.random.bits(2 * pair)",
            )
        },
    ),
    *planted(
        "csrc/cpu/convert.h",
        CPU,
        {"stochastic: each tile begins anew": ("cell.random.from(begin)", "cell.random")},
    ),
    *planted(
        "csrc/core/state_reader.h",
        CPU,
        {
            "stochastic: places are those of the rows": (
                "if (is_random) places.first = place;",
                "if (is_random) places.first = places_.size();",
            ),
        },
    ),
    *planted(
        "csrc/core/state_reader.h",
        SHARDS,
        {
            "stochastic: shards have no origin": (
                "if (is_random && !is_plain)",
                "if (false && is_random && !is_plain)",
            )
        },
    ),
    *planted(
        "csrc/cuda/packs.cuh",
        CUDA,
        {
            "stochastic: packs begin at 0": (
                "const int64_t element = first + 2 * i;",
                "const int64_t element = 2 * i;",
            )
        },
    ),
    *planted(
        "csrc/cuda/cells.cuh",
        CUDA,
        {
            "stochastic: an average with the place of its parameter": (
                "row.random(kAveragePlace, ema_decay.seed)",
                "row.random(kFirstPlace, ema_decay.seed)",
            )
        },
    ),
    *planted(
        "trainops/rows.py",
        REFERENCE,
        {
            "stochastic: rows count, not places": (
                "for place, param in enumerate(params)",
                "for place, param in enumerate(p for p in params if p.grad is not None)",
            )
        },
    ),
    *planted(
        "trainops/tables.py",
        SHARDS,
        {"stochastic: the last rank of an uneven shard": ("size = -(-rows // ranks)", "size = rows // ranks")},
    ),
    *planted(
        "trainops/seeds.py",
        REFERENCE,
        {
            "stochastic: a loaded seed does not hold": (
                "{**self.param_groups[0][OWN_STATE], **group.get(OWN_STATE, {})}",
                "self.param_groups[0][OWN_STATE]",
            ),
            "stochastic: float16 is taken": ("if torch.float16 in dtypes:", "if False:"),
        },
    ),
    *planted(
        "trainops/ema_state.py",
        REFERENCE,
        {"stochastic: an average's seed is not loaded": ("self.seed = loaded.seed", "pass")},
    ),
    *planted(
        "trainops/model_match.py",
        REFERENCE,
        {"stochastic: places among the pairs": ("self.places[names[0]]))", "len(self.found.pairs)))")},
    ),
    *planted(
        "trainops/ema_advice.py",
        REFERENCE,
        {"advice: an average that stalls": ("not 0.0 < 1.0 - ema.decay < torch.finfo(dtype).eps / 2", "True")},
    ),
]
