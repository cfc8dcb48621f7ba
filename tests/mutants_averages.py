"""Faults of a step that moves several averages and buffers: see ``mutants.py``."""

from mutants import planted, tests_of

CPU, CUDA, TRITON = (tests_of("ema_several", k=name) for name in ("cpu-cpu", "cuda-cpu", "triton-cpu"))

AVERAGES = [
    *planted(
        "csrc/cpu/update.cpp",
        CPU,
        {
            "averages: cpu: all have the first one's decay": ("size, ema_decays[i]);", "size, ema_decays[0]);"),
            "averages: cpu: buffers stay": ("table.rows(), table.all_rows())", "table.rows(), table.rows())"),
            "averages: cpu: the last byte of a buffer": (
                "+ piece.begin, piece.size);",
                "+ piece.begin, piece.size - 1);",
            ),
        },
    ),
    *planted(
        "csrc/cuda/update.cu",
        CUDA,
        {
            "averages: cuda: all have the first one's decay": ("ema_decays[i].decay", "ema_decays[0].decay"),
            "averages: cuda: the first moves twice": ("is_buffer(chunk.row) ? 0 : 1", "0"),
            "averages: cuda: the first of a buffer stays": ("is_buffer(chunk.row) ? 0 : 1", "1"),
            "averages: cuda: buffers stay": (
                "ChunkQueue queue(args.table, args.table.all_chunks, ",
                "ChunkQueue queue(args.table, args.table.chunk_count, ",
            ),
        },
    ),
    *planted(
        "csrc/cuda/ema.cuh",
        CUDA,
        {
            "averages: cuda: the last byte of a buffer": ("i < end; ++i) to[i]", "i + 1 < end; ++i) to[i]"),
            "averages: cuda: further ones follow the parameter alone": ("if (weight.has_master()) {", "if (false) {"),
        },
    ),
    *planted(
        "triton_kernels/update.py",
        TRITON,
        {
            "averages: triton: the second has the first one's decay": (
                "real(tl.load(settings + EMA_DECAY + 1))",
                "real(tl.load(settings + EMA_DECAY))",
            ),
            "averages: triton: the third's address is the second's": (
                "tl.load(addresses + FURTHER + 1)",
                "tl.load(addresses + FURTHER)",
            ),
        },
    ),
    *planted(
        "trainops/adapters/triton.py",
        TRITON,
        {"averages: triton: buffers have the first one's decay": ('["ema_decay"] + place,', '["ema_decay"],')},
    ),
    *planted(
        "trainops/adapters/_foreach_fused.py",
        tests_of("ema_several", k="foreach"),
        {
            "averages: foreach: all of a chunk have the first one's decay": (
                "decay, is_finite)",
                "next(iter(decays.values())), is_finite)",
            )
        },
    ),
    *planted(
        "csrc/core/buffers.h",
        tests_of("core_rows"),
        {"averages: buffers that lie in a parameter": ("return params.touch(address, bytes);", "return false;")},
    ),
    *planted(
        "csrc/core/table_builder.h",
        tests_of("core_rows"),
        {"averages: a buffer is copied whatever its type": ("(!moves && !next_.same_type(first_))", "false")},
    ),
    *planted(
        "trainops/averages.py",
        tests_of("ema_several", k="cpu-cpu or foreach or moved_beside"),
        {
            "averages: one that follows another moves with it": (" or self._follow_each_other():", ":"),
            "averages: buffers that kernels leave are forgotten": (".difference(left[i])", ""),
            "averages: more than kernels take": (
                "and len(self._fused) < len(AVERAGES):",
                "and len(self._fused) < 9:",
            ),
        },
    ),
    *planted(
        "trainops/ema_holder.py",
        tests_of("ema_several"),
        {"averages: attach takes the place of others": ("(*found.averages, self)", "self")},
    ),
    *planted(
        "trainops/optimizer.py",
        tests_of("ema_several"),
        {"averages: a lost one is kept": ("if x is not ema)", "if True)")},
    ),
]
