"""Faults of how weights and moments are stored: see ``mutants.py``."""

from mutants import planted, tests_of

STATE_DTYPE = tests_of("state_dtype", k="cpu-cpu or reference-cpu or loading or refused")

HALVES = tests_of("halves")

CPU_MASTERS = tests_of("masters", "master_state", k="cpu-cpu")

STORAGE = [
    *planted(
        "csrc/cpu/halves.h",
        HALVES,
        {
            "float16: blocks are truncated": ('"vcvtps2ph $0,', '"vcvtps2ph $3,'),
            "float16: blocks keep payloads": ("(floats != floats ? (bits", "(floats == 0 ? (bits"),
        },
    ),
    *planted(
        "csrc/cpu/elements.h",
        HALVES,
        {"float16: what is left after blocks": ("i = begin + blocks * size; i < end", "i = end; i < end")},
    ),
    *planted(
        "csrc/math/storage.h",
        HALVES,
        {"float16: signalling NaNs stay": ("magnitude > 0x7c00u ? 0x00400000u : 0u", "0u")},
    ),
    *planted(
        "trainops/lost_updates.py",
        tests_of("lost_updates"),
        {
            "lost updates: those that the rule does not make": ("(moved != before) & ", ""),
            "lost updates: of the parameter where there is a master": (
                "param.detach() if master is None else reference_storage.join(param.detach(), master)",
                "param.detach()",
            ),
            "lost updates: nothing is clipped": (
                "coefficient=coefficient.to(moved.device)",
                "coefficient=1.0",
            ),
            "lost updates: in the parameter's own arithmetic": (
                "return x.to(reference.scalar_dtype(x.device), copy=True)",
                "return reference_storage.wide(x).clone()",
            ),
        },
    ),
    *planted(
        "trainops/storage.py",
        STATE_DTYPE,
        {"state_dtype: the first of a pair for both": ("others if i else first", "first")},
    ),
    *planted(
        "trainops/rows.py",
        STATE_DTYPE,
        {"state_dtype: moments are made in the parameter's dtype": (", dtype=dtypes.get(name))", ")")},
    ),
    *planted(
        "trainops/loading.py",
        STATE_DTYPE,
        {
            "state_dtype: not kept by load_state_dict": (
                'held | self._chosen_dtypes(state["param_groups"])',
                "held",
            ),
        },
    ),
    *planted(
        "trainops/optimizer.py",
        STATE_DTYPE,
        {"state_dtype: a refused group stays": ("self.param_groups.pop()", "pass")},
    ),
    *planted(
        "csrc/math/storage.h",
        CPU_MASTERS,
        {
            "masters: an unsigned remainder": (
                "bits + ((rest & 0xffffu) ^ 0x8000u) - 0x8000u",
                "bits + (rest & 0xffffu)",
            ),
            "masters: NaN is split like a number": ("return weight != weight ? 0x7fc00000u : bit", "return bit"),
            "masters: zero with a remainder that is not its own": (
                "return weight != weight ? bit_cast<float>(bits) : weight;",
                "return weight;",
            ),
            "masters: ties to even": (
                "param.bits = static_cast<uint16_t>((bits + kHalfOfBFloat16) >> 16)",
                "param.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)",
            ),
            "masters: no remainder": ("remainder.bits = static_cast<int16_t>(bits)", "remainder.bits = 0"),
            "masters: an old float32 master of bfloat16": ("return belongs ? master :", "return true ? master :"),
            "masters: an old float32 master of float16": ("rounded.bits == param.bits ? master", "true ? master"),
        },
    ),
    *planted(
        "csrc/cpu/elements.h",
        CPU_MASTERS,
        {
            "masters: remainders of a pair exchanged": (
                "(low & 0xffffu) | (high << 16)",
                "(high & 0xffffu) | (low << 16)",
            ),
            "masters: pairs with ties to even": (
                "((low + kHalfOfBFloat16) >> 16)",
                "((low + 0x7fffu + ((low >> 16) & 1u)) >> 16)",
            ),
        },
    ),
    *planted(
        "csrc/cpu/ema.cpp",
        CPU_MASTERS,
        {
            "masters: an average of the rounded weight": (
                "split_weights<ConstSplitWeights>(weight, begin)",
                "static_cast<const BFloat16*>(weight.param.address) + begin",
            ),
        },
    ),
    *planted(
        "csrc/cpu/update.cpp",
        CPU_MASTERS,
        {
            "masters: a float32 master is not written": (
                "store(row.weight, begin, size, weights)",
                "store(row.weight.param, begin, size, weights)",
            ),
        },
    ),
    *planted(
        "csrc/core/state_reader.h",
        CPU_MASTERS,
        {"masters: one that is gone": ("if (lacks_master_[i / columns_] &&", "if (false && lacks_master_[i] &&")},
    ),
    *planted(
        "csrc/core/table_builder.h",
        tests_of("masters", "master_state", k="cuda-cpu"),
        {"masters: remainders of any parameter": ("if (column.of_param() && !may", "if (false && !may")},
    ),
    *planted(
        "csrc/core/tensor.h",
        CPU_MASTERS,
        {
            "masters: int16 in any column": (
                "(*dtype != DType::int16 && *dtype != DType::byte) || *dtype == integers",
                "true",
            )
        },
    ),
    *planted(
        "csrc/cuda/weights.cuh",
        tests_of("masters", "master_state", k="cuda-cpu"),
        {
            "cuda: masters: the lower remainder for both": (
                "& 0xffff0000u, rest[i] >> 16)",
                "& 0xffff0000u, rest[i])",
            ),
            "cuda: masters: an old float32 master": (
                "DType::bfloat16 ? widen(BFloat16{bits}, x[i])",
                "DType::bfloat16 ? x[i]",
            ),
            "cuda: masters: no carry in the upper parameter": (
                "((bits_to_split(x[2 * i + 1]) + kHalfOfBFloat16) & 0xffff0000u)",
                "(bits_to_split(x[2 * i + 1]) & 0xffff0000u)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/update.cu",
        tests_of("masters", k="cuda-cpu"),
        {
            "cuda: masters: an average of the rounded weight": (
                "      followed_dtype = DType::float32;\n      followed = pack(param, followed_dtype);\n",
                "",
            ),
        },
    ),
    *planted(
        "triton_kernels/storage.py",
        tests_of("masters", "master_state", k="triton-cpu"),
        {
            "triton: masters: an unsigned remainder": (
                "+ remainder).to(tl.float32",
                "+ (remainder & 0xFFFF)).to(tl.float32",
            ),
            "triton: masters: NaN is split like a number": (
                "tl.where(weight != weight, 0x7FC00000, weight",
                "(weight",
            ),
            "triton: masters: ties to even": (
                "((bits + HALF_OF_BFLOAT16) >> 16)",
                "((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)",
            ),
            "triton: masters: an old float32 master": ("return tl.where(belongs, master, param)", "return master"),
            "triton: masters: an average of the rounded weight": (
                "        return weight\n",
                "        return rounded\n",
            ),
        },
    ),
    *planted(
        "trainops/reference_storage.py",
        tests_of("masters", "master_state", k="reference-cpu or bfloat16 or specification"),
        {
            "reference: masters: written by a skipped step": (
                "else weight, skip)\n",
                "else weight)\n",
            ),
            "reference: masters: an old float32 master": (
                "torch.where(master.to(param.dtype) == param, master, wide)",
                "master",
            ),
        },
    ),
    *planted(
        "trainops/loading.py",
        tests_of("master_state", k="reference-cpu or not target"),
        {
            "masters: those of another checkpoint are not loaded": ("[theirs.get(MASTER), own]", "[own]"),
            "masters: lost to a checkpoint that has none": ("[theirs.get(MASTER), own]", "[theirs.get(MASTER)]"),
            "masters: kept by who wants none": ("            its.pop(MASTER, None)\n", ""),
        },
    ),
    *planted(
        "trainops/ema.py",
        tests_of("master_state", k="cpu-cpu"),
        {
            "masters: an average that the kernel does not move is of the rounded weight": (
                "self._weights(rest.sources)",
                "rest.sources",
            )
        },
    ),
]
