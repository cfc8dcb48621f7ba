"""Steps in CUDA graphs, on fake devices: what a graph reads is its own, and goes with it."""

import gc

import pytest
import torch
from host_fixtures import Training, needs_shim
from targets import over
from torch import nn

import trainops
from trainops import graphs, uploads
from trainops.adapters import _device, _triton, cuda, triton
from trainops.uploads import Recent

pytestmark = needs_shim


def replay(training, graph, times=2):
    for _ in range(times):
        training.step(graph.replay)


@pytest.mark.parametrize("where", ["another_stream", "the_stream_of_the_warm_up"])
def test_the_usual_pattern(fake, gpu_backend, where):
    training, side = Training(fake, gpu_backend), torch.cuda.Stream()
    training.warm_up(side)
    graph = training.capture(side if where == "the_stream_of_the_warm_up" else None)
    fake.synchronizations.clear()
    replay(training, graph)
    assert fake.synchronizations == []
    training.check()


RANDOM = {
    "codes": {"state_dtype": "int8"},
    "codes_and_masters": {"state_dtype": "int8", "dtype": torch.bfloat16, "master": "split"},
    "parameters": {"stochastic_rounding": True, "dtype": torch.bfloat16},
}


@over("options", RANDOM)
def test_replays_have_random_bits_of_their_own(fake, gpu_backend, options):
    """The step count is on the device, and the random bits are those of each step: the bits of the twin."""
    training = Training(fake, gpu_backend, max_grad_norm=None, **options)
    training.warm_up(torch.cuda.Stream())
    graph = training.capture()
    fake.synchronizations.clear()
    replay(training, graph, 3)
    assert fake.synchronizations == []
    training.check()


def test_numbers_on_the_device_are_read_at_each_replay(fake, gpu_backend):
    training = Training(fake, gpu_backend, capturable=True)
    group, other = training.optimizer.param_groups[0], training.twin.param_groups[0]
    lr, beta, limit = (fake.on(torch.tensor(x)) for x in (0.125, 0.5, 1.0))
    group |= {"lr": lr, "betas": (beta, beta)}
    training.optimizer.max_grad_norm = limit
    other |= {"lr": 0.125, "betas": (0.5, 0.5)}
    training.warm_up(torch.cuda.Stream())
    graph = training.capture()
    for number in (0.25, 0.75):
        for x in (lr, beta, limit):
            x.fill_(number)
        other |= {"lr": number, "betas": (number, number)}
        training.twin.max_grad_norm = number
        replay(training, graph)
    training.check()


def test_graphs_of_two_devices(fake, gpu_backend):
    trainings = [Training(fake, gpu_backend, device) for device in (1, 0)]
    captured = []
    for training, device in zip(trainings, (1, 0), strict=True):
        with torch.cuda.device(device):
            training.warm_up(torch.cuda.Stream())
            captured.append(training.capture())
    for training, graph, device in zip(trainings, captured, (1, 0), strict=True):
        with torch.cuda.device(device):
            replay(training, graph)
    for training in trainings:
        training.check()


def test_a_graph_needs_nothing_that_was_uploaded_before(fake, gpu_backend, monkeypatch):
    """Words are dropped when others were used later, and their memory is used for something else."""
    monkeypatch.setattr(uploads, "_uploads", Recent(1))
    training = Training(fake, gpu_backend)
    side = torch.cuda.Stream()
    training.warm_up(side)
    graph = training.capture(side)
    training.step()
    replay(training, graph)
    training.check()


def test_graphs_one_after_the_other(fake, gpu_backend):
    """With a step in between, as many as one likes; what they keep goes with them."""
    training, side = Training(fake, gpu_backend), torch.cuda.Stream()
    training.warm_up(side)
    for _ in range(6):
        graph = training.capture()
        replay(training, graph)
        torch.cuda.synchronize()
        assert graphs._kept
        del graph
        training.warm_up(side)
        assert not graphs._kept
    training.check()


def test_two_graphs_share_nothing(fake, gpu_backend):
    training = Training(fake, gpu_backend)
    training.warm_up(torch.cuda.Stream())
    first, second = training.capture(), training.capture()
    replay(training, first)
    kept = len(graphs._kept)
    torch.cuda.synchronize()
    first.reset()
    graphs.drop_unused()
    assert len(graphs._kept) == kept // 2
    replay(training, second)
    training.check()


def assert_all_is_kept(training, graph):
    """Also when the graph is gone, and a step has looked for what can go."""
    kept = len(graphs._kept)
    torch.cuda.synchronize()
    graph.reset()
    training.step()
    assert len(graphs._kept) == kept > 0
    training.check()


def test_without_user_objects_everything_is_kept(fake, gpu_backend, monkeypatch):
    monkeypatch.setattr(graphs, "_driver", lambda: None)
    training = Training(fake, gpu_backend)
    training.warm_up(torch.cuda.Stream())
    graph = training.capture()
    assert_all_is_kept(training, graph)


@pytest.mark.parametrize("failing", ["cuStreamGetCaptureInfo_v2", "cuUserObjectCreate", "cuGraphRetainUserObject"])
def test_a_driver_that_fails_keeps_everything(fake, gpu_backend, monkeypatch, failing):
    monkeypatch.setattr(fake.driver, failing, lambda *_: 801)
    training = Training(fake, gpu_backend)
    training.warm_up(torch.cuda.Stream())
    graph = training.capture()
    replay(training, graph)
    assert_all_is_kept(training, graph)


# Pinned memory


def test_who_does_not_capture_has_no_pinned_memory(fake, gpu_backend):
    training = Training(fake, gpu_backend)
    for _ in range(2):
        training.step()
    assert not uploads._spares


def unchanged(training):
    """Whether a step that raises has changed nothing."""
    tensors = [*training.params, *training.emas[0].module.parameters()]
    before = [x.memory.clone() for x in tensors]
    with pytest.raises(RuntimeError, match="no pinned memory ready"):
        training.capture()
    return all(torch.equal(x.memory, y) for x, y in zip(tensors, before, strict=True))


def test_a_capture_that_nothing_prepared_says_what_to_do(fake, gpu_backend):
    training = Training(fake, gpu_backend)
    training.step()
    assert unchanged(training)
    training.optimizer.prepare_capture()
    replay(training, training.capture())
    training.check()


def test_preparing_before_the_first_step(fake, gpu_backend):
    training = Training(fake, gpu_backend)
    training.optimizer.prepare_capture()
    training.step()
    replay(training, training.capture())
    training.check()


def test_preparing_again_needs_no_step(fake, gpu_backend):
    training = Training(fake, gpu_backend)
    training.warm_up(torch.cuda.Stream())
    captured = [training.capture() for _ in range(4)]
    assert unchanged(training)
    training.optimizer.prepare_capture()
    captured.append(training.capture())
    for graph in captured:
        replay(training, graph, times=1)
    training.check()


def test_preparing_in_a_capture(fake, gpu_backend):
    training = Training(fake, gpu_backend)
    with pytest.raises(RuntimeError, match="comes before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        training.optimizer.prepare_capture()


def test_preparing_on_a_cpu_does_nothing(fake):
    trainops.AdamW([nn.Parameter(torch.ones(2))]).prepare_capture()
    assert not uploads._prepared


def test_pinned_memory_is_bounded(fake):
    device = torch.device("cuda", 0)
    uploads.prepare_capture()
    for count in range(1, 100):
        uploads.uploaded(bytes(8 * count), device)
    assert sum(map(len, uploads._spares.values())) == 32 * 4


# Faults of the host side


class Sticky(list):
    """Gives the same buffer again and again."""

    def pop(self):
        return self[-1]


def spares_are_used_twice(monkeypatch):
    prepare = uploads._prepare

    def plant(size):
        prepare(size)
        uploads._spares[size] = Sticky(uploads._spares[size])

    monkeypatch.setattr(uploads, "_prepare", plant)


def nothing_is_kept(monkeypatch):
    monkeypatch.setattr(uploads, "keep", lambda *_: None)


def earlier_uploads_are_used(monkeypatch):
    def plant(words, device, stream):
        return next(x for key, x in uploads._uploads.items() if key[:2] == (words, device))

    monkeypatch.setattr(uploads, "_upload_in_capture", plant)
    monkeypatch.setattr(uploads, "_uploads", Recent(3))


def dropped_too_early(monkeypatch):
    """When the capture ends, not when the graph does."""
    monkeypatch.setattr(uploads, "drop_unused", graphs._kept.clear)


FAULTS = {
    "spares_are_used_twice": (spares_are_used_twice, "the host writes memory that a graph reads"),
    "nothing_is_kept": (nothing_is_kept, "copy reads memory that was freed"),
    "earlier_uploads_are_used": (earlier_uploads_are_used, "reads memory that was freed"),
    "dropped_too_early": (dropped_too_early, "copy reads memory that was freed"),
}


@over("fault", FAULTS)
def test_a_fault_is_noticed(fake, gpu_backend, fault, monkeypatch):
    plant, text = fault
    plant(monkeypatch)
    training = Training(fake, gpu_backend)
    training.warm_up(torch.cuda.Stream())
    captured = [training.capture() for _ in range(2)]
    for p in training.params:
        p.grad = torch.zeros_like(p)  # so that words change
    training.step()
    gc.collect()
    for graph in captured:
        graph.replay()
    torch.cuda.synchronize()
    assert any(text in found for found in fake.faults), fake.faults
    fake.faults.clear()


def wait_for_numbers(monkeypatch):
    monkeypatch.setattr(_device, "_setting", lambda x, device: float(x))


def pin_in_captures(monkeypatch):
    monkeypatch.setattr(uploads, "_upload_in_capture", lambda words, device, stream: pinned(words).to(device))


def pinned(words):
    return torch.frombuffer(bytearray(words), dtype=torch.int64).pin_memory()


def ask_the_current_device(monkeypatch):
    """For captures: no guard makes that of the table the current one."""
    for module in (cuda, triton, _triton):
        if hasattr(module, "device_guard"):
            monkeypatch.setattr(module, "device_guard", lambda device: torch.cuda.device(0))


REFUSED = {"wait": wait_for_numbers, "pin": pin_in_captures, "device": ask_the_current_device}


@over("plant", REFUSED)
def test_a_fault_is_refused(fake, gpu_backend, plant, monkeypatch):
    with torch.cuda.device(1):
        training = Training(fake, gpu_backend, device=1)
        training.optimizer.max_grad_norm = fake.on(torch.tensor(1.0), 1)
        training.warm_up(torch.cuda.Stream())
        plant(monkeypatch)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            training.capture()
    torch.cuda.synchronize()
    fake.faults.clear()
