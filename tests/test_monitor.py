"""The monitor: its numbers, what it finds by name and step, and that it changes nothing."""

import json
import math
import re

import pytest
import torch
from contract import same_bits
from process_groups import forks, on_ranks
from targets import over
from torch import nn

import trainops
from trainops import Monitor

FEATURES = 6


def network(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 3))


def batch(seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, FEATURES, generator=generator), torch.randint(3, (size,), generator=generator)


def backward(model, seed=0, scale=1.0):
    x, y = batch(seed)
    (scale * nn.functional.cross_entropy(model(x), y)).backward()


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def kinds(monitor):
    return {(x.kind, x.name) for x in monitor.findings()}


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, fused=True),
    "trainops": lambda params: trainops.AdamW(params, 0.01, max_grad_norm=0.1),
    "split": lambda params: trainops.AdamW(params, 0.01, master="split"),
}


# The numbers


@over("make", OPTIMIZERS)
def test_numbers_are_those_of_pytorch(make):
    model = network()
    if make is OPTIMIZERS["split"]:
        model[2].bfloat16()
        model[2].register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
        model[2].register_forward_hook(lambda module, args, out: out.float())
    optimizer = make(model.parameters())
    weight_of = getattr(optimizer, "float32_weight", lambda p: p)
    monitor = Monitor(model, optimizer, every=2)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        grads = {name: p.grad.double() for name, p in model.named_parameters()}
        weights = {name: weight_of(p).detach().double() for name, p in model.named_parameters()}
        optimizer.step()
    assert [record.step for record in monitor.records] == [1, 3]
    found = monitor.flat()
    for name, p in model.named_parameters():
        update = weight_of(p).detach().double() - weights[name]
        for kind, x in (("grad", grads[name]), ("weight", weights[name]), ("update", update)):
            expected = {
                "l2_norm": x.norm(),
                "mean": x.mean(),
                "std": x.std(correction=0),
                "min": x.min(),
                "amax": x.abs().max(),
            }
            for statistic, value in expected.items():
                assert found[f"{kind}/{statistic}/{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-9), name
        ratio = (update.norm() / weights[name].norm()).item()
        assert found[f"update/ratio/{name}"] == pytest.approx(ratio, rel=1e-4)
        assert ratio > 0.0


def test_activations_are_those_of_all_batches_of_a_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    monitor = Monitor(model, optimizer, every=10, activations="1")
    inputs = [batch(seed, 2)[0] for seed in (1, 2, 3)]  # small ones: units are dead in some of them
    outputs = [model[1](model[0](x)).detach() for x in inputs]
    monitor._activations.take()  # these calls were not the model's
    for x in inputs:
        model(x).sum().backward()
    optimizer.step()
    x, found = torch.cat(outputs).double(), monitor.flat()
    assert found["activation/numel/1"] == x.numel()
    assert found["activation/mean/1"] == pytest.approx(x.mean().item())
    assert found["activation/std/1"] == pytest.approx(x.std(correction=0).item())
    assert found["activation/zeros/1"] == (x == 0).sum()
    assert found["activation/dead/1"] == (x == 0).all(0).double().mean() < (outputs[0] == 0).all(0).double().mean()
    assert "activation/saturated/1" not in found


def test_units_of_images_are_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.ones(2, 3, 5, 5))
    with torch.no_grad():
        model[0].bias[0] = -1e6
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, activations=["0", "1"])
    model(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    found = monitor.flat()
    assert found["activation/dead/0"] == 0.0
    assert found["activation/dead/1"] >= 0.25


def test_evaluation_is_not_watched():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, every=1, activations="1")
    backward(model)
    model.eval()
    model(batch(7, 1000)[0])
    model.train()
    optimizer.step()
    assert monitor.flat()["activation/numel/1"] == 16 * 8


def test_a_scalers_scale_is_taken_out():
    for make in (OPTIMIZERS["sgd"], OPTIMIZERS["trainops"]):
        found = []
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**14)):
            model = network()
            optimizer = make(model.parameters())
            monitor = Monitor(model, optimizer)
            if scaler is None:
                backward(model)
                optimizer.step()
            else:
                backward(model, scale=scaler.scale(torch.ones(())))
                scaler.step(optimizer)
                scaler.update()
            found.append(monitor.flat())
        assert found[0]["grad/l2_norm/0.weight"] == pytest.approx(found[1]["grad/l2_norm/0.weight"], rel=1e-5)
        assert found[0]["grad/std/0.weight"] == pytest.approx(found[1]["grad/std/0.weight"], rel=1e-5)


def test_parameters_without_a_gradient_are_left_out():
    model = network()
    model[2].requires_grad_(False)
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1))
    train(model, monitor.optimizer, 1)
    assert monitor.last().names == ["0.weight", "0.bias", "4.weight", "4.bias"]


def test_sparse_gradients_are_told_and_others_recorded():
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.warns(UserWarning, match=r"'0.weight' has sparse gradients"):
        monitor.optimizer.step()
    assert monitor.last().names == ["1.weight", "1.bias"]


def test_an_output_that_is_sparse_is_not_watched():
    class Sparse(nn.Module):
        def forward(self, x):
            return x.relu().to_sparse()

    model = nn.Sequential(nn.Linear(4, 4), Sparse())
    Monitor(model, torch.optim.SGD(model.parameters(), 0.1), activations="1")
    assert model(torch.ones(2, 4)).is_sparse


def test_some_names():
    model = network()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1), include=["0", "*.bias"])
    train(model, monitor.optimizer, 1)
    assert monitor.last().names == ["0.weight", "0.bias", "2.bias", "4.bias"]
    assert list(monitor.layers()) == ["0", "2", "4"]


# What it finds


def test_the_layer_that_explodes_and_those_that_vanish():
    torch.manual_seed(0)
    deep = nn.Sequential(*(layer for _ in range(30) for layer in (nn.Linear(10, 10), nn.Sigmoid())))
    monitor = Monitor(deep, torch.optim.SGD(deep.parameters(), 0.01))
    deep(torch.randn(20, 10)).sum().backward()
    monitor.optimizer.step()
    vanishing = [x.name for x in monitor.findings() if x.kind == "vanishing"]
    assert {"0", "2", "4"} <= set(vanishing)
    assert not {"30", "58"} & set(vanishing)

    healthy = network()
    with torch.no_grad():
        healthy[2].weight.mul_(1e6)
    monitor = Monitor(healthy, torch.optim.SGD(healthy.parameters(), 0.1))
    train(healthy, monitor.optimizer, 1)
    # What is before the large weights has large gradients, what is behind them has large inputs.
    assert kinds(monitor) == {("exploding", "0"), ("exploding", "4")}


def test_what_explodes_while_it_trains_is_told_until_the_end():
    model = network()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 1e-3), every=1)
    train(model, monitor.optimizer, 4)
    with torch.no_grad():
        model[2].weight.mul_(100.0)
    train(model, monitor.optimizer, 8)
    found = {(x.kind, x.name): x for x in monitor.findings()}
    assert (found["exploding_weights", "2"].step, found["exploding_weights", "2"].seen) == (5, 8)
    assert found["exploding", "0"].step == 5
    assert monitor.findings()[0].kind == "exploding_weights"
    assert not [x for x in monitor.findings(growth=1e6) if x.kind == "exploding_weights"]


def test_a_network_that_trains_well_has_nothing_to_find():
    model = network()
    monitor = Monitor(model, trainops.AdamW(model.parameters(), 1e-2), every=5, activations=["1", "3"])
    train(model, monitor.optimizer, 21)
    assert len(monitor.records) == 5
    assert monitor.findings() == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_by_name_and_step(value):
    model = network()
    monitor = Monitor(model, trainops.AdamW(model.parameters(), skip_nonfinite=True), every=1)
    for step in range(4):
        monitor.optimizer.zero_grad()
        backward(model, step)
        if step >= 2:
            model[2].weight.grad[1, 1] = value
        monitor.optimizer.step()
    (found,) = (x for x in monitor.findings() if x.kind == "nonfinite")
    assert (found.name, found.step, found.seen) == ("2.weight", 3, 2)
    assert str(found) == "step 3: 2.weight: 1 of 64 elements of the gradient are infinite or NaN"


def test_dead_units_and_saturated_ones():
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[:5] = -1e6
        model[2].weight.fill_(1e3)
        model[2].bias.fill_(50.0)
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 1e-3), activations=[re.compile("^[13]$")])
    train(model, monitor.optimizer, 1)
    found = {x.kind: x for x in monitor.findings()}
    assert found["dead"].name == "1"
    assert "% of the units are dead" in found["dead"].message
    assert found["saturated"].name == "3"
    assert monitor.flat()["activation/dead/1"] >= 5 / 8
    assert monitor.flat()["activation/saturated/3"] == 1.0


def test_layers_that_do_not_move():
    model = network().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 1e-7)
    monitor = Monitor(model, optimizer)
    nn.functional.cross_entropy(model(batch()[0].bfloat16()), batch()[1]).backward()
    optimizer.step()
    assert {x.name for x in monitor.findings() if x.kind == "still"} == {"0", "2", "4"}


# What is shown


def watched(steps=7, every=3):
    model = network()
    monitor = Monitor(model, trainops.AdamW(model.parameters(), 1e-2), every=every, activations=["1", "3"])
    train(model, monitor.optimizer, steps)
    return monitor


def test_json_lines(tmp_path):
    monitor = watched()
    monitor.last().grads.rows[0, 3] = math.nan
    monitor.write(tmp_path / "records.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [x.pop("step") for x in lines] == [1, 4, 7]
    assert lines[0] == monitor.flat(monitor.records[0])
    assert lines[2]["grad/min/0.weight"] is None


def test_a_table_and_pictures():
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    monitor = watched()
    assert monitor.table().row_count == 3
    norms = monitor.plot()
    images = [image for axes in norms.axes for image in axes.images]
    assert [image.get_array().shape for image in images[:2]] == [(3, 3), (3, 3)]
    record = monitor.records[1]
    first = math.hypot(*record.grads.l2_norm[:2].tolist())
    assert float(images[0].get_array()[0, 1]) == pytest.approx(math.log10(first))
    shown = [image for axes in monitor.plot_distributions().axes for image in axes.images]
    for image in shown[:3]:
        assert torch.tensor(image.get_array().filled(0.0)).nansum(1).tolist() == pytest.approx([100.0] * 3)


def test_histograms_are_those_of_the_last_record():
    monitor = watched()
    assert monitor.records[0].grads.histogram is None
    assert monitor.last().updates.histogram is not None
    plots = pytest.importorskip("trainops.monitor_plots")
    with pytest.raises(RuntimeError, match="no histograms"):
        plots.distributions(monitor.records[0])


# It changes nothing, and goes


@over("make", {name: make for name, make in OPTIMIZERS.items() if name != "split"})
def test_a_training_is_the_same_with_a_monitor(make):
    models = [network(), network()]
    for i, model in enumerate(models):
        optimizer = make(model.parameters())
        monitor = Monitor(model, optimizer, every=2, activations="1") if i else None
        train(model, optimizer, 5)
    assert len(monitor.records) == 3
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())


def test_without_hooks_nothing_is_recorded():
    model = network()
    with Monitor(model, torch.optim.SGD(model.parameters(), 0.1), every=1, activations="1") as monitor:
        train(model, monitor.optimizer, 2)
    train(model, monitor.optimizer, 2)
    assert len(monitor.records) == 2
    assert not model[1]._forward_hooks


def test_steps_in_between_look_at_nothing(monkeypatch):
    model = network()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1), every=4, activations="1")
    train(model, monitor.optimizer, 1)
    for module in ("step_stats", "monitor_activations"):
        monkeypatch.setattr(f"trainops.{module}.tensor_stats", None)
    train(model, monitor.optimizer, 3)
    assert monitor.steps == 4
    assert len(monitor.records) == 1


def test_compiled_models_have_one_graph():
    model = network()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1), every=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    train(compiled, monitor.optimizer, 2)
    assert len(monitor.records) == 2


def test_inside_and_outside_of_wrappers():
    model = network()
    compiled = torch.compile(model, backend="eager")
    monitor = Monitor(compiled, torch.optim.SGD(model.parameters(), 0.1))
    train(model, monitor.optimizer, 1)
    assert monitor.last().names[0] == "0.weight"


# Bad input


BAD = {
    "every": ({"every": 0}, "every must be an integer of at least 1"),
    "fraction": ({"every": 1.5}, "every must be an integer of at least 1"),
    "include": ({"include": "blocks.*"}, "the model has no parameter whose name fits 'blocks.*'"),
    "activations": ({"activations": ["1", "block"]}, "the model has no module whose name fits 'block'"),
    "other": ({"model": nn.Linear(2, 2)}, "the optimizer has none of these parameters"),
    "no_model": ({"model": "vit"}, "model must be a torch.nn.Module, got 'vit'"),
    "no_optimizer": ({"optimizer": None}, "optimizer must be a torch.optim.Optimizer, got None"),
}


@over("case", BAD)
def test_bad_input_leaves_no_hook(case):
    changes, message = case
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises((TypeError, ValueError), match=message.replace("*", r"\*")):
        Monitor(**{"model": model, "optimizer": optimizer, **changes})
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "limits", [{"share": 30}, {"share": -0.1}, {"still": float("nan")}, {"growth": -1.0}], ids=str
)
def test_limits_out_of_range(limits):
    with pytest.raises(ValueError, match=f"{next(iter(limits))} must be at least 0"):
        watched().findings(**limits)


def test_nothing_to_show_yet():
    model = network()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1))
    for show in (monitor.flat, monitor.table, monitor.plot, monitor.plot_distributions):
        with pytest.raises(RuntimeError, match="no step was looked at yet"):
            show()
    assert monitor.findings() == []


# Ranks


def check_ranks(rank, kind):
    model = network()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model)
    optimizer = trainops.AdamW(model.parameters(), 1e-2)
    monitor = Monitor(model, optimizer, every=2)
    alone = network()
    expected = Monitor(alone, trainops.AdamW(alone.parameters(), 1e-2), every=2)
    for step in range(3):
        for its, mine in ((model, slice(rank, None, 2)), (alone, slice(None))):
            x, y = batch(step)
            its.zero_grad()
            nn.functional.cross_entropy(its(x[mine]), y[mine]).backward()
        optimizer.step()
        expected.optimizer.step()
    for record, other in zip(monitor.records, expected.records, strict=True):
        found, true = record.flat(), other.flat()
        assert found.keys() == true.keys()
        for key, x in true.items():
            assert found[key] == pytest.approx(x, rel=1e-3, abs=1e-6), key


@forks
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_see_what_one_process_sees(tmp_path, kind):
    on_ranks(2, tmp_path, check_ranks, kind)
