"""Faults of statistics of tensors and steps, and of the guard against spikes: see ``mutants.py``."""

from mutants import planted, tests_of

CPU = tests_of("tensor_stats", k="cpu-cpu")
CUDA = tests_of("tensor_stats", k="cuda-cpu")
TRITON = tests_of("tensor_stats", k="triton")
REFERENCE = tests_of("tensor_stats", k="reference or parts or ranks or order or dict or bad")
STEP = tests_of("step_stats", k="reference or shards or not target")
GUARD_REFERENCE = tests_of("spike_guard", k="reference or not target")
GUARD_CPU = tests_of("spike_guard", k="cpu-cpu")
GUARD_CUDA = tests_of("spike_guard", k="cuda-cpu")
GUARD_TRITON = tests_of("spike_guard", k="triton")

STATISTICS = [
    *planted(
        "trainops/reference_statistics.py",
        REFERENCE,
        {
            "statistics: the mean of what is not finite": (
                "elements = torch.where(finite, x, 0.0)",
                "elements = x",
            ),
            "statistics: joined without the distance of means": (
                " + (rows[..., COUNT] * (means - mean).square()).sum(0)",
                "",
            ),
            "statistics: means joined without their counts": (
                "mean = (rows[..., COUNT] * means).sum(0) / count.clamp(min=1)",
                "mean = means.mean(0)",
            ),
            "statistics: zeros in the histogram": ("x.isfinite() & (x != 0)", "x.isfinite()"),
            "statistics: exponents are one too large": (
                "torch.frexp(wide(x))[1].long() - 1",
                "torch.frexp(wide(x))[1].long()",
            ),
        },
    ),
    *planted(
        "trainops/statistics_shards.py",
        tests_of("tensor_stats", k="ranks"),
        {
            "statistics: every copy counts": ("any(p.is_replicate() and at > 0", "any(p.is_replicate() and at > 9"),
        },
    ),
    *planted(
        "trainops/statistics.py",
        tests_of("tensor_stats", k="order"),
        {
            "statistics: devices in the order of their parts": ("if order != list(range(len(order))):", "if False:"),
        },
    ),
    *planted(
        "csrc/cpu/moments.h",
        CPU,
        {
            "statistics: what the center is off by, on the CPU": (
                " - state.count * off * off",
                "",
                "the center is off by half a unit in its last place, which the bound on deviations allows",
            ),
            "statistics: rows of non-finite elements are not looked at again": (
                "Moments::is_doubtful(state) ? 0 : body",
                "body",
            ),
            "statistics: zeros on the CPU": ("zeros += values[i] == T(0)", "zeros += values[i] == T(1)"),
            "statistics: the last elements on the CPU": (
                "if (begin == size) return state;",
                "if (begin > 0) return state;",
            ),
        },
    ),
    *planted(
        "csrc/cpu/exponents.cpp",
        tests_of("tensor_stats", k="cpu-cpu"),
        {
            "statistics: the last bins are not counted": (
                "for (int64_t i = body; i < size; ++i) ++",
                "if (false) for (int64_t i = body; i < size; ++i) ++",
            ),
            "statistics: one table of bins counts": (
                "for (int k = 0; k < kTables; ++k) counts",
                "for (int k = 0; k < 1; ++k) counts",
            ),
            "statistics: bins of another row": ("pieces[index].row * kExponentBins", "index * 0"),
        },
    ),
    *planted(
        "csrc/math/moments.h",
        CUDA,
        {
            "statistics: an element that does not exist": ("if (i >= count) continue;", "if (i > count) continue;"),
            "statistics: the distance of means": ("d * d * weight : T(0)", "d * weight : T(0)"),
            "statistics: squares that vanish in float": (
                " || (part.m2 < T(0x1p-100) && part.min < part.max)",
                "",
            ),
            "statistics: sums that overflow in float": (
                "!(part.l1 < T(INFINITY)) || !(part.m2 < T(INFINITY)) ||",
                "",
            ),
            "statistics: a bin of float64": ("(bits >> 52) - 1023 + 127", "(bits >> 52) - 1023 + 126"),
        },
    ),
    *planted(
        "csrc/cuda/reduce.cu",
        CUDA,
        {
            "statistics: a pack that is joined to nothing": (
                "at[0] = Statistic::join(at[0], Statistic::template gather<Wide>(x, count));",
                "at[0] = Statistic::template gather<Wide>(x, count);",
            ),
            "statistics: the histogram of the first row": (
                "args.histogram + chunk.row_index * kExponentBins",
                "args.histogram",
            ),
        },
    ),
    *planted(
        "triton_kernels/moments.py",
        TRITON,
        {
            "statistics: the center of lanes": (
                "- number * off * off",
                "",
                "the center is off by half a unit in its last place, which the bound on deviations allows",
            ),
            "statistics: lanes that are not finite": ("x = tl.where(seen, x, 0.0)", "x = x"),
            "statistics: chunks without the distance of means": (
                "tl.where(weight > 0.0, d * d * weight, 0.0)",
                "0.0",
            ),
            "statistics: squares that vanish in Triton": ("overflows | ((state[M2]", "overflows & ((state[M2]"),
        },
    ),
    *planted(
        "trainops/step_stats.py",
        STEP,
        {
            "step statistics: gradients stay scaled": ("grads if scale is None else grads.divided(scale)", "grads"),
            "step statistics: updates with the wrong sign": (").neg_()", ")"),
            "step statistics: the weight without its master": (
                "wide(self._weight_of(param).detach())",
                "wide(param.detach())",
            ),
            "step statistics: one step early": ("step = self._stats_step() + 1\n", "step = self._stats_step() + 2\n"),
            "step statistics: the count of a state that was taken": (
                "group[OWN_STATE] = {**group.get(OWN_STATE, {}), KEY: self._stats_step() + 1}",
                "group.setdefault(OWN_STATE, {})[KEY] = self._stats_step() + 1",
            ),
            "step statistics: the weight is not copied": (
                "copy.clone() if weight is param and copy.dtype == param.dtype else copy",
                "copy",
            ),
        },
    ),
    *planted(
        "trainops/adapters/_control.py",
        GUARD_REFERENCE,
        {
            "guard: a spike is learned": ("learns = seen & ~spike & ~skips", "learns = seen & ~skips"),
            "guard: a step that others skip is learned": (
                "learns = seen & ~spike & ~skips",
                "learns = seen & ~spike",
            ),
            "guard: it never forgets": ("forgets = seen & spike & (further >= patience)", "forgets = spike & ~spike"),
            "guard: a norm that is not finite": ("spike = ~finite | (norm", "spike = (norm"),
            "guard: it judges while it warms up": ("(count >= warmup) & ", ""),
            "guard: its verdict is not heard": (
                "skipped = spike if skipped is None else spike | skipped.to(spike.device)",
                "pass",
            ),
        },
    ),
    *planted(
        "trainops/spike_guard.py",
        GUARD_REFERENCE,
        {
            "guard: a loaded state takes the tensor's place": (
                "group[OWN_STATE] = {**group.get(OWN_STATE, {}), KEY: held}",
                "pass",
            ),
            "guard: what was learned is not loaded": ("held[:LEARNED] = loaded[:LEARNED].to(held)", "pass"),
            "guard: new settings forget": ("numbers[:LEARNED] = found[:LEARNED].to(numbers)", "pass"),
        },
    ),
    *planted(
        "csrc/math/guard.h",
        GUARD_CPU,
        {
            "guard: a spike is learned in C++": ("} else if (!skips) {", "}\n  if (!skips) {"),
            "guard: deviations are not squared": ("(guard.variance + rate * d * d)", "(guard.variance + rate * d)"),
            "guard: the count of spikes in a row stays": ("    guard.spikes = 0.0;\n", ""),
            "guard: hardly a deviation": ("kLeastDeviation = 0.05", "kLeastDeviation = 0.0"),
        },
    ),
    *planted(
        "csrc/cpu/module.cpp",
        GUARD_CPU,
        {
            "guard: the CPU's step is taken": ("decision.skips |= guard->verdict != 0.0;", ""),
        },
    ),
    *planted(
        "csrc/cuda/reduce.cu",
        GUARD_CUDA,
        {
            "guard: found_inf is not asked for": (
                "judged(*args.guard, result, is_set(args.found_inf))",
                "judged(*args.guard, result, false)",
            ),
        },
    ),
    *planted(
        "csrc/cuda/control.cuh",
        GUARD_CUDA,
        {
            "guard: CUDA's step is taken": ("args.guard->verdict != 0.0", "args.guard->verdict == 3.0"),
            "cuda: every block counts a skipped step": (
                "if (blockIdx.x != 0 || threadIdx.x != 0) return;",
                "if (threadIdx.x != 0) return;",
            ),
        },
    ),
    *planted(
        "triton_kernels/control.py",
        GUARD_TRITON,
        {
            "guard: a spike is learned in Triton": (
                "learns = seen & (spike == 0) & (skipped == 0)",
                "learns = seen & (skipped == 0)",
            ),
            "guard: it never forgets in Triton": (
                "kept, further = tl.where(forgets, 0.0, 1.0),",
                "kept, further = 1.0,",
            ),
        },
    ),
]
