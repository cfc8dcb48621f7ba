"""Faults of the GPU backends: see ``mutants.py``."""

from mutants import planted, tests_of

TRITON_AND_CUDA = [
    *planted(
        "triton_kernels/storage.py",
        tests_of("ends", k="triton-cpu"),
        {
            "triton: a masked store takes one element more": (
                "tl.store(pointers, values, mask=offset + tl.arange(0, BLOCK) < end)",
                "tl.store(pointers, values, mask=offset + tl.arange(0, BLOCK) <= end)",
            ),
            "triton: a masked load takes one element more": (
                "tl.load(pointers, mask=offset + tl.arange(0, BLOCK) < end, other=0)",
                "tl.load(pointers, mask=offset + tl.arange(0, BLOCK) <= end, other=0)",
            ),
        },
    ),
    *planted(
        "triton_kernels/_common.py",
        tests_of("ends", k="triton-cpu"),
        {
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
            "triton: 1 - beta1 for 1 - beta2": ("tl.store(out + 4, 1.0 - beta2)", "tl.store(out + 4, 1.0 - beta1)"),
            "triton: AMSGrad takes the smaller": (
                "second_moment = tl.maximum(max_exp_avg_sq, exp_avg_sq",
                "second_moment = tl.minimum(max_exp_avg_sq, exp_avg_sq",
            ),
        },
    ),
    *planted(
        "triton_kernels/update.py",
        tests_of("adamw_types", k="triton-cpu"),
        {
            "triton: exp_avg written to exp_avg_sq": (
                "store_state(state1_address, numel, offset, end, state1, STATE1_TYPE",
                "store_state(state1_address, numel, offset, end, state0, STATE1_TYPE",
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
            "triton: maximize ignored": ("!= 0.0, -coefficient, coefficient)", "!= 0.0, coefficient, coefficient)"),
        },
    ),
    *planted(
        "triton_kernels/control.py",
        tests_of("adamw", k="triton-cpu"),
        {
            "triton: found_inf ignored": ("skipped = tl.load(found_inf) != 0", "skipped = tl.load(found_inf) == 3"),
            "triton: the grad scale left in": ("    factor = inverse_scale\n", "    factor = 1.0\n"),
        },
    ),
    *planted(
        "triton_kernels/update.py",
        tests_of("adamw", k="triton-cpu"),
        {
            "triton: a step is not skipped": (
                "        if tl.load(skip) != 0:\n            return",
                "        if tl.load(skip) == 2:\n            return",
            ),
            "triton: skipped steps are not counted": ("tl.where(skipped, 1, 0)", "tl.where(skipped, 0, 0)"),
            "triton: EMA towards the unrounded parameter": (
                "follow(average_address, offset, end, weight, decay,",
                "follow(average_address, offset, end, param, decay,",
            ),
        },
    ),
    *planted(
        "trainops/adapters/triton.py",
        tests_of("adamw_types", k="triton-cpu"),
        {
            "triton: exp_avg_sq has exp_avg's type": (
                'f"STATE{i}_TYPE": name for i, name in enumerate(state)',
                'f"STATE{i}_TYPE": state[0] for i, name in enumerate(state)',
            ),
            "triton: gradients of exp_avg's type": ('"GRAD_TYPE": "grad"', '"GRAD_TYPE": "exp_avg"'),
            "triton: float64 in float32": ('wide={"WIDE": ("PARAM_TYPE",)}', 'wide={"WIDE": ()}'),
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
        "trainops/adapters/triton.py",
        tests_of("adamw", k="triton-cpu"),
        {
            "triton: the norm of the parameters": (
                'partial_results("l2_norm", "grad")',
                'partial_results("l2_norm", "param")',
            ),
        },
    ),
    *planted(
        "triton_kernels/control.py",
        tests_of("grad_scale", k="triton-cpu"),
        {
            "triton: the grad scale taken out twice": (
                "factor = inverse_scale * tl.where(ratio",
                "factor = inverse_scale * inverse_scale * tl.where(ratio",
            ),
        },
    ),
    *planted(
        "triton_kernels/update.py",
        tests_of("grad_scale", k="triton-cpu"),
        {
            "triton: the norm keeps the grad scale": (
                'norm = result_of(partials, 0, chunk_count, "l2_norm", BLOCK) * inverse_scale',
                'norm = result_of(partials, 0, chunk_count, "l2_norm", BLOCK)',
            ),
        },
    ),
    *planted(
        "triton_kernels/update.py",
        tests_of("adamw_range", k="triton-cpu"),
        {
            "triton: step counts are not written": ("    if begin == 0:\n", "    if begin < 0:\n"),
            "triton: the first row's step count for all": (
                "tl.store(step, tl.load(row_scalars + NEW_STEP)",
                "tl.store(step, tl.load(scalars + NEW_STEP)",
            ),
            "triton: the first group's settings for all": (
                "group = settings + GROUPS + tl.load(words + GROUP) * GROUP_WORDS",
                "group = settings + GROUPS",
            ),
        },
    ),
    *planted(
        "triton_kernels/statistics.py",
        tests_of("triton_sums"),
        {
            "triton: tiny squares are not gathered again": ("| (state[0] < 2.0**-100)", "| (state[0] < 0.0)"),
            "triton: huge squares are not gathered again": ('(state[0] == float("inf")) |', "(state[0] == 3.0) |"),
            "triton: runs are joined in float32": ("SHORT = tl.constexpr(3)", "SHORT = tl.constexpr(30)"),
        },
    ),
    *planted(
        "triton_kernels/statistics.py",
        tests_of("ptx_triton", k="a_sample"),
        {
            "triton: lanes are joined in the compiler's order": (
                "(sum_in_pairs(states[0]).to(tl.float64),)",
                "(tl.sum(states[0].to(tl.float64), axis=0),)",
            ),
        },
    ),
    *planted(
        "trainops/adapters/_triton.py",
        tests_of("triton_sums"),
        {
            "triton: the lanes of a norm depend on the type": (
                "            itemsize=kernels()._common.SMALLEST,\n",
                "",
            ),
        },
    ),
    *planted(
        "csrc/core/device_words.h",
        tests_of("core", "triton_sums"),
        {
            "device tables: partial results in the order of sections": (
                "words[begin + kFirstChunk] = first_chunks_[row];",
                "words[begin + kFirstChunk] = positions_[row];",
            ),
        },
    ),
    *planted(
        "triton_kernels/drop_path.py",
        tests_of("drop_path_rows", k="small_chunks"),
        {
            "triton: DropPath: runs overlap": (
                "for first_round in range(0, size, RUN * ROUND):",
                "for first_round in range(0, size, ROUND):",
            ),
            "triton: DropPath: only the last run counts": (
                "total += run.to(tl.float64)",
                "total = run.to(tl.float64)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/drop_path_backward.cu",
        tests_of("drop_path_gradients", k="cuda-cpu"),
        {
            "cuda: DropPath: runs overlap": ("first += kRun * kWarps", "first += kWarps"),
            "cuda: DropPath: only the last run counts": (
                "total_of(j) += static_cast<double>(run[j]);",
                "total_of(j) = static_cast<double>(run[j]);",
            ),
        },
    ),
    *planted(
        "triton_kernels/reduce.py",
        tests_of("ends", k="triton-cpu"),
        {
            "triton: partial sums of the first row for all": (
                "first = tl.load(words + FIRST_CHUNK)",
                "first = tl.load(rows + FIRST_CHUNK)",
            ),
        },
    ),
    *planted(
        "trainops/adapters/_triton.py",
        tests_of("ends", k="triton-cpu"),
        {
            "triton: a program too few": ("kernel[(programs,)]", "kernel[(max(1, programs - 1),)]"),
        },
    ),
    *planted(
        "csrc/core/table_builder.h",
        tests_of("core", "core_rows", "tables"),
        {
            "tables: lazily negated single elements": (
                "if (maybe_negated(tensors[i], description)) return false;",
                "",
            ),
            "tables: subclasses taken for tensors": ("!reader.is_plain(tensors[i]) || ", ""),
            "tables: step counts of any type": ("description.cell.dtype != DType::float32", "false"),
            "tables: the second device is not noticed": (
                "return device_id == description.device_id;",
                "return true;",
            ),
        },
    ),
    *planted(
        "csrc/core/device_words.h",
        tests_of("core"),
        {
            "device tables: rows of one section": (
                "const auto [entry, is_new] = known.try_emplace(kind, found.size());",
                "const auto [entry, is_new] = known.try_emplace(std::vector<DType>{}, found.size());",
            ),
            "device tables: a layout without sizes": ("      words.push_back(table_.numel(row));\n", ""),
            "device tables: chunks of a section's first row": (
                "positions_[row] = all_chunks_;",
                "positions_[row] = first;",
            ),
        },
    ),
    *planted(
        "csrc/core/table.h",
        tests_of("core"),
        {
            "device tables: dtypes of the column before": (
                "<< (kDTypeBits * column)",
                "<< (kDTypeBits * column + kDTypeBits)",
            ),
        },
    ),
    *planted(
        "triton_kernels/_common.py",
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
                "run += g * value * x",
                "run += g * x",
            ),
        },
    ),
    *planted(
        "csrc/cuda/update.cu",
        tests_of("adamw_types", k="cuda-cpu"),
        {
            "cuda: the last element left out": (
                "range.end + threadIdx.x % kWarp : range.end;",
                "range.end + threadIdx.x % kWarp : range.end - 1;",
            ),
            "cuda: exp_avg written to exp_avg_sq": (
                "cells.is_signed(i), state[i], random);",
                "cells.is_signed(i), state[0], random);",
            ),
            "cuda: exp_avg_sq read as exp_avg's type": (
                "(raw[kState + i], cells.at[kState + i].dtype,",
                "(raw[kState + i], cells.at[kState].dtype,",
            ),
            "cuda: float64 in float32": (
                "if (is_updated && chunk.row.cell(kParam).dtype == DType::float64)",
                "if (false)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/transform.cu",
        tests_of("ends", k="cuda-cpu"),
        {
            "cuda: an element too many is scaled": (
                "for (int64_t i = range.body + threadIdx.x; i < range.end; i += kThreads) {\n    store(",
                "for (int64_t i = range.body + threadIdx.x; i <= range.end; i += kThreads) {\n    store(",
            ),
        },
    ),
    *planted(
        "csrc/cuda/reduce.cu",
        tests_of("ends", k="cuda-cpu"),
        {
            "cuda: an element of a norm left out": ("if (first < body) continue;", "if (first <= body) continue;"),
            "cuda: the elements after the last pack of a norm begin a tile late": (
                "for (int64_t tile = last_tile; tile < chunk.end;",
                "for (int64_t tile = last_tile + kTile<T>; tile < chunk.end;",
            ),
        },
    ),
    *planted(
        "csrc/cuda/reduce.cu",
        tests_of("norm_sums", k="cuda-cpu"),
        {
            "cuda: a norm is not gathered again": (
                "if constexpr (sizeof(T) < sizeof(double)) {",
                "if constexpr (false) {",
            ),
            "cuda: a norm is gathered again in float32": (
                "Runs<Statistic, T, double> wide;",
                "Runs<Statistic, T, T> wide;",
            ),
            "cuda: the warps of a norm are joined in float32": (
                "return join_lanes<Statistic, kWarps>(Statistic::widen(run));",
                "return Statistic::widen(join_lanes<Statistic, kWarps>(run));",
            ),
        },
    ),
    *planted(
        "csrc/cuda/packs.cuh",
        tests_of("ends", k="cuda-cpu"),
        {
            "cuda: an element too many in a norm": ("x[j] = j < count ?", "x[j] = j <= count ?"),
        },
    ),
    *planted(
        "csrc/cuda/control.cuh",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: step counts of a skipped step": (
                "if (blockIdx.x != 0 || threadIdx.x != 0) return;",
                "if (is_last_block(args.counters)) advance_steps(args.table);\n"
                "  if (blockIdx.x != 0 || threadIdx.x != 0) return;",
            ),
            "cuda: found_inf ignored": ("*args.found_inf != 0.0f", "*args.found_inf == 3.0f"),
            "cuda: skipped steps are not counted": ("*args.skipped_steps += 1;", "*args.skipped_steps += 0;"),
            "cuda: the grad scale left in": (
                "const double grad_scale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;",
                "const double grad_scale = 1.0;",
            ),
            "cuda: the settings of a group begin one too late": (
                "setting(own + i * kSettingWords)",
                "setting(own + (i + 1) % kSettings<Rule> * kSettingWords)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/update.cu",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: a step is not skipped": ("if (decision.skips) return", "if (false) return"),
            "cuda: EMA towards the old parameter, in packs": (
                "offset.first, followed, followed_dtype",
                "offset.first, raw[kParam], weight.param.dtype",
            ),
            "cuda: EMA before the update, too, one by one": (
                "  store<is_special>(with_random<is_special>(weight, random), i, param);\n",
                "  if (row.cell(kAverage).address) ema_one<false>(row.cell(kAverage), weight, i, ema_decay.decay);\n"
                "  store<is_special>(with_random<is_special>(weight, random), i, param);\n",
            ),
        },
    ),
    *planted(
        "csrc/cuda/common.cuh",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: the counter of blocks is not reset": ("      *counter = 0;\n", ""),
        },
    ),
    *planted(
        "csrc/cuda/update.cu",
        tests_of("adamw_range", k="cuda-cpu"),
        {
            "cuda: a chunk too few": (
                "ChunkQueue queue(args.table, args.table.all_chunks, ",
                "ChunkQueue queue(args.table, args.table.all_chunks - 1, ",
            ),
            "cuda: the first group's settings for all": (
                "settings_of<Rule>(for_rows.words, group)",
                "settings_of<Rule>(for_rows.words, 0)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/control.cuh",
        tests_of("adamw_range", k="cuda-cpu"),
        {
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
        "csrc/core/device_words.h",
        tests_of("ends"),
        {
            "cuda: chunks begin one too late": (
                "words[begin + kChunkBegin] = i * chunk_numel_;",
                "words[begin + kChunkBegin] = (i + 1) * chunk_numel_;",
            ),
        },
    ),
    *planted(
        "csrc/cuda/reduce.cu",
        tests_of("cuda"),
        {
            "cuda: partial sums of the first row for all": (
                "[&](int64_t i) { return of_row + i; }",
                "[&](int64_t i) { return partials + i; }",
            ),
            "cuda: partial sums of every 256th thread alone": (
                "if (i + k * kThreads >= count) continue;",
                "if (i + k * kThreads >= count || k > 0) continue;",
            ),
            "cuda: a row of two chunks is finished by the first": ("if (count > 1) {", "if (count > 2) {"),
            "cuda: all rows share a counter": (
                "&args.counters->rows[chunk.row_index]",
                "&args.counters->rows[0]",
            ),
            "cuda: a row's state stays that of its first chunk": (
                "if (threadIdx.x == 0) *of_row = state;",
                "",
            ),
            "cuda: norms of rows in another's place": (
                "args.out_is_double, chunk.row_index)",
                "args.out_is_double, args.table.row_count - 1 - chunk.row_index)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/reduce.cu",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: the norm of another column": (
                "const Cell cell = chunk.row.cell(static_cast<int>(args.column));",
                "const Cell cell = chunk.row.cell(0);",
            ),
            "cuda: the norm keeps the grad scale": (
                "write_results<Statistic>(total, grad_scale,",
                "write_results<Statistic>(total, 1.0,",
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
        "csrc/core/schema.h",
        tests_of("adamw", k="cuda-cpu"),
        {
            "cuda: the norm of the parameters": (
                "{TRAINOPS_STEP_COLUMNS(TRAINOPS_COLUMN)}, {}, kGrad}",
                "{TRAINOPS_STEP_COLUMNS(TRAINOPS_COLUMN)}, {}, kParam}",
            ),
        },
    ),
    *planted(
        "csrc/cuda/reduce.cu",
        tests_of("grad_scale", k="cuda-cpu"),
        {
            "cuda: norms of rows keep the grad scale": (
                "write_results<Statistic>(state, grad_scale,",
                "write_results<Statistic>(state, 1.0,",
            ),
        },
    ),
    *planted(
        "csrc/cuda/update.cu",
        tests_of("ends", k="cuda-cpu"),
        {
            "cuda: an element too many is updated": (
                "range.end + threadIdx.x % kWarp : range.end;",
                "range.end + threadIdx.x % kWarp : range.end + 1;",
            ),
        },
    ),
    *planted(
        "csrc/cuda/module.cpp",
        tests_of("host_side"),
        {
            "cuda: an update holds the interpreter lock": ("  py::gil_scoped_release release;\n", ""),
            "cuda: launches hold the interpreter lock": (
                "py::call_guard<py::gil_scoped_release>",
                "py::call_guard<>",
            ),
        },
    ),
    *planted(
        "csrc/cuda/control.cuh",
        tests_of("host_side"),
        {
            "cuda: a limit on the device is taken for a number": (
                "setting(words + kMaxNorm)",
                "real(words[kMaxNormValue])",
            ),
        },
    ),
    *planted(
        "triton_kernels/control.py",
        tests_of("host_side"),
        {
            "triton: a limit on the device is taken for a number": (
                "setting(settings + MAX_NORM, 0)",
                "real(tl.load(settings + MAX_NORM + VALUE))",
            ),
        },
    ),
    *planted(
        "trainops/uploads.py",
        tests_of("cuda"),
        {
            "cuda: words of another table": ("if last == words else", "if last is not None else"),
        },
    ),
    *planted(
        "trainops/adapters/_device.py",
        tests_of("cuda"),
        {
            "cuda: chunks of another table": ("layout = known(words.layout)", "layout = len(words.layout)"),
        },
    ),
    *planted(
        "csrc/cuda/drop_path.cu",
        tests_of("drop_path", k="cuda-cpu"),
        {
            "cuda: DropPath: the mask of the chunk's first sample": (
                "mask[half] = load_operand<T>(args.mask, own);",
                "mask[half] = load_operand<T>(args.mask, sample.turn);",
            ),
        },
    ),
    *planted(
        "csrc/cuda/drop_path_backward.cu",
        tests_of("drop_path_gradients", k="cuda-cpu"),
        {
            "cuda: DropPath: the last channel's gradient": (
                "if (lane.column(j) < end) total_of(j) +=",
                "if (lane.column(j) < end - 1) total_of(j) +=",
            ),
        },
    ),
    *planted(
        "csrc/cuda/lanes.cuh",
        tests_of("cuda", "adamw_types", "ends", k="cuda"),
        {
            "cuda: halves of a 16-bit pack far apart": (
                "second = has_narrow_ ? kHalf<T> : kHalf<T> * threads_",
                "second = kHalf<T> * threads_",
            ),
            "cuda: second halves beyond the end": ("sizeof(T) == 4 && second < range.body", "sizeof(T) == 4"),
            "cuda: one element too many in whole packs": (
                "((end - begin) & -granule)",
                "((end - begin + 1) & -granule)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/module.cpp",
        tests_of("adamw", "grad_scale", k="cuda-cpu"),
        {
            "cuda: a swapped pair of addresses": (
                "args.partials = at<void>(partials);\n  args.total = at<double>(total);",
                "args.partials = at<void>(total);\n  args.total = at<double>(partials);",
            ),
            "cuda: the grad scale for found_inf": (
                "args.found_inf = at<const float>(found_inf);\n  args.clips",
                "args.found_inf = at<const float>(grad_scale);\n  args.clips",
            ),
            "cuda: max_grad_norm is not passed on": ("args.clips = clips;", "args.clips = false;"),
        },
    ),
    *planted(
        "csrc/cuda/transform.cu",
        (),
        {
            "cuda: a factor of 1 is multiplied with": (
                "if (factor != 1.0) transform_table",
                "transform_table",
                "multiplying with 1 gives the same bits; the branch saves the reading",
            ),
        },
    ),
]
