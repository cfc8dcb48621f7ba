"""Faults of the Python package: see ``mutants.py``."""

from mutants import planted, tests_of

REFERENCE = tests_of("adamw", "ema", "clip_grad", k="reference-cpu")
FOREACH = tests_of("foreach", "adamw", "adamw_types", "ema", k="test_foreach or foreach-cpu")

PYTHON = [
    *planted(
        "trainops/reference.py",
        tests_of("reference", k="reference-cpu"),
        {
            "reference: a learning rate in float32": (
                "lr = scalar(lr, device) if isinstance(lr, Tensor) else lr\n    g =",
                "lr = lr.float() if isinstance(lr, Tensor) else lr\n    g =",
            )
        },
    ),
    *planted(
        "trainops/adapters/pytorch.py",
        tests_of("reference", "adamw", "ema", "clip_grad", k="reference-cpu"),
        {
            "reference: tensors that share memory are written": (
                "        check_no_overlap(local(x))\n",
                "        pass\n",
            ),
            "reference: conjugated parameters are not written back": (
                "            original.copy_(copy)\n",
                "            pass\n",
            ),
            "reference: conjugated gradients are not written back": (
                "        original.copy_(copy)\n\n\ndef clamp_",
                "        pass\n\n\ndef clamp_",
            ),
        },
    ),
    *planted(
        "trainops/adapters/_control.py",
        tests_of("reference", "adamw", "ema", "clip_grad", k="reference-cpu"),
        {"reference: found_inf ignored": ("control.found_inf != 0", "control.found_inf == 3")},
    ),
    *planted(
        "trainops/adapters/_foreach_fused.py",
        FOREACH,
        {
            "foreach: the coefficient is left out": (
                'chunk["grad"] if scale is None else copies[i].scaled(scale)',
                'chunk["grad"]',
            ),
            "foreach: what cancels in float64": (
                "exact = with_exact_corrections(settings, count)",
                "exact = settings",
            ),
            "foreach: eps is not put right": ('"eps": settings["eps"] * by', '"eps": settings["eps"]'),
            "foreach: all rows have the first one's count": ("if len(parts) == 1:", "if True:"),
            "foreach: the largest square is no NaN": (
                'if "max_exp_avg_sq" in chunk and not',
                "if False and not",
            ),
            "foreach: averages of a chunk stay": (
                "move_chunk(chunk[name], chunk",
                "(chunk[name], chunk",
            ),
            "foreach: moments of any type are fused": (
                'and all(its == (torch.float32 if name == "step" else dtype) for name, its',
                "and all(True for name, its",
            ),
        },
    ),
    *planted(
        "trainops/adapters/_foreach_average.py",
        FOREACH,
        {"foreach: infinite averages": ("    if is_finite and 0.0", "    if 0.0")},
    ),
    *planted(
        "trainops/adapters/_foreach_update.py",
        FOREACH,
        {
            "foreach: step counts advance in a skipped step": (
                "else ~skip.to(device)",
                "else ~skip.to(device) | skip",
            ),
            "foreach: the state is not scattered": ('for name in chunk if name != "grad"', 'for name in ["param"]'),
        },
    ),
    *planted(
        "trainops/adapters/_foreach_collect.py",
        tests_of("foreach"),
        {"foreach: shared memory is collected": (" or have_common_memory(every)", "")},
    ),
    *planted(
        "trainops/adapters/_foreach_rows.py",
        tests_of("foreach"),
        {
            "foreach: chunks without a limit": ("if i > begin and size + numel > limit:", "if False:"),
            "foreach: infinities in small tensors": (
                "_sum_of_small(small) if small else 0.0",
                "0.0",
            ),
            "foreach: infinities in stacks": ("run.length], stacks=True)", "run.length][:0])"),
            "foreach: a run goes on with its first stack": ("stack[taken:]", "stack[:taken]"),
            "foreach: a row's number for another": ("in zip(rows, self._sizes", "in zip(rows[::-1], self._sizes"),
        },
    ),
    *planted(
        "trainops/adapters/_foreach_norm.py",
        tests_of("foreach", "clip_grad", k="test_foreach or foreach-cpu"),
        {
            "foreach: tails of norms are lost": (
                "torch.cat([norms, vector_norm(wide(lines[:, whole:]), 2.0, 1, keepdim=True)], 1)",
                "norms",
            ),
            "foreach: norms of a stack in another's place": (
                "(*stacked, single) for i in rows]",
                "(*stacked, single) for i in rows[::-1]]",
            ),
            "foreach: float64 where there is none": ("dtype = scalar_dtype(device)", "dtype = torch.float64"),
            "foreach: squares that vanish": ("if not SMALLEST <= x < math.inf", "if not x < math.inf"),
            "foreach: squares that overflow": ("if not SMALLEST <= x < math.inf", "if not SMALLEST <= x"),
        },
    ),
    *planted(
        "trainops/adapters/_drop_path.py",
        tests_of("drop_path", "drop_path_gradients", "stochastic_depth", k="cpu-cpu"),
        {
            "DropPath: negated operands are read as they lie": ("            or x.is_neg()\n", ""),
            "DropPath: channels of the wrong dimension": (
                "_lies_in(layer_scale, 1 - len(shape)",
                "_lies_in(layer_scale, -1",
            ),
        },
    ),
    *planted(
        "trainops/reference.py",
        REFERENCE,
        {
            "reference: 1 for 1 - beta2": ("(1 - beta2) * g * g", "g * g"),
            "reference: bias correction at the old step": ("    t = step + 1\n", "    t = step + 2\n"),
            "reference: EMA the wrong way": ("torch.lerp(old, new, 1 - decay)", "torch.lerp(new, old, 1 - decay)"),
            "reference: unclipped": ("torch.clamp(max_norm /", "torch.clamp(1e30 + max_norm /"),
            "reference: norm of the norms' sum": (
                "return vector_norm(norms, norm_type), norms",
                "return norms.sum(), norms",
            ),
        },
    ),
    *planted(
        "trainops/reference_storage.py",
        REFERENCE,
        {"reference: skipped values are written": ("torch.where(skip.to(target.device), target, value)", "value")},
    ),
    *planted(
        "trainops/reference.py",
        tests_of("drop_path", "drop_path_gradients", "stochastic_depth", k="reference-cpu or formula"),
        {
            "reference: the mask is not scaled": (
                "mask.div_(keep_prob) if keep_prob > 0.0 and",
                "mask if keep_prob > 0.0 and",
            ),
            "reference: dropped branches are read": (
                "        branch = torch.where(mask != 0, branch, 0)\n",
                "        pass\n",
            ),
            "reference: rows of the gradient forgotten": (
                "(grad if rows is None else grad.index_select(0, rows))",
                "grad[: len(mask)]",
            ),
        },
    ),
    *planted(
        "trainops/verify/__init__.py",
        tests_of("verify"),
        {
            "verify: the verdict is always good": (
                "wrong = [x for x in findings if x.problem]",
                "wrong = findings[:0]",
            )
        },
    ),
    *planted(
        "trainops/verify/compare.py",
        tests_of("verify"),
        {"verify: twice the error is allowed": ("if worst <= 1.0:", "if worst <= 2.0:")},
    ),
    *planted(
        "trainops/verify/capture.py",
        tests_of("verify_capture"),
        {
            "verify: a replay is compared with itself": ("got, theirs[what], None)", "got, got, None)"),
            "verify: no warm-up before a capture": (
                "        for _ in range(WARM_UPS):\n            call()\n    torch",
                "        pass\n    torch",
            ),
        },
    ),
    *planted(
        "trainops/rows.py",
        tests_of("adamw", "adamw_drop_in", "ema_fused", "reference", k="cpu-cpu or reference-cpu or not target"),
        {
            "AdamW: moments of integers are taken": ("elif x is not None and kind(x) != kind(param):", "elif False:"),
            "AdamW: gradients of other shapes are taken": ("(x.shape != param.shape or x.device", "(x.device"),
        },
    ),
    *planted(
        "trainops/step.py",
        tests_of("adamw", "adamw_drop_in", "ema_fused", "reference", k="cpu-cpu or reference-cpu or not target"),
        {
            "AdamW: state of new parameters is kept when a step raises": (
                "                del self.state[param]\n",
                "                pass\n",
            ),
            "AdamW: a step without gradients is not skipped": (
                "            self.skipped_steps.add_(skipped)\n",
                "            pass\n",
            ),
            "AdamW: found_inf is not looked for": ('self._from_scaler("found_inf")', "None"),
            "AdamW: autograd is not told": (
                "count_writes([*table.params, *averages.tensors()], table.has_shards)\n            result = kernels",
                "count_writes([])\n            result = kernels",
            ),
        },
    ),
    *planted(
        "trainops/step.py",
        tests_of("interference"),
        {
            "AdamW: rows of a parameter that is there twice": ("in_memory and not in_turn", "in_memory"),
            "AdamW: an average of a parameter that is there twice": (
                "            if in_turn:",
                "            if False:",
            ),
        },
    ),
    *planted(
        "trainops/optimizer.py",
        tests_of("interference"),
        {"EMA: a copy of an optimizer gives up its average": (" and average.optimizer is self", "")},
    ),
    *planted(
        "trainops/loading.py",
        tests_of("adamw_drop_in", "interference", k="cpu-cpu or reference-cpu or not target"),
        {
            "AdamW: state in another dtype is lost when it is loaded": (
                "its[name] = value.to(device=param.device, dtype=dtype, copy=True)",
                "pass",
            ),
        },
    ),
    *planted(
        "csrc/core/rounding.h",
        tests_of("interference"),
        {
            "collect: an error of a lookup is forgotten": (
                "if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();",
                "PyErr_Clear();",
            ),
        },
    ),
    *planted(
        "csrc/core/state_reader.h",
        tests_of("interference"),
        {
            "collect: no look ahead": ("kLookAhead = 8", "kLookAhead = 1"),
            "collect: parameters without a gradient are not passed over": (
                "      next_state(param.ptr());  // passes over it\n",
                "",
            ),
            "collect: a parameter that is there twice": (
                "return !ParamSpans(builder_.table).overlap();",
                "return true;",
            ),
        },
    ),
    *planted(
        "csrc/core/python_table.h",
        tests_of("interference"),
        {
            "tables: of any kind": ("if (schema().name != kind)\n", "if (false)\n"),
        },
    ),
    *planted(
        "trainops/adam.py",
        tests_of("adamw", "adamw_drop_in", "ema_fused", "reference", k="cpu-cpu or reference-cpu or not target"),
        {
            "AdamW: maximize is ignored": ('bool(group["maximize"])', "False"),
        },
    ),
    *planted(
        "trainops/ema.py",
        tests_of("ema_model", "ema_fused", k="cpu-cpu or reference-cpu or test_decay or test_bad or copy"),
        {
            "EMA: every step is an update": ("if step % self.update_every == 0 else None", ""),
            "EMA: what is done is done again": ("matched.without(done) if done else matched", "matched"),
        },
    ),
    *planted(
        "trainops/ema_follow.py",
        tests_of("ema_model", "ema_fused", k="cpu-cpu or reference-cpu or test_decay or test_bad or copy"),
        {
            "EMA: replaced tensors are not noticed": (" and self._matched.is_current() else", " else"),
        },
    ),
    *planted(
        "trainops/ema_schedule.py",
        tests_of("ema_model", k="test_decay"),
        {
            "EMA: warm-up is off by one step": (
                "(1 + (step - self.update_after_step - 1) /",
                "(1 + (step - self.update_after_step) /",
            ),
        },
    ),
    *planted(
        "trainops/clip_grad.py",
        tests_of("clip_grad", "clip_grad_drop_in", k="cpu-cpu or reference-cpu"),
        {
            "clip: a gradient given twice": ("if len(set(addresses)) < len(addresses):", "if False:"),
            "clip: raises where all is finite": (
                "not math.isfinite(total_norm.item())",
                "math.isfinite(total_norm.item())",
            ),
            "clip: autograd is not told": (
                "_version(grads if all_plain(grads) else [*grads, *shards])",
                "_version([])",
            ),
        },
    ),
    *planted(
        "trainops/advice.py",
        tests_of("advice", "advice_averages", "advice_stochastic_depth"),
        {
            "advice: measuring counts as clipping": ("or math.isinf(max_norm)", "or False"),
            "advice: schedules of epochs are taken for those of steps": ("moves and self.moves and", "moves and"),
            "advice: everything is said again and again": ("    if topic not in topics:\n", "    if True:\n"),
            "advice: a model that was loaded counts as trained": ("< WRITES_OF_TRAINING for", "< 1 for"),
            "advice: drops are not seen": ("        _calls = 0\n", "        pass\n"),
        },
    ),
    *planted(
        "trainops/tables.py",
        tests_of("tables", "ema", "clip_grad", k="cpu"),
        {
            "tables: staged results are not copied back": ("        original.copy_(regular)\n", "        pass\n"),
            "tables: strides of a gradient are ignored": (
                "if x.stride() == layout.stride() and not x.is_neg():",
                "if not x.is_neg():",
            ),
            "tables: lazily negated tensors are read as they lie": (
                "if x.stride() == layout.stride() and not x.is_neg():",
                "if x.stride() == layout.stride():",
            ),
        },
    ),
    *planted(
        "trainops/adapters/__init__.py",
        tests_of("subclasses"),
        {
            "dispatch: modes see no operations": ("if not in_memory or is_transformed():", "if not in_memory:"),
            "dispatch: kernels get wrappers": ("if not in_memory or is_transformed():", "if is_transformed():"),
        },
    ),
    *planted(
        "trainops/drop_path_small.py",
        tests_of("drop_path_small"),
        {
            "small DropPath: a kernel's gradient is differentiated again": (
                "            torch.is_grad_enabled()\n            or is_transformed()\n",
                "            is_transformed()\n",
            ),
            "small DropPath: any gradient goes to the kernel": (
                "or not core.are_small(branch, grad, None, LARGEST)",
                "or False",
            ),
            "small DropPath: lazily negated layer scale is read as it lies": ("or layer_scale.is_neg()", "or False"),
        },
    ),
    *planted(
        "trainops/plain.py",
        tests_of("subclasses"),
        {
            "dispatch: function modes see nothing": (
                "type(mode) is not DeviceContext for mode in modes",
                "False for _ in modes",
            )
        },
    ),
    *planted(
        "trainops/torch_step.py",
        tests_of("subclasses", "compiled"),
        {
            "compiled: a step is traced": ("cls.step = _disable_dynamo(cls.step)", "cls.step = type(self).step"),
            "compiled: hooks are forgotten": ("        super()._patch_step_function()\n", "        pass\n"),
            "subclasses: none are left to PyTorch's step": (
                "return not all_in_memory(x for p in params for x in (p, p.grad))",
                "return False",
            ),
        },
    ),
    *planted(
        "trainops/rows.py",
        tests_of("subclasses"),
        {"AdamW: a fused step on meta": ('param_group.get("fused") and param.is_meta', "False")},
    ),
    *planted(
        "trainops/clip_grad.py",
        tests_of("subclasses", "compiled"),
        {
            "clip: compiled norms have 16 bits": ("list(map(wide, tensors))", "tensors"),
            "clip: compiled code does not raise": (
                "tensors)), norm_type, error_if_nonfinite)",
                "tensors)), norm_type)",
            ),
            "clip: kernels get wrappers": ("    return all_plain(tensors) and all(", "    return all("),
        },
    ),
    *planted(
        "trainops/uploads.py",
        tests_of("uploads"),
        {
            "device tables: uploads of another stream": ("key = (words, device, stream)", "key = (words, device)"),
            "device tables: uploads by length": (
                "key = (words, device, stream)",
                "key = (len(words), device, stream)",
            ),
            "device tables: a spare is used twice": ("or []).pop()", "or [])[-1]"),
            "device tables: spares for everybody": ("if _prepared or stream != 0:", "if True:"),
            "device tables: a warm-up prepares nothing": ("if _prepared or stream != 0:", "if _prepared:"),
        },
    ),
    *planted(
        "trainops/uploads.py",
        tests_of("captures"),
        {
            "captures: pinned memory goes before its graph": ("    keep(host, stream)\n", ""),
            "captures: an earlier upload is used": (
                "        return _upload_in_capture(words, device, stream)",
                "        found = next((x for y, x in _uploads.items() if y[:2] == (words, device)), None)\n"
                "        return _upload_in_capture(words, device, stream) if found is None else found",
            ),
            "captures: nothing is dropped": ("    drop_unused()\n", ""),
        },
    ),
    *planted(
        "trainops/graphs.py",
        tests_of("captures"),
        {
            "captures: what a graph reads is dropped at once": ("if core.take_flag(flag)]", "if flag]"),
            "captures: no graph has the flag": ("    driver.cuGraphRetainUserObject(graph, owned, 1, _MOVE)\n", ""),
        },
    ),
    *planted(
        "trainops/ema_update.py",
        tests_of("ema_fused", k="cpu-cpu or reference-cpu"),
        {
            "EMA: a skipped step copies buffers": (
                "copy_all(targets, sources[len(averages) :], skip)",
                "copy_all(targets, sources[len(averages) :])",
            ),
        },
    ),
    *planted(
        "trainops/copies.py",
        tests_of("copies"),
        {
            "copies: a skipped step copies": ("skip.logical_not().to", "skip.to"),
            "copies: a skip of the host is not seen": ("        if skip.item():\n            return\n", ""),
            "copies: differences of floats": ("[x.view(bits) for x in column]", "list(column)"),
            "copies: a wait for each tensor": ("non_blocking=x.is_cuda", "non_blocking=False"),
            "copies: the host does not wait": ("        stream.synchronize()\n", "        pass\n"),
        },
    ),
    *planted(
        "trainops/ema_update.py",
        tests_of("host_side"),
        {
            "EMA: a wait for averages and one for copies": (
                "    if is_elsewhere or (averages and averages[0].device != sources[0].device):\n",
                "    if False:\n",
            ),
        },
    ),
    *planted(
        "trainops/adapters/_device.py",
        tests_of("host_side"),
        {
            "host side: a wait for numbers on a device": (
                '(x.device.type == "cpu" and device.type != "cpu")',
                "True",
            ),
        },
    ),
    *planted(
        "trainops/adapters/cuda.py",
        tests_of("host_side"),
        {
            "host side: cuda: settings are freed before the launch": (
                "step_settings(rule, groups, control, ema_decays, device)\n",
                "step_settings(rule, groups, control, ema_decays, device)[0], None\n",
            ),
        },
    ),
    *planted(
        "trainops/adapters/_cuda_memory.py",
        tests_of("host_side"),
        {
            "host side: cuda: scratch memory of another stream": (
                "key = queue, threading.get_ident()",
                "key = queue.device, threading.get_ident()",
            ),
        },
    ),
    *planted(
        "trainops/adapters/triton.py",
        tests_of("host_side"),
        {
            "host side: triton: settings are freed before the launch": (
                "step_settings(rule, groups, control, ema_decays, device)\n",
                "step_settings(rule, groups, control, ema_decays, device)[0], None\n",
            ),
        },
    ),
    *planted(
        "trainops/step.py",
        tests_of("host_side"),
        {
            "host side: a wait for the largest norm": (
                'return x.reshape(()) if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)',
                "return float(x)",
            ),
        },
    ),
    *planted(
        "trainops/core.py",
        tests_of("core", "cuda"),
        {
            "tables: a setting of another name": (
                "[[group[name] for name in names] for group in settings]",
                "[[group[name] for name in names[1:] + names[:1]] for group in settings]",
            ),
        },
    ),
    *planted(
        "trainops/drop_path_autograd.py",
        tests_of("drop_path_gradients", "stochastic_depth", k="cpu-cpu or reference-cpu"),
        {
            "autograd: a repeated operand's gradient": (
                "grad.sum_to_size(unlike[0]).to(unlike[1])",
                "grad.expand(unlike[0]).to(unlike[1])",
            ),
            "autograd: the mask of other samples": (
                "ctx.save_for_backward(mask.index_select(0, kept.chosen), layer_scale",
                "ctx.save_for_backward(mask[: len(kept.chosen)], layer_scale",
            ),
        },
    ),
    *planted(
        "trainops/stochastic_depth.py",
        tests_of("stochastic_depth", k="cpu-cpu or reference-cpu"),
        {
            "stochastic depth: scaled by the rate": (
                '(count / batch if mode == "fixed" else 1 - rate)',
                "(1 - rate)",
            ),
            "stochastic depth: rows of the wrong samples": ("rows = permutation.argsort()", "rows = permutation"),
        },
    ),
    *planted(
        "trainops/stochastic_depth_formula.py",
        tests_of("stochastic_depth", k="cpu-cpu or reference-cpu"),
        {
            "stochastic depth: one sample too few": (
                "sym_max(1, round(batch * (1 - rate)))",
                "sym_max(1, round(batch * (1 - rate)) - 1)",
            ),
        },
    ),
    *planted(
        "trainops/ranks.py",
        tests_of("ranks"),
        {
            "ranks: the first of two meshes does not hear of the second": (
                "in reversed(meshes[:-1]):",
                "in reversed(meshes[:0]):",
            ),
            "ranks: stages are not joined": (
                "    if group is not None:\n        total",
                "    if False:\n        total",
            ),
            "ranks: a mesh counts for each of its ranks in the group": (
                "order.share(total, 1 / alike)",
                "order.share(total, 1)",
            ),
        },
    ),
    *planted(
        "trainops/meshes.py",
        tests_of("ranks"),
        {
            "ranks: copies count each": (
                "found.setdefault(new.ranks, new), 1 / copies",
                "found.setdefault(new.ranks, new), 1.0",
            ),
            "ranks: a mesh within another counts once for each of its copies": (
                "row: weight / copies for row",
                "row: weight for row",
            ),
            "ranks: plain tensors count on every rank": (
                "order.share(total, 1 / len(self.ranks)).reshape(1)])",
                "total.reshape(1)])",
            ),
        },
    ),
    *planted(
        "trainops/norm_order.py",
        tests_of("ranks"),
        {
            "ranks: a NaN is lost among the largest": ("both[1] != 0", "both[1] > 1"),
            "ranks: no elements are zeros for all orders": ("        if self.p < 0:", "        if self.p < -9:"),
        },
    ),
    *planted(
        "trainops/joint_norm.py",
        tests_of("ranks", "total_norm"),
        {
            "joint norm: a given norm is not unscaled": (
                "norm = _unscaled(reference.scalar(given.reshape(()), device), control)",
                "norm = reference.scalar(given.reshape(()), device)",
            ),
            "joint norm: found_inf of this rank alone": (
                "control.skip_nonfinite or control.found_inf is not None",
                "control.skip_nonfinite",
            ),
            "joint norm: gradients that are missing have norms": (
                "if any(x is None for x in measured):",
                "if False:",
            ),
        },
    ),
    *planted(
        "trainops/own_settings.py",
        tests_of("total_norm", "adamw_drop_in", k="settings or groups"),
        {
            "groups: settings of the constructor with any value": (
                "repeatable[name] is not param_group[name]",
                "False",
            ),
            "groups: settings are saved": ("                group.pop(name, None)\n", "                pass\n"),
        },
    ),
]
