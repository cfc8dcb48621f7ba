"""Faults of the Python package: see ``mutants.py``."""

from mutants import planted, tests_of

REFERENCE = tests_of("adamw", "ema", "clip_grad", k="reference-cpu")

PYTHON = [
    *planted(
        "trainops/reference.py",
        tests_of("reference", k="reference-cpu"),
        {"reference: a learning rate in float32": ("lr = scalar(lr, device) if", "lr = lr.float() if")},
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
            "reference: found_inf ignored": ("control.found_inf != 0", "control.found_inf == 3"),
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
            "reference: skipped values are written": ("torch.where(skip.to(target.device), target, value)", "value"),
            "reference: unclipped": ("torch.clamp(max_norm /", "torch.clamp(1e30 + max_norm /"),
            "reference: norm of the norms' sum": (
                "return vector_norm(norms, norm_type), norms",
                "return norms.sum(), norms",
            ),
        },
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
        "trainops/optimizer.py",
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
            "AdamW: the decay of the average is that of no update": (
                "0.0 if update is None or update.decay is None else update.decay",
                "0.0",
            ),
            "AdamW: autograd is not told": (
                "_version([*params, *averages.values()])\n            result = kernels",
                "_version([])\n            result = kernels",
            ),
        },
    ),
    *planted(
        "trainops/optimizer.py",
        tests_of("interference"),
        {
            "AdamW: rows of a parameter that is there twice": ("in_memory and not in_turn", "in_memory"),
            "AdamW: an average of a parameter that is there twice": (
                "            if in_turn:",
                "            if False:",
            ),
            "EMA: a copy of an optimizer gives up its average": (" and before.optimizer is self", ""),
        },
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
        "csrc/core/state_reader.h",
        tests_of("interference"),
        {
            "collect: no look ahead": ("kLookAhead = 8", "kLookAhead = 1"),
            "collect: parameters without a gradient are not passed over": (
                "      next_state(param.ptr());  // passes over it\n",
                "",
            ),
            "collect: an error of a lookup is forgotten": (
                "if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();",
                "PyErr_Clear();",
            ),
            "collect: a parameter that is there twice": ("return !have_common_memory();", "return true;"),
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
        "trainops/adamw.py",
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
            "EMA: swapped weights are not given back": ("pair.source.copy_(weight)", "pass"),
            "EMA: what is done is done again": (
                "matched = update.matched.without(done) if done else update.matched",
                "matched = update.matched",
            ),
            "EMA: a skipped step copies buffers": (
                "write(pair.average, pair.source.to(pair.average.device), skip)",
                "write(pair.average, pair.source.to(pair.average.device))",
            ),
            "EMA: replaced tensors are not noticed": (
                "if self._matched is None or not self._matched.is_current():",
                "if self._matched is None:",
            ),
        },
    ),
    *planted(
        "trainops/ema_schedule.py",
        tests_of("ema_model", k="test_decay"),
        {
            "EMA: warm-up is off by one step": (
                "step - self.update_after_step - 1)",
                "step - self.update_after_step)",
            ),
        },
    ),
    *planted(
        "trainops/model_pairs.py",
        tests_of("ema_model", k="cpu-cpu or reference-cpu or mismatch"),
        {
            "pairs: buffers are averaged always": ("(average_buffers or isinstance(source, nn.Parameter))", "True"),
            "pairs: shapes are not compared": (
                "if average.shape != tensor.shape:",
                "if average.ndim != tensor.ndim:",
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
                "_version(grads)\n    for kernels, part in _by_device(grads, backend):\n        kernels.scale_",
                "_version([])\n    for kernels, part in _by_device(grads, backend):\n        kernels.scale_",
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
            "clip: compiled norms have 16 bits": ("list(map(reference.wide, tensors))", "tensors"),
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
            "device tables: uploads of another stream": (
                "key = (words, device, torch.cuda.current_stream(device).cuda_stream)",
                "key = (words, device)",
            ),
            "device tables: uploads by length": (
                "key = (words, device, torch.cuda.current_stream(device).cuda_stream)",
                "key = (len(words), device, torch.cuda.current_stream(device).cuda_stream)",
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
]
