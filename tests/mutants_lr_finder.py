"""Faults of the learning rate finder: see ``mutants.py``."""

from mutants import planted, tests_of

LR_FINDER = [
    *planted(
        "trainops/lr_finder.py",
        tests_of("lr_finder"),
        {
            "finder: biased smoothing": ("average / (1.0 - smoothing**i)", "average"),
            "finder: groups have one learning rate": (
                "return [x / max(rates) for x in rates]",
                "return [1.0 for x in rates]",
            ),
            "finder: gradients are summed": ("loss.reshape(()) / len(self.current)", "loss.reshape(())"),
            "finder: linear is exponential": ('if sweep == "linear":', "if False:"),
            "finder: the last step diverges": ("and smoothed[-1] > divergence * least", "and False"),
            "finder: each rank has its own loss": (
                "float(self.ranks.mean(self.backward()))",
                "float(self.backward())",
            ),
            "finder: iterators are used up": ("if isinstance(batches, Iterator):", "if False:"),
            "finder: the loss is scaled": (
                "losses.append(loss.detach())",
                "losses.append((loss if self.scaler is None else self.scaler.scale(loss)).detach())",
            ),
            "finder: closures are forgotten": ("and _needs_closure(self.optimizer)", "and False"),
            "finder: schedulers that begin at 0": ('("lr", "initial_lr")', '("lr",)'),
            "finder: losses without a gradient": ("if not loss.requires_grad:", "if False:"),
        },
    ),
    *planted(
        "trainops/lr_finder_result.py",
        tests_of("lr_finder"),
        {
            "finder: slopes against the learning rate": ("[math.log10(lr) for lr in self.lrs]", "self.lrs"),
            "finder: the steepest after the minimum": ("for i in range(1, end)", "for i in range(1, len(x) - 1)"),
        },
    ),
    *planted(
        "trainops/training_ranks.py",
        tests_of("lr_finder", k="ranks"),
        {
            "finder: DDP within a model is not seen": ("for x in model.modules() if", "for x in [model] if"),
            "finder: the mean over all ranks": (
                "group = mesh.get_group(dim)",
                "group = torch.distributed.group.WORLD",
            ),
            "finder: a rank without batches goes on alone": (
                "return not lacking.item()",
                "return has",
            ),
        },
    ),
    *planted(
        "trainops/training_state.py",
        tests_of("lr_finder"),
        {
            "finder: gradients are lost": ("        param.grad = grad()\n", ""),
            "finder: modes are lost": ("        module.training = training\n", ""),
            "finder: buffers are lost": (", remembered(module._buffers)]", "]"),
            "finder: extra state is lost": (
                "        if has_extra_state:\n            module.set",
                "        if False:\n            module.set",
            ),
            "finder: the scaler is left": ("        yield _attributes(scaler)\n", "        pass\n"),
            "finder: averages move": ("    optimizer._averages = ()\n", ""),
            "finder: averages see writes": ("    yield from [ema.overlook_writes() for ema in averages]\n", ""),
            "finder: new state stays": (
                "            value.clear()\n            value.update(own)\n",
                "            value.update(own)\n",
            ),
            "finder: tensors are replaced": (
                "            tensor.detach().copy_(value)\n        return tensor\n",
                "            pass\n        return value\n",
            ),
            "finder: python's random numbers": ("        random.setstate(python)\n", ""),
            "finder: numpy's random numbers": (
                "            numpy.random.set_state(of_numpy)\n",
                "            pass\n",
            ),
            "finder: torch's random numbers": ("        torch.set_rng_state(cpu)\n", ""),
            "finder: generators of loaders": ("return lambda: generator.set_state(state)", "return lambda: None"),
            "finder: loaders that have a state": ("yield lambda: batches.load_state_dict(state)", "pass"),
        },
    ),
]
