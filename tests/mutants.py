"""Small faults that tests must notice, as data: `make mutants` (``mutate.py``) plants them one at a time.

Here are those of C++; ``mutants_python.py`` has those of Python, ``mutants_storage.py`` those of low precision,
``mutants_gpu.py`` those of Triton and CUDA, and ``mutants_queue.py`` those of CUDA's queue and accesses.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault: what stands in a file, exactly once, what is put in its place, and the tests that should notice."""

    name: str
    file: str
    tests: tuple[str, ...]
    old: str
    new: str
    no_fault: str = ""  # why the change turned out to be harmless


def planted(file, tests, faults):
    """The faults of one file, each as ``name: (old, new)``, or with the reason why it is no fault."""
    return [Mutant(name, file, tests, *change) for name, change in faults.items()]


def tests_of(*files, k=""):  # noqa: PT028 (no test)
    """Arguments for pytest."""
    return (*(f"tests/test_{file}.py" for file in files), *(("-k", k) if k else ()))


CPU_ADAMW = tests_of("adamw", k="cpu-cpu")
CPU_EMA = tests_of("ema", "ema_fused", k="cpu-cpu")
CPU_CLIP = tests_of("clip_grad", k="cpu-cpu")
CPU_DROP_PATH = tests_of("drop_path", "drop_path_gradients", "drop_path_rows", k="cpu-cpu")

C_PLUS_PLUS = [
    *planted(
        "csrc/math/adamw.h",
        CPU_ADAMW,
        {
            "AdamW: maximize ignored": (
                "s.maximize != 0.0 ? -grad_coefficient",
                "s.maximize != 0.0 ? grad_coefficient",
            ),
            "AdamW: decay with the wrong sign": ("1.0 - s.lr * s.weight_decay", "1.0 + s.lr * s.weight_decay"),
            "AdamW: decay forgotten": ("param = param * s.keep - ", "param = param - "),
            "AdamW: beta1 for beta2": ("state[kExpAvgSq] * s.beta2", "state[kExpAvgSq] * s.beta1"),
            "AdamW: bias correction with the other beta": (
                "bias_correction(s.beta1, step)",
                "bias_correction(s.beta2, step)",
            ),
            "AdamW: eps not scaled": ("s.eps * correction2_sqrt", "s.eps"),
            "AdamW: AMSGrad takes the smaller": ("largest > v || largest", "largest < v || largest"),
            "AdamW: gradient not scaled": (
                "take(param, s.coefficient * grad, state, s);",
                "take(param, (s.coefficient < T(0) ? T(-1) : T(1)) * grad, state, s);",
            ),
            "AdamW: second moment of the unclipped gradient": (
                "s.weight2 * g * g",
                "s.weight2 * g * g / (s.coefficient * s.coefficient)",
            ),
            "AdamW: first moment of few betas alone": (
                "g - s.beta1 * difference;",
                "state[kExpAvg] + s.beta1 * difference;",
            ),
        },
    ),
    *planted(
        "csrc/math/ema.h",
        CPU_EMA,
        {
            "EMA: weight and complement exchanged": (
                "average + w.weight * difference;\n  const",
                "average + w.complement * difference;\n  const",
            ),
            "EMA: large weights": ("param - w.complement * difference", "param - w.weight * difference"),
            "EMA: equal infinities": ("(param == average || w.weight == T(0))", "(w.weight == T(0))"),
            "EMA: decay 0 is no copy": ("return w.complement == T(0) ? param : kept;", "return kept;"),
        },
    ),
    *planted(
        "csrc/math/control.h",
        CPU_ADAMW,
        {
            "clip: no cap at 1": ("return coefficient > 1.0 ? 1.0 : coefficient;", "return coefficient;"),
        },
    ),
    *planted(
        "csrc/cpu/reduce.cpp",
        CPU_CLIP,
        {
            "cpu: the tail of a norm": (
                "for (int64_t i = tail; i < size; ++i)",
                "for (int64_t i = tail; i < size - 1; ++i)",
            ),
            "cpu: a stream of the norm begins at another's place": (
                "values + s * stream + i",
                "values + s / 2 * stream + i",
            ),
        },
    ),
    *planted(
        "csrc/cpu/reduce.cpp",
        tests_of("norm_sums", k="cpu-cpu"),
        {
            "cpu: the runs of a norm are too long": ("kOfStream = 2;", "kOfStream = 64;"),
            "cpu: only the last run of a norm counts": (
                "states[lane] = Statistic::join(states[lane], Statistic::widen(runs[lane]));",
                "states[lane] = Statistic::widen(runs[lane]);",
            ),
            "cpu: a norm is not gathered again": (
                "|| !Statistic::is_doubtful(state)) return state;",
                "|| true) return state;",
            ),
            "cpu: a norm is gathered again in float32": (
                "return reduce_in<Isa, Statistic, double>(values, size);",
                "return reduce_in<Isa, Statistic, Wide<S>>(values, size);",
            ),
        },
    ),
    *planted(
        "csrc/math/statistics.h",
        tests_of("norm_sums", k="cpu-cpu"),
        {
            "clip: tiny squares are not gathered again": ("|| sum < T(0x1p-100)", ""),
            "clip: squares of 2^-102 are not gathered again": ("T(0x1p-100)", "T(0x1p-104)"),
            "clip: more squares are gathered again than need be": ("T(0x1p-100)", "T(0x1p-96)"),
            "clip: huge squares are not gathered again": ("sum == T(INFINITY) || sum", "sum"),
            "clip: huge sums are not gathered again": ("return sum == T(INFINITY);", "return false;"),
        },
    ),
    *planted(
        "csrc/math/statistics.h",
        CPU_CLIP,
        {
            "clip: the norm without its root": ("out[0] = std::sqrt(sum);", "out[0] = sum;"),
            "clip: NaN lost in a maximum": ("(b > a || b != b)", "(b > a)"),
        },
    ),
    *planted(
        "csrc/math/transform.h",
        CPU_CLIP,
        {
            "clamp: one side": ("x < -bound ? -bound : x", "x"),
        },
    ),
    *planted(
        "csrc/math/control.h",
        tests_of("adamw", k="scaler and cpu-cpu"),
        {
            "clip: the grad scale is not taken out": ("{clipped / grad_scale, ", "{clipped, "),
        },
    ),
    *planted(
        "csrc/math/storage.h",
        CPU_ADAMW,
        {
            "bfloat16 truncated": ("bits + 0x7fffu + ((bits >> 16) & 1u)", "bits"),
        },
    ),
    *planted(
        "csrc/math/storage.h",
        tests_of("tables"),
        {
            "bfloat16: ties to odd": ("bits + 0x7fffu + ((bits >> 16) & 1u)", "bits + 0x8000u - ((bits >> 16) & 1u)"),
            "float16: subnormal numbers lost": (
                "sign | (magnitude < 0x0400u ? subnormal : normal)",
                "sign | (magnitude < 0x0400u ? 0u : normal)",
            ),
        },
    ),
    *planted(
        "csrc/math/drop_path.h",
        CPU_DROP_PATH,
        {
            "DropPath: the product is not rounded": (
                "has_layer_scale ? round(branch * layer_scale) : branch",
                "has_layer_scale ? branch * layer_scale : branch",
            ),
            "DropPath: the mask does not scale": (
                "return round(scaled * mask);",
                "return mask == T(0) ? round(scaled * mask) : scaled;",
            ),
        },
    ),
    *planted(
        "csrc/cpu/elements.h",
        CPU_ADAMW,
        {
            "cpu: the last odd bfloat16": ("if ((end - begin) % 2 == 1) apply(end - 1);", ""),
            "cpu: the last element of a tile": (
                "for (int64_t i = begin; i < end; ++i) apply(i);",
                "for (int64_t i = begin; i + 1 < end; ++i) apply(i);",
            ),
        },
    ),
    *planted(
        "csrc/cpu/row.h",
        tests_of("tables", "adamw_types", k="cpu"),
        {
            "cpu: exp_avg_sq written to exp_avg": (
                "cpu::store(row.state[i], begin, size, columns[i]);",
                "cpu::store(row.state[0], begin, size, columns[i]);",
            ),
        },
    ),
    *planted(
        "csrc/cpu/update.cpp",
        CPU_EMA,
        {
            "cpu: EMA before the update, too": (
                "    state.load(row, begin, size);\n",
                "    move_averages(row, begin, size, ema_decays);\n    state.load(row, begin, size);\n",
            ),
            "cpu: EMA forgotten": ("if (row.average[i].dtype != DType::none) ema_tile", "if (false) ema_tile"),
        },
    ),
    *planted(
        "csrc/cpu/update.cpp",
        CPU_ADAMW,
        {
            "cpu: step counts are not written": ("address) += 1.0f;", "address) + 1.0f;"),
        },
    ),
    *planted(
        "csrc/cpu/update.cpp",
        tests_of("adamw_drop_in", k="cpu-cpu"),
        {
            "cpu: a group's settings for the next": ("if (i == 0 || step != last_step)", "if (step != last_step)"),
        },
    ),
    *planted(
        "csrc/cpu/convert.h",
        tests_of("tables", "adamw_types", k="cpu"),
        {
            "cpu: the dtype of the first tensor for all": (
                "return cell.dtype == dtype || cell.dtype == DType::none;",
                "return true;",
            ),
            "cpu: a wide result is not written back": (
                "if (cell.dtype != dtype_of<S>) write(cell, begin, size, values);",
                "",
            ),
        },
    ),
    *planted(
        "csrc/math/control.h",
        CPU_ADAMW,
        {
            "cpu: found_inf ignored": ("found_inf || (control", "(control"),
            "cpu: non-finite gradients are not skipped": (
                "found_inf || (control.skip_nonfinite && !is_finite(norm))",
                "found_inf",
            ),
        },
    ),
    *planted(
        "csrc/cpu/module.cpp",
        tests_of("grad_scale", k="cpu-cpu"),
        {
            "cpu: norms of rows keep the grad scale": ("for (double& row : result.rows) row /= grad_scale;", ""),
        },
    ),
    *planted(
        "csrc/cpu/chunks.h",
        CPU_ADAMW,
        {
            "cpu: pieces one element short": (
                "size = left < kChunkNumel ? left : kChunkNumel;",
                "size = left < kChunkNumel ? left - (begin > 0) : kChunkNumel;",
            ),
        },
    ),
    *planted(
        "csrc/core/tensor.h",
        tests_of("tables"),
        {
            "cpu: strides are not compared": ("if (strides[i] != other.strides[i] && numel > 0) return false;", ""),
            "cpu: gaps count as dense": ("if (i == ndim) return false;", "if (i == ndim) return true;"),
        },
    ),
    *planted(
        "csrc/cpu/drop_path.h",
        CPU_DROP_PATH,
        {
            "cpu: a sample's mask for the next": (
                "tile = {tile.sample + 1, 0, tile.size}",
                "tile = {tile.sample, 0, tile.size}",
            ),
        },
    ),
    *planted(
        "csrc/cpu/drop_path.cpp",
        CPU_DROP_PATH,
        {
            "cpu: layer scale starts at the wrong channel": (
                "layer_scale.data() + begin % period",
                "layer_scale.data() + tile.begin % period",
            ),
        },
    ),
    *planted(
        "csrc/cpu/drop_path_small.cpp",
        tests_of("drop_path_small"),
        {
            "cpu: small masks are not scaled": ("widen(values[i]) / divisor", "widen(values[i])"),
            "cpu: dropped small samples are not restored": ("if (dropped) std::memcpy", "if (false) std::memcpy"),
        },
    ),
    *planted(
        "csrc/cpu/drop_path_backward.cpp",
        CPU_DROP_PATH,
        {
            "cpu: layer scale's gradient forgets rows": (
                "row + step < size; row += 2 * step",
                "row + 2 * step < size; row += 2 * step",
            ),
        },
    ),
    *planted(
        "csrc/math/storage.h",
        tests_of("tables"),
        {
            "float16 truncated": (
                "(magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13",
                "(magnitude - 0x38000000u) >> 13",
            ),
            "float16: infinity from 65520 on is lost": (
                "magnitude >= 0x47800000u ? 0x7c00u",
                "magnitude >= 0x47800000u ? 0x7bffu",
            ),
        },
    ),
    *planted(
        "csrc/cpu/parallel.cpp",
        tests_of("concurrency", k="old_openmp"),
        {
            "cpu: a forked child waits for its parent's threads": (
                "has_lost_threads || !has_ended_threads",
                "has_lost_threads",
            )
        },
    ),
    *planted(
        "csrc/cpu/ema.cpp",
        tests_of("ema", k="cpu-cpu"),
        {
            "cpu: a float32 average of float64 weights in float32": (
                "average.dtype == DType::float64 || param == DType::float64",
                "average.dtype == DType::float64",
            ),
        },
    ),
    *planted(
        "csrc/core/state_reader.h",
        tests_of("adamw", "ema_fused", k="cpu-cpu"),
        {
            "tables: AMSGrad forgotten from the second step on": (
                "if (states.contains(names_[column])) keys",
                "if (column + 1 < columns_ && states.contains(names_[column])) keys",
            ),
            "tables: averages found are not counted": (
                "      averaged[i] += average != nullptr;\n",
                "",
                "the count spares a look at every parameter, and changes no number",
            ),
        },
    ),
    *planted(
        "csrc/core/state_reader.h",
        tests_of("core_rows", "ranks"),
        {
            "tables: what is collected is not kept": ("    builder_.keep(std::move(tensors_));\n", ""),
            "tables: shards are not told of": ("has_shards |= !is_plain;", ""),
        },
    ),
]
