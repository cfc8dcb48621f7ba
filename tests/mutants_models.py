"""Faults of what an average holds of a model, of models with awkward tensors, and of averages on the host."""

from mutants import planted, tests_of

SNAPSHOT = "flat = torch.cat([_flat(tensors[i]) for i in places])"
MODELS = [
    *planted(
        "trainops/ema_policy.py",
        tests_of("ema_selection", "awkward_models"),
        {
            "policy: frozen parameters are averaged": (
                "if self.trainable_only and not param.requires_grad:",
                "if False:",
            ),
            "policy: a pattern that fits nothing": (
                "if not any(fits(name, pattern) for name in names):",
                "if False:",
            ),
            "policy: the last pattern decides": ("in self._buffers if fits", "in self._buffers[::-1] if fits"),
            "policy: a module's name is no pattern": ('or name.startswith(f"{pattern}.") ', ""),
            "policy: subclasses are not tried": (
                "        _answers[key] = _can_be_moved(average, source)",
                "        return True",
            ),
            "policy: copies are made in inference mode": (
                "        with torch.inference_mode(False):\n            copied",
                "        if True:\n            copied",
            ),
        },
    ),
    *planted(
        "trainops/model_match.py",
        tests_of("ema_selection", "awkward_models", "ema_model", k="not target and not interpreter"),
        {
            "match: shared parameters stay shared": ("if self.policy.is_shared(names, source):", "if True:"),
            "match: buffers are averaged always": ('if use == "average" and can_average', "if can_average"),
            "match: buffers that are left are looked at": (
                "            self.found.unseen += [",
                "            [",
            ),
            "match: new buffers are persistent": (
                "average, persistent))",
                "average, True))",
            ),
            "match: a buffer that is gone stays": ("gone=name not in self.theirs", "gone=False"),
            "match: a trained weight without an average is copied": (
                "        elif source.requires_grad:\n",
                "        elif False:\n",
            ),
            "match: a copied buffer keeps its shape": (
                "_form(average) != _form(source)",
                "False",
            ),
        },
    ),
    *planted(
        "trainops/model_pairs.py",
        tests_of("ema_selection", "awkward_models", "ema_model", k="not target and not interpreter"),
        {
            "pairs: shapes are not compared": (
                "if average.shape != tensor.shape:",
                "if average.ndim != tensor.ndim:",
            ),
            "pairs: unfrozen parameters are not noticed": (
                " and any(x.requires_grad for x in self._frozen)",
                " and False",
            ),
            "pairs: what the kernel leaves is not looked at": (
                "return all(_fits(pair) for pair in",
                "return True or all(_fits(pair) for pair in",
            ),
            "pairs: whoever is averaged once is shared again": ("        shared -= self._begun\n", ""),
        },
    ),
    *planted(
        "trainops/model_slots.py",
        tests_of("ema_selection", "awkward_models"),
        {
            "slots: what a forward pass has computed is copied": ("        if not x.is_leaf:", "        if False:"),
            "slots: elements that share memory are written": (
                "torch._debug_has_internal_overlap(target) == 1",
                "False",
            ),
            "slots: buffers of inference mode are written": (" if target.is_inference() else", " if False else"),
            "slots: a checkpoint writes the model": (
                "for name, x in weights.items() if name not in shared",
                "for name, x in weights.items()",
            ),
            "slots: nothing is rehearsed": ("        _rehearse(module, kept, set(shared))\n", ""),
            "slots: versions of modules are lost": (
                'kept._metadata = getattr(weights, "_metadata", None)',
                "kept._metadata = None",
            ),
            "slots: a module without memory has the last word": ("    twin = _twin(module)\n", "    twin = None\n"),
        },
    ),
    *planted(
        "trainops/ema_update.py",
        tests_of("awkward_models"),
        {
            "EMA: a skipped step replaces buffers": ("or (skip is not None and skip.item())", ""),
        },
    ),
    *planted(
        "trainops/copies.py",
        tests_of("host_averages"),
        {
            "host: the copies do not wait for the device": (
                "            stream.wait_stream(torch.cuda.current_stream(device))\n",
                "",
            ),
            "host: the thread does not wait for the copies": (
                "            event.synchronize()\n",
                "            pass\n",
            ),
            "host: a single weight is copied as it changes": (
                SNAPSHOT,
                f"{SNAPSHOT} if len(places) > 1 else _flat(tensors[places[0]])",
            ),
            "host: the step waits": ('flat.to("cpu", non_blocking=True), flat', 'flat.to("cpu"), flat'),
            "host: float8 as numbers": ("return x if x.dtype in _NUMBERS else", "return x if x.itemsize == 1 else"),
        },
    ),
    *planted(
        "trainops/ema_module.py",
        tests_of("host_averages"),
        {
            "host: nobody waits for the thread": ("            pending.finish()\n", "            pass\n"),
        },
    ),
    *planted(
        "trainops/background.py",
        tests_of("host_averages"),
        {
            "host: a child has no thread": ("    _executor = None\n\n\nif", "    pass\n\n\nif"),
            "host: a fork waits for nothing": ("        _unfinished.add(self._future)\n", ""),
        },
    ),
    *planted(
        "trainops/ema_holder.py",
        tests_of("ema_changes"),
        {
            "EMA: whoever begins anew is back where it began": (" and self._is_at_its_beginning()", ""),
            "EMA: any count is one": ("        check_step(step)\n", ""),
        },
    ),
    *planted(
        "trainops/model_match.py",
        tests_of("ema_changes", "ema_selection"),
        {
            "match: averages that cannot be written": (
                "            _check_writable(names[0], average)\n",
                "            pass\n",
            ),
            "match: a new average moves at once": ("            averaged = False  # it begins as a copy\n", ""),
        },
    ),
    *planted(
        "trainops/model_slots.py",
        tests_of("ema_changes"),
        {"slots: recurrent modules list what is not there": ("isinstance(owner, nn.RNNBase)", "False")},
    ),
    *planted(
        "trainops/ema_schedule.py",
        tests_of("ema_changes"),
        {
            "EMA: a decay that was changed is not looked at": (
                '        check_unit_interval("decay", self.decay)  #',
                "        #",
            )
        },
    ),
    *planted(
        "trainops/drop_path_autograd.py",
        tests_of("drop_path_gradients"),
        {"DropPath: kernels read several gradients at once": (" or is_legacy_batchedtensor(grad))", ")")},
    ),
    *planted(
        "trainops/masters.py",
        tests_of("master_state"),
        {"master: one of a parameter that was cast is joined": (" or not fits(param, master)", "")},
    ),
    *planted(
        "trainops/rows.py",
        tests_of("adamw_drop_in"),
        {"state: any step is loaded": ("    if step.numel() != 1 if isinstance", "    if False if isinstance")},
    ),
    *planted(
        "trainops/ema_swap.py",
        tests_of("host_averages"),
        {
            "host: a swap does not wait": (
                "        self.synchronize()\n        pairs = self.check_model",
                "        pairs = self.check_model",
            ),
        },
    ),
    *planted(
        "trainops/ema_follow.py",
        tests_of("host_averages", "awkward_models"),
        {
            "host: an update is captured": ("if matched.waits and", "if False and"),
            "EMA: backends are asked when the parameters have moved": (
                "            select(self.backend, device)\n",
                "            pass\n",
            ),
        },
    ),
    *planted(
        "trainops/averages.py",
        tests_of("awkward_models"),
        {
            "AdamW: averages that its kernel leaves are not looked at": (
                "            ema.check_rest(its)\n",
                "            pass\n",
            ),
        },
    ),
]
