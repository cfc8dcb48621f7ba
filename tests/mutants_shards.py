"""Faults of averages of sharded models."""

from mutants import planted, tests_of

AVERAGES = tests_of("sharded_averages")
SWAPS = tests_of("sharded_swaps")
RANKS = tests_of("ranks", k="cpu-cpu")
SHARDS = [
    *planted(
        "trainops/ranks.py",
        RANKS,
        {
            "ranks: a norm that has begun is not awaited for all": (
                "total, powers = received(self.order, self.message)",
                "total, powers = self.order.total(self.message[:1]), self.message[:-1]",
            ),
            "ranks: copies count once each": (
                "mesh.message(order, powers, mesh.weights[0],",
                "mesh.message(order, powers, 1.0,",
            ),
            "ranks: messages differ in size": (
                "mesh.weights[0], None)\n",
                "mesh.weights[0], None).repeat(2)\n",
            ),
        },
    ),
    *planted(
        "csrc/core/shards.h",
        RANKS,
        {
            "ranks: gradients that are placed otherwise are measured": (
                "      if (!shards.placed_alike(its, first)) return pybind11::none();\n",
                "",
            ),
            "ranks: gradients that are missing are passed over": (
                "    if (grads[i].is_none()) return pybind11::none();",
                "    if (grads[i].is_none()) grads[i] = grads[0];",
            ),
        },
    ),
    *planted(
        "trainops/joint_norm.py",
        RANKS,
        {
            "ranks: nothing begins early": (
                "if not control.measures or self._norm_group is not None or not self._is_spread():",
                "if True:",
            ),
        },
    ),
    *planted(
        "trainops/ema_shards.py",
        SWAPS,
        {
            "shards: what FSDP has gathered stays": ("        module.reshard()\n", "        pass\n"),
            "shards: what FSDP is gathering is not awaited": (
                "            module.unshard()  #",
                "            pass  #",
            ),
            "shards: taken away within a forward pass": ('"IDLE") != "IDLE" for state', '"IDLE") == "" for state'),
            "shards: gathered copies are taken for the parameters": (
                "    if known.keys() & set(map(id, given))",
                "    if set() & set(map(id, given))",
            ),
            "shards: lists of shards are written": (
                "    if isinstance(model, nn.ParameterList) and",
                "    if False and",
            ),
        },
    ),
    *planted(
        "trainops/ema_shards.py",
        AVERAGES,
        {
            "shards: a module of shards can be called": (
                "        module.register_forward_pre_hook(refuse)\n",
                "        pass\n",
            ),
            "shards: all buffers of a shell are persistent": (
                "shell._non_persistent_buffers_set = set(model._non_persistent_buffers_set)",
                "pass",
            ),
            "shards: FSDP1's flat parameters are averaged": (
                "    if fsdp1_modules(model):\n        raise",
                "    if False:\n        raise",
            ),
        },
    ),
    *planted(
        "trainops/model_match.py",
        AVERAGES,
        {
            "shards: an average stays on meta": (
                "        is_filled = average.is_meta",
                "        is_filled = False and average.is_meta",
            ),
            "shards: FSDP's parameters are replaced": ("follows and not fsdp_modules(module)", "follows"),
        },
    ),
    *planted(
        "trainops/model_pairs.py",
        AVERAGES,
        {
            "shards: placements are not compared": ("    if layout(average) != layout(tensor):", "    if False:"),
        },
    ),
    *planted(
        "trainops/ema_update.py",
        AVERAGES,
        {
            "shards: averages are left to PyTorch": (
                "    averages, sources = all_local(matched.averages), all_local(sources)\n",
                "    averages = matched.averages\n",
            )
        },
    ),
    *planted(
        "trainops/ema_follow.py",
        AVERAGES,
        {
            "shards: what was loaded before sharding is forgotten": (
                "            self._was_written()  # looks",
                "            pass  # looks",
            ),
            "shards: what is loaded after sharding is not noticed": (
                "            self._matched.place()\n            self._remember_weights()\n",
                "            self._matched.place()\n",
            ),
            "shards: gathered averages are taken for averages": (
                "        reshard(self.model, self._module)\n",
                "        reshard(self.model)\n",
            ),
        },
    ),
    *planted(
        "trainops/ema_start.py",
        AVERAGES,
        {
            "shards: a DTensor that moved was written": ("form == new_form and ", ""),
        },
    ),
    *planted(
        "trainops/ema_checkpoints.py",
        AVERAGES,
        {
            "shards: every rank gets the whole": (
                "keeps = not is_spread or torch.distributed.get_rank() == 0",
                "keeps = True",
            ),
            "shards: exports share memory with the average": ('.to("cpu", copy=True) if', '.to("cpu") if'),
        },
    ),
    *planted(
        "trainops/ema_swap.py",
        SWAPS,
        {
            "shards: another model keeps what it has gathered": (
                "            reshard(model)\n            follows",
                "            follows",
            ),
            "shards: what is gathered is stored": ("            reshard(parameters)\n", ""),
        },
    ),
    *planted(
        "trainops/model_slots.py",
        SWAPS,
        {
            "shards: DTensors with gradients are copied by PyTorch": (
                "return layout(x) is None  # of a DTensor",
                "return True  # of a DTensor",
            )
        },
    ),
    *planted(
        "trainops/model_slots.py",
        AVERAGES,
        {"shards: whole weights are not loaded": ("else placed_as(x, own)", "else x")},
    ),
    *planted(
        "trainops/optimizer.py",
        SWAPS,
        {"shards: no parameter is found where all are gathered": ("            reshard(average.model)\n", "")},
    ),
]
