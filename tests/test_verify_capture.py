"""The part of `python -m trainops verify` that captures CUDA graphs: its order of calls, and what it notices."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from trainops.verify import capture, checks_of, compare, run
from trainops.verify.capture import CAPTURES, WARM_UPS, graph_of
from trainops.verify.checks import CHECKS

CPU = compare.Place("cpu", torch.device("cpu"), torch.float32)


@pytest.fixture
def calls(monkeypatch):
    """A stand-in for the calls of ``torch.cuda`` that a capture goes through, which records them."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    def within(what):
        @contextmanager
        def scope(*_):
            calls.append(f"begin {what}")
            yield
            calls.append(f"end {what}")

        return scope

    stand_in = {"stream": within("stream"), "graph": within("graph"), "device": within("device")}
    stand_in |= {"Stream": lambda _: Stream("side"), "current_stream": lambda _: Stream("current")}
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**stand_in, CUDAGraph=lambda: "a graph"))
    return calls


def test_the_warm_up_is_on_another_stream_and_ends_before_the_capture(calls):
    assert graph_of(lambda: calls.append("call"), torch.device("cuda")) == "a graph"
    warm_up = ["begin stream", *["call"] * WARM_UPS, "end stream"]
    captured = ["begin device", "begin graph", "call", "end graph", "end device"]
    assert calls == ["side waits for current", *warm_up, "current waits for side", *captured]


def replaying(monkeypatch, change):
    """Graphs that replay by calling again, as ``change`` lets them. What is captured is not run, as on a GPU."""

    def stand_in(call, _):
        for _ in range(WARM_UPS):
            call()
        return SimpleNamespace(replay=lambda: change(call))

    monkeypatch.setattr(capture, "graph_of", stand_in)


@pytest.mark.parametrize("op", CAPTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_that_is_the_call_passes(monkeypatch, op, dtype):
    replaying(monkeypatch, lambda call: call())
    found = run(op, CPU._replace(dtype=dtype))
    assert (found.worst, found.problem) == (0.0, "")


def twice(call):
    call()
    call()


@pytest.mark.parametrize("op", CAPTURES)
def test_a_replay_that_does_nothing_is_noticed(monkeypatch, op):
    replaying(monkeypatch, lambda call: None)
    assert "after replay 1: element" in run(op, CPU).problem


@pytest.mark.parametrize("op", [op for op in CAPTURES if "clip" not in op and "statistics" not in op])
def test_a_replay_that_does_it_twice_is_noticed(monkeypatch, op):
    replaying(monkeypatch, twice)
    assert "after replay 1: element" in run(op, CPU).problem


@pytest.mark.parametrize("op", CAPTURES)
def test_inputs_of_the_capture_are_noticed(monkeypatch, op):
    """A graph that reads copies which were made when it was captured."""
    feed, first = capture.feed, {}

    def stale(works, place, generator, replay):
        feed(works, place, generator, replay)
        graphed, _ = works
        for i, x in enumerate(graphed.inputs):
            x.copy_(first.setdefault(i, x.detach().clone()))

    monkeypatch.setattr(capture, "feed", stale)
    replaying(monkeypatch, lambda call: call())
    assert "after replay 1: element" in run(op, CPU).problem


def test_a_step_that_is_not_skipped_in_a_graph_is_noticed(monkeypatch):
    """The gradients of the second replay are not finite."""
    make = capture.step

    def unskipped(place, generator):
        work = make(place, generator)
        if made:
            return work
        made.append(work)
        work.call.__self__.skip_nonfinite = False
        return work

    made = []
    replaying(monkeypatch, lambda call: call())
    monkeypatch.setitem(CAPTURES, "step in a CUDA graph", capture.check(unskipped))
    assert "after replay 2" in run("step in a CUDA graph", CPU).problem


def test_what_is_captured():
    """Kernels on a GPU. PyTorch's operations wait for the device here and there."""
    gpu = torch.device("cuda")
    every = [op for op in CHECKS if op not in ("a step with masters", "stochastic rounding")]  # which are for 16 bits
    assert list(checks_of(CPU)) == every
    assert list(checks_of(compare.Place("cuda", gpu, torch.float32))) == [*every, *CAPTURES]
    for backend in ("reference", "foreach"):
        assert list(checks_of(compare.Place(backend, gpu, torch.float32))) == every
