"""Faults of the monitor: see ``mutants.py``."""

from mutants import planted, tests_of

MONITOR = [
    *planted(
        "trainops/monitor.py",
        tests_of("monitor"),
        {
            "monitor: gradients stay scaled": ('getattr(optimizer, "grad_scale", None)', "None"),
            "monitor: every step is looked at": ("return self.steps % self.every == 0", "return True"),
            "monitor: hooks stay": ("            hook.remove()\n", "            pass\n"),
            "monitor: names with wrappers": ("innermost(model).named_parameters(", "model.named_parameters("),
            "monitor: old histograms are kept": ("self.records[-1].without_histograms()", "self.records[-1]"),
            "monitor: NaN in JSON": ('x if abs(x) < float("inf") else None', "x"),
            "monitor: parameters of other optimizers": ("if id(p) in own and", "if"),
        },
    ),
    *planted(
        "trainops/step_stats.py",
        tests_of("monitor"),
        {
            "monitor: weights after the step": (
                "self.weights = tensor_stats(self._before, **self._options)",
                "self.weights = tensor_stats([x + 1 for x in self._before], **self._options)",
            ),
            "monitor: updates the wrong way": (".neg_()", ""),
            "monitor: masters are not read": (
                'getattr(optimizer, "float32_weight", lambda param: param)',
                "lambda param: param",
            ),
        },
    ),
    *planted(
        "trainops/monitor_activations.py",
        tests_of("monitor", "monitor_activations"),
        {
            "monitor: evaluation is watched": ("not module.training or ", ""),
            "monitor: the last batch alone": ("now if before is None else before.merge(now)", "now"),
            "monitor: dead in one batch": ("self.zero & zero if", "self.zero | zero if"),
            "monitor: saturated in the middle": (
                "(x <= ends[0] + near) | (x >= ends[1] - near)",
                "(x <= ends[0] + near)",
            ),
            "monitor: units of images are columns": (
                "        return Units(1)\n",
                "        pass\n",
            ),
            "monitor: units of convolutions are places": ("Units(-len(module.kernel_size) - 1,", "Units(-1,"),
            "monitor: an activation function has units of its own": (
                "while _keeps_dimensions(every[place]) and place > 0:",
                "while False:",
            ),
            "monitor: units are those of any module before": (
                "while _keeps_dimensions(every[place]) and place > 0:",
                "while place > 0:",
            ),
            "monitor: units of a batch of another shape": ("units.dims in (None, dims)", "True"),
            "monitor: computed again, looked at again": (" or torch._C._current_graph_task_id() != -1", ""),
            "monitor: activations are never forgotten": ("seen, self._seen = self._seen, {}", "seen = self._seen"),
        },
    ),
    *planted(
        "trainops/monitor_findings.py",
        tests_of("monitor", "monitor_activations"),
        {
            "monitor: explosions are not told": ("if x.gradient > exploding * x.weight > 0.0", "if False"),
            "monitor: layers vanish before the explosion": (
                "        else:\n            others.append(x)",
                "        others.append(x)",
            ),
            "monitor: the first record counts": (
                "Finding(kind, name, record.step, 1, message)\n                if before is None",
                "Finding(kind, name, record.step, 1, message)\n                if True",
            ),
            "monitor: growth is not told": ("if norm > self.growth * usual > 0.0:", "if False:"),
            "monitor: what has exploded is usual": (
                "                elif math.isfinite(norm):\n",
                "                if math.isfinite(norm):\n",
            ),
            "monitor: nobody stands still": ("elif x.update < still * x.weight", "elif False"),
            "monitor: bad weights are not told": ('("weight", record.weights), ("update"', '("update"'),
            "monitor: bad updates are not told": (', ("update", record.updates))', ",)"),
            "monitor: an update that is not finite does not move": (" or moved_badly[name] > 0", ""),
            "monitor: without a learning rate a layer does not move": (" and not x.rests", ""),
        },
    ),
    *planted(
        "trainops/monitor_record.py",
        tests_of("monitor", "monitor_activations"),
        {
            "monitor: the norm of a layer is the sum": (
                "math.hypot(*(norms[i] for i in rows))",
                "sum(norms[i] for i in rows)",
            ),
        },
    ),
    *planted(
        "trainops/monitor_plots.py",
        tests_of("monitor", "monitor_activations"),
        {
            "monitor: colours without a logarithm": ("values.log10()", "values"),
            "monitor: counts for shares": (
                "100.0 * counts / counts.sum(1, keepdim=True).clamp(min=1)",
                "100.0 * counts",
            ),
        },
    ),
    *planted(
        "trainops/monitor.py",
        tests_of("monitor_models"),
        {
            "monitor: compiled steps look": (
                "    @_disable_dynamo\n    @torch.no_grad()\n    def _begin_step",
                "    @torch.no_grad()\n    def _begin_step",
            ),
            "monitor: a step waits": (
                "        self._begun = BegunStep(",
                "        measured.grads.nonfinite.any().item()\n        self._begun = BegunStep(",
            ),
            "monitor: records without end": ("if len(self.records) > self.keep:", "if False:"),
            "monitor: earlier records become ever fewer": ("if self._places[-1] % self._stride:", "if False:"),
            "monitor: other names of parameters": ("remove_duplicate=False", "remove_duplicate=True"),
            "monitor: hooks that are never called": ("if seen is None and", "if False and"),
            "monitor: parameters are replaced": ("if id(p) not in own]:", "if False]:"),
        },
    ),
    *planted(
        "trainops/monitor_activations.py",
        tests_of("monitor_models"),
        {
            "monitor: compiled hooks": ("    @_disable_dynamo  # it", "    # it"),
            "monitor: copies are watched": (
                "return _Hook, (None, self.name)",
                "return _Hook, (self.look, self.name)",
            ),
            "monitor: a name is all that is inside": ("for x in chosen if x not in exact", "for x in chosen"),
            "monitor: other names of modules": ("remove_duplicate=False", "remove_duplicate=True"),
        },
    ),
    *planted(
        "trainops/monitor_findings.py",
        tests_of("monitor_models"),
        {
            "monitor: what overflows vanishes": (" or not x.finite:", ":"),
            "monitor: a skipped step does not move": ("0.0 if _is_skipped(record, layers) else still", "still"),
            "monitor: a step that the optimizer does not count is none": (
                "return not all(x.finite for x in layers) and not any(x.update for x in layers)",
                "return False",
            ),
        },
    ),
]
