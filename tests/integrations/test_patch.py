"""patch() puts trainops in the place of names, and puts everything back exactly. Parts that need no framework."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import trainops
from trainops.integrations import patch

NAMES = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")


def here():
    return [torch.optim.AdamW, *(getattr(torch.nn.utils, name) for name in NAMES)]


THEIRS = here()
OURS = [trainops.AdamW, *(getattr(trainops, name) for name in NAMES)]


@pytest.fixture(autouse=True)
def _everything_is_back():
    assert here() == THEIRS
    yield
    assert here() == THEIRS


def test_within_a_block():
    with patch() as handle:
        assert here() == OURS
        assert "torch.optim.AdamW" in repr(handle)
        assert len(repr(handle)) < 300
    assert "nothing" in repr(handle)


def test_after_an_exception():
    with pytest.raises(KeyError), patch():
        raise KeyError


def test_until_it_is_undone():
    handle = patch()
    assert here() == OURS
    handle.undo()
    assert here() == THEIRS
    handle.undo()


def test_nested_and_undone_in_any_order():
    with patch() as outer:
        with patch():
            assert here() == OURS
        assert here() == OURS
        inner = patch()
        outer.undo()
        outer.undo()
        assert here() == OURS
        inner.undo()
        assert here() == THEIRS


def test_what_fails_halfway_is_put_back(monkeypatch):
    with monkeypatch.context() as context:
        context.setattr("trainops.integrations._patch.TORCH_CLIP", ("clip_grad_norm_", "no_such_name"))
        with pytest.raises(AttributeError):
            patch()
    assert here() == THEIRS


class Subclass(torch.Tensor):
    pass


def test_what_ours_leaves_to_pytorch_reaches_pytorch():
    with patch():
        for clip in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_):
            p = nn.Parameter(torch.zeros(4).as_subclass(Subclass))
            p.grad = torch.full((4,), 2.0).as_subclass(Subclass)
            clip([p], 1.0)
            assert p.grad.max() <= 1.0
        assert torch.nn.utils.get_total_norm([p.grad]) == 2.0


def test_a_step_within_is_pytorchs_step():
    weights = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        handle = patch() if inside else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, 4)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if handle is not None:
            assert isinstance(optimizer, trainops.AdamW)
            handle.undo()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights)


class SaysTorchsName(torch.optim.AdamW):
    def __init__(self, params, lr):
        torch.optim.AdamW.__init__(self, params, lr, weight_decay=0.5)


def test_a_subclass_that_calls_pytorchs_constructor_by_its_name():
    with patch():
        optimizer = SaysTorchsName([nn.Parameter(torch.ones(2))], 0.1)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["decoupled_weight_decay"]) == (0.1, 0.5, True)
    group["params"][0].grad = torch.ones(2)
    optimizer.step()
    assert torch.allclose(group["params"][0], torch.tensor(1 - 0.1 * 0.5 - 0.1))


def test_pickles_of_pytorchs_classes_work_within():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with patch():
        for x in (optimizer, torch.optim.AdamW([nn.Parameter(torch.ones(2))])):
            assert type(pickle.loads(pickle.dumps(x))) is type(x)


def test_importing_trainops_and_its_integrations_imports_no_framework():
    code = "import sys, trainops.integrations as i; i.patch().undo(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    frameworks = {"accelerate", "lightning", "pytorch_lightning", "timm", "transformers", "torchvision"}
    assert not frameworks & set(loaded)
    assert "torch" in loaded


@pytest.mark.parametrize("name", ["accelerate", "hf", "lightning", "timm"])
def test_a_missing_framework_is_named(name, monkeypatch):
    missing = {"hf": "transformers"}.get(name, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(missing), *sys.meta_path])
    for module in [
        m for m in sys.modules if m.partition(".")[0] == missing or m.startswith("trainops.integrations.")
    ]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=rf"{missing} is not installed: pip install trainops\[integrations\]"):
        __import__(f"trainops.integrations.{name}")


class Missing:
    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
