"""The experiments of `make tricks`: their claims hold, and fail where the trick is taken out."""

import importlib
import inspect
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import torch
from targets import thorough

for needed in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(needed)

FOLDER = Path(__file__).parent.parent / "examples" / "tricks"

# What makes a run short. A claim about seeds needs all five.
SHORT = {
    "vanishing_gradients": {"seeds": 5, "depth": 20},
    "initialisation": {"seeds": 5, "steps": 2},
    "learning_rate": {"seeds": 5, "steps": 245},
    "valleys": {"steps": 450, "RATES": (0.01, 0.0178, 0.0316, 0.1, 0.1778)},
    "optimizers": {"seeds": 5, "steps": 100, "RATES": (0.01, 1.0)},
    "clipping": {"seeds": 5, "steps": 20},
    "accumulation": {"seeds": 5, "steps": 5},
    "weight_decay": {"seeds": 5, "epochs": 200},
    "averaging": {"seeds": 5, "steps": 300},
    "regularisers": {"seeds": 5, "steps": 80},
    "drop_path": {"seeds": 5, "steps": 100, "RATES": (0.0, 0.9)},
}


def run_short(name, monkeypatch):
    module = importlib.import_module(name)
    for key in filter(str.isupper, SHORT[name]):
        monkeypatch.setattr(module, key, SHORT[name][key])
    return module.run(**{key: value for key, value in SHORT[name].items() if key.islower()})


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """Scripts import their neighbours, and compute on one thread."""
    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failed(report):
    return [claim.text for claim in report.claims if not claim.holds]


@thorough(lambda whole, **_: whole)
@pytest.mark.parametrize("whole", [False, True], ids=["short", "whole"])
@pytest.mark.parametrize("name", SHORT)
def test_claims_hold(name, whole, monkeypatch):
    report = importlib.import_module(name).run() if whole else run_short(name, monkeypatch)
    assert report.claims
    assert not failed(report)


def with_the_way_of(table, name, other):
    """A table in which one way is what another one is; beginnings of their names will do."""
    key, source = (next(key for key in table if key.startswith(start)) for start in (name, other))
    return {"WAYS": {**table, key: table[source]}}


# What is taken out of an experiment, and the beginning of a claim that then has to fail.
BROKEN = {
    "vanishing_gradients": (lambda m: {"WIDE": {**m.WIDE, "ReLU, He": m.WIDE["ReLU, PyTorch's"]}}, "64 units, ReLU"),
    "initialisation": (lambda m: with_the_way_of(m.WAYS, "He", "Xavier"), "He keeps more than Xavier forth"),
    "learning_rate": (lambda m: {"CURVATURE": 2.0}, "at 0.1 every step"),
    "valleys": (lambda m: with_the_way_of(m.WAYS, "momentum", "SGD"), "steep valley: SGD"),
    "optimizers": (lambda m: with_the_way_of(m.WAYS, "Adam", "momentum"), "at 0.01, the loss of momentum"),
    "clipping": (lambda m: {"MAX_VALUE": 1e30}, "by value"),
    "accumulation": (lambda m: with_the_way_of(m.WAYS, "parts of", "the same"), "counted parts"),
    "weight_decay": (lambda m: with_the_way_of(m.WAYS, "L2", "no penalty"), "it closes the gap"),
    "averaging": (lambda m: {"DECAY": 0.0}, "mean of the last quarter"),
    "regularisers": (lambda m: with_the_way_of(m.WAYS, "dropout", "neither"), "random labels: dropout"),
    "drop_path": (lambda m: {"Block": lambda rate, block=m.Block: block(0.0)}, "test: 0.9"),
}
QUICK = ("vanishing_gradients", "clipping", "accumulation")


@thorough(lambda name, **_: name not in QUICK)
@pytest.mark.parametrize("name", BROKEN)
def test_a_claim_fails_without_its_trick(name, monkeypatch):
    module = importlib.import_module(name)
    changes, claim = BROKEN[name]
    for attribute, value in changes(module).items():
        monkeypatch.setattr(module, attribute, value)
    assert any(text.startswith(claim) for text in failed(run_short(name, monkeypatch)))


@pytest.mark.parametrize(
    ("wins", "seeds", "holds"), [(5, 5, True), (4, 5, False), (4, 4, False), (9, 10, True), (8, 10, False)]
)
def test_a_claim_about_seeds_is_a_sign_test(wins, seeds, holds):
    experiment = importlib.import_module("experiment")
    these = [2.0] * wins + [float("nan"), 1.0][: seeds - wins]
    claim = experiment.larger("it", these, [0.0] * seeds, by=1.0, unit=" points")
    assert claim.holds == holds
    assert claim.text == f"it: 2 points in the median, above 1 points in {wins} of {seeds} seeds"


class Page(HTMLParser):
    """What refers to something, and the texts."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "href") if name in found]
        self.ids += [found["id"]] if "id" in found else []

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def fake(monkeypatch):
    """An experiment of which one claim holds."""
    experiment = importlib.import_module("experiment")
    module = ModuleType("fake")
    module.__doc__ = "A < B\n\n    python fake.py [--seeds 3]\n\nSee `x & y`.\n"

    def run(seeds=3):
        claims = [experiment.Claim("2 > 1", True), experiment.Claim("1 > 2", False)]
        return experiment.Report(("seeds",), [(f"{seeds} (<4)",)], experiment.panels(1)[0], claims)

    module.run = run
    monkeypatch.setitem(sys.modules, "fake", module)
    return module


def test_the_page_has_all_of_an_experiment(fake, monkeypatch, tmp_path, capsys):
    page = importlib.import_module("page")
    monkeypatch.setattr(page, "EXPERIMENTS", ("fake",))
    assert page.main(["--output", str(tmp_path), "--jobs", "1"]) == 1  # a claim does not hold
    assert "DOES NOT HOLD: fake: 1 > 2" in capsys.readouterr().out
    found = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert found.links == ["#fake", "fake.png"]
    assert found.ids == ["fake"]
    assert (tmp_path / "fake.png").stat().st_size > 1000
    assert {"A < B", "x & y", "3", "(<4)", "holds", "2 > 1", "fails", "1 > 2"} <= set(found.texts)


def test_the_page_of_the_documentation_has_all_of_an_experiment(fake, monkeypatch, tmp_path):
    page = importlib.import_module("page")
    monkeypatch.setattr(page, "EXPERIMENTS", ("fake",))
    page.main(["--output", str(tmp_path / "out"), "--jobs", "1", "--markdown", str(tmp_path / "docs" / "tricks.md")])
    text = (tmp_path / "docs" / "tricks.md").read_text(encoding="utf-8")
    assert "\n## A < B\n\nSee `x & y`.\n\n![A < B](tricks/fake.png)\n\n| seeds |\n| --- |\n| 3<br>(<4) |\n\n" in text
    assert text.endswith("- holds: 2 > 1\n- **does not hold**: 1 > 2\n\n`python fake.py [--seeds 3]`\n")
    assert (tmp_path / "docs" / "tricks" / "fake.png").stat().st_size > 1000


def test_an_experiment_has_a_command_line(fake, monkeypatch, tmp_path, capsys):
    experiment = importlib.import_module("experiment")
    picture = tmp_path / "made" / "picture.png"
    monkeypatch.setattr(sys, "argv", ["fake", "--seeds", "7", "--output", str(picture)])
    with pytest.raises(SystemExit) as stopped:
        experiment.main(fake.run, fake.__doc__)
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "7 (<4)" in said
    assert "holds: 2 > 1" in said
    assert "DOES NOT HOLD: 1 > 2" in said
    assert picture.exists()
    monkeypatch.setattr(sys, "argv", ["fake", "--seeds", "0"])
    with pytest.raises(SystemExit) as stopped:
        experiment.main(fake.run, fake.__doc__)
    assert stopped.value.code == 2
    assert "--seeds must be at least 1" in capsys.readouterr().err


def test_every_experiment_is_on_the_page_and_says_its_options():
    names = importlib.import_module("page").EXPERIMENTS
    assert sorted(names) == sorted(SHORT) == sorted(BROKEN)
    assert {*names} == {path.stem for path in FOLDER.glob("*.py")} - {"experiment", "page"}
    for name in names:
        module = importlib.import_module(name)
        defaults = {key: parameter.default for key, parameter in inspect.signature(module.run).parameters.items()}
        usage = module.__doc__.split("\n\n")[1]
        assert f"examples/tricks/{name}.py " in usage
        assert {key: int(value) for key, value in re.findall(r"\[--(\w+) (\d+)\]", usage)} == defaults


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--jobs", "0"], "--jobs must"), (["--only", "x"], "there is no x")]
)
def test_the_page_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("page").main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
