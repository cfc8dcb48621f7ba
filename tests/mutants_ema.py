"""Faults of averages as people call them: see ``mutants.py``."""

from mutants import planted, tests_of

EMA = [
    *planted(
        "trainops/ema_follow.py",
        tests_of("ema_calls", "ema_start"),
        {
            "EMA: another model is not noticed": (
                " or models[0] is not self._module or models[1] is not self.model:",
                ":",
            ),
            "EMA: any model is taken": ("if not is_same_model(model, self.model):", "if False:"),
        },
    ),
    *planted(
        "trainops/ema.py",
        tests_of("ema_calls", "ema_start"),
        {
            "EMA: another step than the caller's": ("self.step + 1 if step is None else step", "self.step + 1"),
            "EMA: it has never moved": ("self._has_moved, self._seen = True, None", "pass"),
            "EMA: loaded weights are copied over": (
                "if decay == 0.0 and (self._continues or not",
                "if (False and not",
            ),
        },
    ),
    *planted(
        "trainops/ema_swap.py",
        tests_of("ema_start", "ema_calls"),
        {
            "EMA: what was stored is not copied": ('detach().to("cpu", copy=True)', 'detach().to("cpu")'),
            "EMA: the beginning is of the constructor": (
                "            pair.average.copy_(pair.source)\n",
                "            pass\n",
            ),
            "EMA: the beginning is not remembered": (
                "            pair.average.copy_(pair.source)\n        self._remember_weights()\n",
                "            pair.average.copy_(pair.source)\n",
            ),
            "EMA: lists of any length": ("if len(own) != len(others):", "if False:"),
        },
    ),
    *planted(
        "trainops/ema_swap.py",
        tests_of("ema_model", k="swap and reference-cpu"),
        {"EMA: swapped weights are not given back": ("write_into(pair.source, weight)", "pass")},
    ),
    *planted(
        "trainops/ema_state.py",
        tests_of("ema_fused", "ema_start", "ema_checkpoints", k="copy or decay or state"),
        {
            "EMA: a copy made within swap has the averaged weights": (
                "            copied.copy_(weight)\n",
                "            pass\n",
            ),
            "EMA: a copy forgets what was loaded": ('"_continues": self._was_written(), ', ""),
            "EMA: a count is not asked for": (" and self.depends_on_step:", " and False:"),
        },
    ),
    *planted(
        "trainops/ema_start.py",
        tests_of("ema_start"),
        {
            "EMA: written weights are not noticed": ("version != new_version", "False"),
            "EMA: replaced weights are not noticed": (
                "(before is not now or version != new_version)",
                "version != new_version",
            ),
        },
    ),
    *planted(
        "trainops/ema_holder.py",
        tests_of("ema_start"),
        {
            "EMA: a finder's steps are kept": ('set_back == "fresh" and self._held_from == 0', "False"),
            "EMA: new moments take the average back": (
                "(seen := self._last_source)[0]._version == seen[1]",
                "False",
            ),
        },
    ),
    *planted(
        "trainops/ema_schedule.py",
        tests_of("ema_schedules", "ema_model", k="decay or half or updates_that or function"),
        {
            "EMA: the first update of several is no copy": (
                "if step <= copies_until:",
                "if step <= self.update_after_step + 1:",
            ),
            "EMA: a half-life of updates": ("(update_every / halflife_steps)", "(1 / halflife_steps)"),
            "EMA: a function returns anything": ("            if value is not None:\n", "            if False:\n"),
        },
    ),
    *planted(
        "trainops/ema_checkpoints.py",
        tests_of("ema_checkpoints"),
        {
            "EMA: a compiled block": (
                ' for part in key.split(".") if part not in _WRAPPERS]',
                ' for part in key.removeprefix("_orig_mod.").split(".")]',
            ),
            "EMA: versions of modules are lost": (
                "        result._metadata = renamed(versions)\n",
                "        pass\n",
            ),
        },
    ),
    *planted(
        "trainops/ema_advice.py",
        tests_of("advice_averages"),
        {
            "advice: versions are taken for values": (" and torch.equal(param.detach(), value):", ":"),
            "advice: one parameter for all": ("    if not others and", "    if"),
        },
    ),
    *planted(
        "trainops/optimizer.py",
        tests_of("ema_attach"),
        {
            "AdamW: a wrapper keeps the average to itself": (
                "            inner.ema = ema\n            return\n",
                "            pass\n",
            )
        },
    ),
]
