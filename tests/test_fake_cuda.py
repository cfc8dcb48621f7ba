"""The fake devices do what PyTorch does, and notice what a GPU would not tell."""

import gc

import pytest
import torch
from fake_cuda import FakeCuda
from targets import over


@pytest.fixture
def fake(monkeypatch):
    with FakeCuda().active(monkeypatch) as devices:
        yield devices


def pinned(*numbers):
    buffer = torch.empty(len(numbers), dtype=torch.int64, pin_memory=True)
    return buffer.copy_(torch.tensor(numbers))


def captured(function):
    """A graph of a function's operations."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def test_operations_and_copies(fake):
    x = torch.tensor([1.0, 2.0], device="cuda:1")
    assert x.device == torch.device("cuda", 1)
    y = torch.zeros(2, device="cuda:1").add_(x).mul(3)
    assert y.to("cpu").tolist() == [3.0, 6.0]
    assert y.to("cuda:0", torch.float64).memory.dtype == torch.float64
    assert y.sum().item() == 9.0
    assert fake.synchronizations == ["a new tensor's content", "a copy", "item()"]
    assert fake.faults == []


def test_what_needs_no_wait(fake):
    source = pinned(1, 2)
    x = source.to("cuda", non_blocking=True)
    back = x.to("cpu", non_blocking=True)
    other = x.to("cuda:1")
    assert fake.synchronizations == []
    torch.cuda.current_stream("cuda:0").synchronize()
    assert back.tolist() == other.memory.tolist() == [1, 2]
    assert fake.faults == []


def test_a_replay_does_what_was_captured_anew(fake):
    x = fake.on(torch.tensor([1.0, 2.0]))
    results = []
    graph = captured(lambda: results.append((x + 1).mul_(2)))
    for value in (5.0, 7.0):
        x.fill_(value)
        graph.replay()
        assert results[0].to("cpu").tolist() == [2 * (value + 1)] * 2
    assert x.to("cpu").tolist() == [7.0, 7.0]
    assert fake.faults == []


def test_streams_in_order(fake):
    x, side = fake.on(torch.zeros(2)), torch.cuda.Stream()
    x.add_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
        event = side.record_event()
    event.wait()
    x.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        assert x.to("cpu").tolist() == [3.0, 3.0]
    assert fake.faults == []


def unordered_streams(fake):
    x = torch.zeros(2, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        x.add_(1)


def unordered_readers(fake):
    x = torch.zeros(2, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1
    x.add_(1)


def unordered_threads(fake):
    x = torch.zeros(2, device="cuda")

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            x + 1

    fake.in_thread(work).join()


def early_read_of_the_host(fake):
    torch.zeros(2, device="cuda").to("cpu", non_blocking=True).tolist()


def pinned_memory_is_written_too_early(fake):
    buffer = pinned(1)
    buffer.to("cuda", non_blocking=True)
    buffer.fill_(2)


def pinned_memory_of_a_graph_is_written(fake):
    buffer = pinned(1)
    graph = captured(lambda: buffer.to("cuda", non_blocking=True))
    graph.replay()
    torch.cuda.synchronize()
    buffer.fill_(2)


def pinned_memory_of_a_graph_is_freed(fake):
    buffers = [pinned(1)]
    graph = captured(lambda: buffers.pop().to("cuda", non_blocking=True))
    gc.collect()
    graph.replay()


def memory_of_a_graph_is_freed(fake):
    tensors = [fake.on(torch.zeros(2))]
    graph = captured(lambda: tensors.pop().add_(1))
    gc.collect()
    graph.replay()


def memory_from_outside_of_the_pool(fake):
    """Of a device that does not capture: it is freed, whatever the graph does with it."""
    target = fake.on(torch.zeros(2))

    def work():
        with torch.cuda.stream(torch.cuda.default_stream()):
            outside = torch.empty(2, device="cuda")
        target.add_(outside)

    captured(work).replay()


def memory_is_freed_too_early(fake):
    x, side = torch.zeros(2, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1
    del x


FAULTS = {
    "another stream may be using": [unordered_streams, unordered_readers, unordered_threads],
    "the host reads memory that another stream may be using": [early_read_of_the_host],
    "the host writes memory that another stream may be using": [pinned_memory_is_written_too_early],
    "the host writes memory that a graph reads": [pinned_memory_of_a_graph_is_written],
    "copy reads memory that was freed": [pinned_memory_of_a_graph_is_freed],
    "memory that was freed": [memory_of_a_graph_is_freed, memory_from_outside_of_the_pool],
    "memory is freed while another stream may use it": [memory_is_freed_too_early],
}


@over("case", {function.__name__: (text, function) for text, its in FAULTS.items() for function in its})
def test_a_fault_is_noticed(fake, case):
    text, function = case
    function(fake)
    assert any(text in fault for fault in fake.faults), fake.faults


REFUSED = {
    "pinned_memory": lambda x: torch.empty(2, pin_memory=True),
    "pin_memory": lambda x: torch.zeros(2).pin_memory(),
    "item": lambda x: x.sum().item(),
    "a_new_tensor": lambda x: torch.tensor(1.0, device="cuda"),
    "a_copy": lambda x: x.to("cpu"),
    "pageable_memory": lambda x: torch.zeros(2).to("cuda", non_blocking=True),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "an_event": lambda x: torch.cuda.Event().query(),
    "an_event_of_before": lambda x: torch.cuda.current_stream().wait_event(
        torch.cuda.default_stream().record_event()
    ),
}


@over("function", REFUSED)
def test_a_capture_refuses(fake, function):
    x = fake.on(torch.zeros(2))
    with pytest.raises(RuntimeError, match="CUDA: "):
        captured(lambda: function(x))
    assert torch.cuda.is_current_stream_capturing() is False
