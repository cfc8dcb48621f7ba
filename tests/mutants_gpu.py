"""Faults of the GPU backends: see ``mutants.py``."""

from mutants import planted, tests_of

TRITON_AND_CUDA = [
    *planted(
        "triton_kernels/_common.py",
        tests_of("ends", k="triton-cpu"),
        {
            "triton: a masked store takes one element more": (
                "tl.store(pointers, rounded, mask=offset + tl.arange(0, BLOCK) < end)",
                "tl.store(pointers, rounded, mask=offset + tl.arange(0, BLOCK) <= end)",
            ),
            "triton: a masked load takes one element more": (
                "tl.load(pointers, mask=offset + tl.arange(0, BLOCK) < end, other=0)",
                "tl.load(pointers, mask=offset + tl.arange(0, BLOCK) <= end, other=0)",
            ),
            "triton: a block beyond the end": (
                "end_of_blocks = begin + (end - begin) // BLOCK * BLOCK",
                "end_of_blocks = begin + (end - begin + BLOCK - 1) // BLOCK * BLOCK",
            ),
        },
    ),
    *planted(
        "triton_kernels/adamw.py",
        tests_of("adamw_types", k="triton-cpu"),
        {
            "triton: beta1 for beta2": (
                "exp_avg_sq = exp_avg_sq * beta2 + weight2 * grad * grad",
                "exp_avg_sq = exp_avg_sq * beta1 + weight2 * grad * grad",
            ),
            "triton: exp_avg written to exp_avg_sq": (
                "store(exp_avg_sq_address, offset, end, exp_avg_sq, EXP_AVG_SQ_TYPE",
                "store(exp_avg_sq_address, offset, end, exp_avg, EXP_AVG_SQ_TYPE",
            ),
            "triton: 1 - beta1 for 1 - beta2": (
                "tl.store(out + WEIGHT2, 1.0 - beta2)",
                "tl.store(out + WEIGHT2, 1.0 - beta1)",
            ),
            "triton: AMSGrad takes the smaller": (
                "second_moment = tl.maximum(largest, exp_avg_sq",
                "second_moment = tl.minimum(largest, exp_avg_sq",
            ),
            "triton: the last element left out": (
                "end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL))",
                "end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL) - 1)",
            ),
        },
    ),
    *planted(
        "triton_kernels/adamw.py",
        tests_of("adamw", k="triton-cpu"),
        {
            "triton: beta2 for beta1": ("grad - beta1 * difference", "grad - beta2 * difference"),
            "triton: maximize ignored": ("-factor if MAXIMIZE else factor", "factor if MAXIMIZE else factor"),
            "triton: a step is not skipped": (
                "        if tl.load(skip) != 0:\n            return",
                "        if tl.load(skip) == 2:\n            return",
            ),
            "triton: found_inf ignored": ("skipped = tl.load(found_inf) != 0", "skipped = tl.load(found_inf) == 3"),
            "triton: skipped steps are not counted": ("tl.where(skipped, 1, 0)", "tl.where(skipped, 0, 0)"),
            "triton: the grad scale left in": ("        factor = inverse_scale\n", "        factor = 1.0\n"),
            "triton: EMA towards the unrounded parameter": (
                "moved(average, stored.to(AVERAGE_WIDE)",
                "moved(average, param.to(AVERAGE_WIDE)",
            ),
        },
    ),
    *planted(
        "trainops/backends/triton.py",
        tests_of("adamw_types", k="triton-cpu"),
        {
            "triton: exp_avg_sq has exp_avg's type": (
                "EXP_AVG_SQ_TYPE=_type(exp_avg_sq)",
                "EXP_AVG_SQ_TYPE=_type(exp_avg)",
            ),
            "triton: gradients of the other 16-bit type": (
                "GRAD_TYPE=_type(grad)",
                "GRAD_TYPE=_type(torch.float16 if grad == torch.bfloat16 else grad)",
            ),
            "triton: float64 in float32": ("WIDE=_type(_wide(param)),", "WIDE=_type(torch.float32),"),
        },
    ),
    *planted(
        "triton_kernels/ema.py",
        tests_of("ema_fused", k="triton-cpu"),
        {
            "triton: an average is not skipped": (
                "        if tl.load(skip) != 0:\n            return",
                "        if tl.load(skip) == 2:\n            return",
            ),
        },
    ),
    *planted(
        "trainops/backends/triton.py",
        tests_of("adamw", k="triton-cpu"),
        {
            "triton: the norm of the parameters": (
                '_GRADS = AdamWGroup.COLUMNS.index("grads")',
                '_GRADS = AdamWGroup.COLUMNS.index("params")',
            ),
        },
    ),
    *planted(
        "triton_kernels/adamw.py",
        tests_of("grad_scale", k="triton-cpu"),
        {
            "triton: the grad scale taken out twice": (
                "factor = inverse_scale * tl.where(ratio",
                "factor = inverse_scale * inverse_scale * tl.where(ratio",
            ),
            "triton: the norm keeps the grad scale": (
                "norm = norm_of(partials, 0, chunk_count, 2, BLOCK) * inverse_scale",
                "norm = norm_of(partials, 0, chunk_count, 2, BLOCK)",
            ),
        },
    ),
    *planted(
        "triton_kernels/adamw.py",
        tests_of("adamw_range", k="triton-cpu"),
        {
            "triton: step counts are not written": ("    if begin == 0:\n", "    if begin < 0:\n"),
            "triton: the first row's step count for all": (
                "tl.load(row_scalars + NEW_STEP)",
                "tl.load(scalars + NEW_STEP)",
            ),
            "triton: the first group's settings for all": (
                "group = settings + GROUPS + tl.load(words + GROUP) * GROUP_WORDS",
                "group = settings + GROUPS",
            ),
        },
    ),
    *planted(
        "triton_kernels/clip_grad_norm.py",
        tests_of("ends", k="triton-cpu"),
        {
            "triton: partial sums of the first row for all": (
                "first = tl.load(words + FIRST_CHUNK)",
                "first = tl.load(rows + FIRST_CHUNK)",
            ),
        },
    ),
    *planted(
        "trainops/backends/triton.py",
        tests_of("ends", k="triton-cpu"),
        {
            "triton: a program too few": ("kernel[(programs,)]", "kernel[(max(1, programs - 1),)]"),
        },
    ),
    *planted(
        "trainops/device_table.py",
        tests_of("device_table"),
        {
            "device tables: a layout for other groups, by their presence": (
                "groups and tuple(map(tuple, groups))",
                "bool(groups)",
            ),
            "device tables: strides are not compared": ("elif order != first[0]:", "elif order != order:"),
            "device tables: chunks begin one too late": (
                'begins = (torch.arange(len(rows), device="cpu") - first) * chunk_numel',
                'begins = (torch.arange(len(rows), device="cpu") - first + 1) * chunk_numel',
            ),
            "device tables: uploads by length": (
                "key = (words, device, torch.cuda.current_stream(device).cuda_stream)",
                "key = (len(words), device, torch.cuda.current_stream(device).cuda_stream)",
            ),
            "device tables: a layout for other chunks": (
                "key = (self.device, chunk_numel, groups",
                "key = (self.device, groups",
            ),
            "device tables: lazily negated single elements": (
                "1 in sizes and any(map(Tensor.is_neg, column))",
                "False",
            ),
            "device tables: subclasses taken for tensors": ("        tuple(map(type, column)),\n", ""),
            "device tables: dtypes of the column before": ("code << (4 * column)", "code << (4 * column + 4)"),
            "device tables: chunks of a section's first row": (
                "first_chunks[i] = self.chunk_count",
                "first_chunks[i] = first",
            ),
        },
    ),
    *planted(
        "triton_kernels/clip_grad_norm.py",
        tests_of("adamw", k="triton-cpu"),
        {
            "triton: the norm of another column": (
                "address = tl.load(words + ADDRESSES + COLUMN)",
                "address = tl.load(words + ADDRESSES)",
            ),
        },
    ),
    *planted(
        "triton_kernels/drop_path.py",
        tests_of("drop_path", k="triton-cpu"),
        {
            "triton: DropPath: the mask of the first sample": (
                "value = tl.load(mask + sample_of_unit, mask=unit < size, other=0).to(WIDE)[:, None]",
                "value = tl.load(mask + sample, mask=unit < size, other=0).to(WIDE)[:, None]",
            ),
            "triton: DropPath: dropped branches are added": (
                "kept = inside & (value != 0)",
                "kept = inside & (value == value)",
            ),
        },
    ),
    *planted(
        "triton_kernels/drop_path.py",
        tests_of("drop_path_gradients", k="triton-cpu"),
        {
            "triton: DropPath: layer scale's gradient without the mask": (
                "total += (g * value * x).to(tl.float64)",
                "total += (g * x).to(tl.float64)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/adamw.cu",
        tests_of("adamw_types", k="cuda-cpu"),
        {
            "cuda: the last element left out": (
                "for (int64_t i = span.body + threadIdx.x; i < span.end; i += kThreads) {\n    update_one",
                "for (int64_t i = span.body + threadIdx.x; i < span.end - 1; i += kThreads) {\n    update_one",
            ),
            "cuda: exp_avg written to exp_avg_sq": (
                "put<T>(cells[kExpAvgSq], place, pack(exp_avg_sq, cells[kExpAvgSq].dtype));",
                "put<T>(cells[kExpAvgSq], place, pack(exp_avg, cells[kExpAvgSq].dtype));",
            ),
            "cuda: exp_avg_sq read as exp_avg's type": (
                "unpack(raw[kExpAvgSq], cells[kExpAvgSq].dtype, exp_avg_sq);",
                "unpack(raw[kExpAvgSq], cells[kExpAvg].dtype, exp_avg_sq);",
            ),
            "cuda: float64 in float32": ("if (chunk.row.cell(kParam).dtype == DType::float64)", "if (false)"),
        },
    ),
    *planted(
        "csrc/cuda/clip_grad_norm.cu",
        tests_of("ends", k="cuda-cpu"),
        {
            "cuda: an element too many in a norm": (
                "if (i >= span.body && i < span.end) total",
                "if (i >= span.body && i <= span.end) total",
            ),
            "cuda: an element too many is scaled": (
                "for (int64_t i = span.body + threadIdx.x; i < span.end; i += kThreads) {\n    store<T>",
                "for (int64_t i = span.body + threadIdx.x; i <= span.end; i += kThreads) {\n    store<T>",
            ),
            "cuda: an element of a norm left out": (
                "if (i >= span.body && i < span.end) total",
                "if (i > span.body && i < span.end) total",
            ),
        },
    ),
    *planted(
        "csrc/cuda/adamw.cu",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: maximize inverted": ("group[kMaximize] != 0", "group[kMaximize] == 0"),
            "cuda: a step is not skipped": ("decision.skips ? 0 : args.table.chunk_count", "args.table.chunk_count"),
            "cuda: step counts of a skipped step": (
                "if (!decision.skips) advance_steps(args.table);",
                "advance_steps(args.table);",
            ),
            "cuda: found_inf ignored": (
                "{step_coefficient(args.clips, norm, real(settings[kMaxNorm]), grad_scale),\n          found_inf || ",
                "{step_coefficient(args.clips, norm, real(settings[kMaxNorm]), grad_scale),\n          ",
            ),
            "cuda: skipped steps are not counted": ("*args.skipped_steps += 1;", "*args.skipped_steps += 0;"),
            "cuda: EMA towards the old parameter, in packs": (
                "ema_pack<T>(raw[kEMA], cells[kEMA].dtype, stored, cells[kParam].dtype, ema_decay)",
                "ema_pack<T>(raw[kEMA], cells[kEMA].dtype, raw[kParam], cells[kParam].dtype, ema_decay)",
            ),
            "cuda: EMA before the update, too, one by one": (
                "  store(cells[kExpAvg], i, exp_avg);\n  store(cells[kExpAvgSq], i, exp_avg_sq);\n",
                "  if (cells[kEMA].address != nullptr) ema_one(cells[kEMA], cells[kParam], i, ema_decay);\n"
                "  store(cells[kExpAvg], i, exp_avg);\n  store(cells[kExpAvgSq], i, exp_avg_sq);\n",
            ),
            "cuda: the grad scale left in": (
                "const double grad_scale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;",
                "const double grad_scale = 1.0;",
            ),
            "cuda: eps is the weight decay": ("real(group[kEps]),", "real(group[kWeightDecay]),"),
        },
    ),
    *planted(
        "csrc/cuda/common.cuh",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: the counter of blocks is not reset": ("if (last) *counter = 0;", ""),
        },
    ),
    *planted(
        "csrc/cuda/adamw.cu",
        tests_of("adamw_range", k="cuda-cpu"),
        {
            "cuda: a chunk too few": (
                "const int64_t chunks = decision.skips ? 0 : args.table.chunk_count;",
                "const int64_t chunks = decision.skips ? 0 : args.table.chunk_count - 1;",
            ),
            "cuda: the first group's settings for all": (
                "settings_of(settings + kGroups + group * kGroupWords)",
                "settings_of(settings + kGroups)",
            ),
            "cuda: another step count in a group": (
                "if (its_group != group || its_step != step) {",
                "if (its_group != group) {",
            ),
            "cuda: another group at a step count": (
                "if (its_group != group || its_step != step) {",
                "if (its_step != step) {",
            ),
            "cuda: step counts of a thread's first row": (
                "*addresses[k] = steps[k] + 1.0f;",
                "*addresses[k] = steps[0] + 1.0f;",
            ),
            "cuda: the last step count": (
                "row < table.row_count ? static_cast<float*>",
                "row < table.row_count - 1 ? static_cast<float*>",
            ),
        },
    ),
    *planted(
        "csrc/device_table.h",
        tests_of("ends"),
        {
            "cuda: chunks begin one too late": (
                "words.insert(words.end(), {row, i * chunk_numel});",
                "words.insert(words.end(), {row, (i + 1) * chunk_numel});",
            ),
        },
    ),
    *planted(
        "csrc/cuda/clip_grad_norm.cu",
        tests_of("cuda"),
        {
            "cuda: partial sums of the first row for all": (
                "join_partials<norm>(args.partials + first, 0, count, 1)",
                "join_partials<norm>(args.partials, 0, count, 1)",
            ),
            "cuda: rows of eight chunks": ("double sum = count <= kOfThread ?", "double sum = count < kOfThread ?"),
            "cuda: rows of 2048 chunks": (
                "count > kOfThread && count <= kOfWarp",
                "count > kOfThread && count < kOfWarp",
            ),
        },
    ),
    *planted(
        "csrc/cuda/clip_grad_norm.cu",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: the norm of another column": (
                "const Cell cell = chunk.row.cell(static_cast<int>(args.column));",
                "const Cell cell = chunk.row.cell(0);",
            ),
            "cuda: the norm keeps the grad scale": (
                "total = root<norm>(join_block<norm>(total, shared[1])) / grad_scale;",
                "total = root<norm>(join_block<norm>(total, shared[1]));",
            ),
        },
    ),
    *planted(
        "csrc/cuda/ema.cu",
        tests_of("ema_fused", k="cuda-cpu"),
        {
            "cuda: an average is not skipped": ("if (skip != nullptr && *skip) return;", ""),
        },
    ),
    *planted(
        "trainops/backends/cuda.py",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: the norm of the parameters": (
                '_GRADS = AdamWGroup.COLUMNS.index("grads")',
                '_GRADS = AdamWGroup.COLUMNS.index("params")',
            ),
        },
    ),
    *planted(
        "csrc/cuda/clip_grad_norm.cu",
        tests_of("grad_scale", k="cuda-cpu"),
        {
            "cuda: norms of rows keep the grad scale": ("root<norm>(sum) / grad_scale);", "root<norm>(sum));"),
        },
    ),
    *planted(
        "csrc/cuda/adamw.cu",
        tests_of("ends", k="cuda-cpu"),
        {
            "cuda: an element too many is updated": (
                "for (int64_t i = span.body + threadIdx.x; i < span.end; i += kThreads) {\n    update_one",
                "for (int64_t i = span.body + threadIdx.x; i <= span.end; i += kThreads) {\n    update_one",
            ),
        },
    ),
    *planted(
        "trainops/backends/cuda.py",
        tests_of("cuda"),
        {
            "cuda: words of another table": ("    if last == words:\n", "    if last is not None:\n"),
            "cuda: chunks of another table": ("sizes = _known(table.numels)", "sizes = len(table.numels)"),
        },
    ),
    *planted(
        "csrc/cuda/drop_path.cu",
        tests_of("drop_path", k="cuda-cpu"),
        {
            "cuda: DropPath: the mask of the chunk's first sample": (
                "mask[half] = load<T>(args.mask, own);",
                "mask[half] = load<T>(args.mask, sample.turn);",
            ),
        },
    ),
    *planted(
        "csrc/cuda/drop_path_backward.cu",
        tests_of("drop_path_gradients", k="cuda-cpu"),
        {
            "cuda: DropPath: the last channel's gradient": (
                "if (column < end) totals_of_warps",
                "if (column < end - 1) totals_of_warps",
            ),
        },
    ),
    *planted(
        "csrc/cuda/packs.cuh",
        tests_of("cuda", "adamw_types", "ends", k="cuda"),
        {
            "cuda: addresses at multiples of 8 are aligned": ("together_ % 16 != 0", "together_ % 8 != 0"),
            "cuda: halves of a 16-bit pack far apart": (
                "second = packed_ ? kHalf<T> : kHalf<T> * threads_",
                "second = kHalf<T> * threads_",
            ),
            "cuda: second halves beyond the end": ("sizeof(T) == 4 && second < span.body", "sizeof(T) == 4"),
            "cuda: one element too many in whole packs": (
                "((end - begin) & -granule)",
                "((end - begin + 1) & -granule)",
            ),
        },
    ),
    *planted(
        "csrc/bindings_cuda.cpp",
        tests_of("adamw", "grad_scale", k="cuda-cpu"),
        {
            "cuda: the grad scale for found_inf": (
                "args.found_inf = at<const float>(found_inf)",
                "args.found_inf = at<const float>(grad_scale)",
            ),
            "cuda: max_grad_norm is not passed on": ("args.clips = clips;", "args.clips = false;"),
        },
    ),
    *planted(
        "csrc/cuda/clip_grad_norm.cu",
        (),
        {
            "cuda: a factor of 1 is multiplied with": (
                "if (factor != 1.0) update_table",
                "update_table",
                "multiplying with 1 gives the same bits; the branch saves the reading",
            ),
        },
    ),
]
