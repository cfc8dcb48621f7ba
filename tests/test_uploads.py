"""How words get to a device."""

from array import array

import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda.backends import forget_uploads

from trainops import uploads
from trainops.uploads import Recent, known, uploaded

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16"))


def test_words_that_were_seen_last_are_one_object():
    first, other = (array("q", words).tobytes() for words in ([1, 2], [1, 3]))
    assert known(first) is first
    assert known(bytes(bytearray(first))) is first
    assert known(array("q", [1]).tobytes()) == array("q", [1]).tobytes()  # another size
    assert known(bytes(bytearray(first))) is first
    assert known(other) is other
    assert known(bytes(bytearray(other))) is other


def test_what_is_recent():
    recent = Recent(2)
    assert recent.recall("a") is None
    assert recent.remember("a", 1) == 1
    recent.remember("b", 2)
    assert recent.recall("a") == 1
    recent.remember("c", 3)  # "b" was used longest ago
    assert [recent.recall(key) for key in "abc"] == [1, None, 3]
    recent.remember("a", 4)
    assert recent.recall("a") == 4
    assert len(recent) == 2


def test_uploads_to_the_cpu_are_copies():
    words = torch.tensor([1, -2, 2**62]).numpy().tobytes()
    first, second = (uploaded(words, torch.device("cpu")) for _ in range(2))
    assert first.tolist() == [1, -2, 2**62]
    first.zero_()
    assert second.tolist() == [1, -2, 2**62]


def words_of(*numbers):
    return torch.tensor(numbers).numpy().tobytes()


class Device:
    """A fake device."""

    def __init__(self, fake):
        self.fake, self.device = fake, torch.device("cuda", 0)

    def upload(self, *numbers):
        return uploaded(words_of(*numbers), self.device)

    def pinned(self):
        """How often pinned memory was allocated."""
        return sum(block.device.type == "cpu" for block in self.fake.blocks)

    def capture(self, *every):
        """A graph of uploads, and what they give."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, [self.upload(*numbers) for numbers in every]


@pytest.fixture
def gpu(monkeypatch):
    with FakeCuda().active(monkeypatch) as fake:
        forget_uploads(fake, monkeypatch)
        monkeypatch.setattr(uploads, "_uploads", Recent(2))
        yield Device(fake)
        assert fake.faults == []


def test_uploads_are_reused_by_content(gpu):
    first = gpu.upload(1, 2)
    assert first.device == gpu.device
    assert gpu.upload(1, 2) is first
    assert gpu.upload(1, 3) is not first
    assert gpu.upload(1, 2) is first
    assert gpu.fake.synchronizations == []
    assert gpu.pinned() == 2
    assert first.to("cpu").tolist() == [1, 2]


def test_uploads_that_are_not_recent_are_made_again(gpu):
    first = gpu.upload(1)
    gpu.upload(2)
    gpu.upload(3)
    assert gpu.upload(1) is not first
    assert gpu.pinned() == 4


def test_another_stream_has_uploads_of_its_own(gpu):
    first, side = gpu.upload(1), torch.cuda.Stream()
    with torch.cuda.stream(side):
        second = gpu.upload(1)
        assert second is not first
        assert gpu.upload(1) is second
    assert gpu.upload(1) is first


def test_spares_are_made_on_other_streams(gpu):
    gpu.upload(1)
    assert not uploads._spares
    with torch.cuda.stream(torch.cuda.Stream()):
        gpu.upload(1)
        assert [len(x) for x in uploads._spares.values()] == [4]
        gpu.upload(1)
        gpu.upload(2)
    assert gpu.pinned() == 3 + 4


def test_a_capture_copies_from_a_spare_and_remembers_nothing(gpu):
    uploads.prepare_capture()
    before = gpu.upload(7)
    graph, (first, second) = gpu.capture([7], [7])
    assert len({id(x) for x in (before, first, second)}) == 3
    assert len(uploads._spares[8]) == 2
    assert gpu.upload(7) is before
    graph.replay()
    assert [first.to("cpu").tolist(), second.to("cpu").tolist()] == [[7], [7]]


def test_a_capture_without_a_spare_raises(gpu):
    gpu.upload(1, 2)
    uploads.prepare_capture()
    with pytest.raises(RuntimeError, match="take a step on tensors of these sizes outside of a CUDA graph"):
        gpu.capture([1])


def test_many_captures_one_after_the_other(gpu):
    uploads.prepare_capture()
    captured = []
    for i in range(10):
        gpu.upload(1)
        captured.append(gpu.capture([100 + i], [200 + i]))
    for i, (graph, tensors) in enumerate(captured):
        graph.replay()
        assert [x.to("cpu").tolist() for x in tensors] == [[100 + i], [200 + i]]
    gpu.capture([3], [4])
    with pytest.raises(RuntimeError, match="at most 4 steps"):
        gpu.capture([5])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_uploads_to_a_gpu_arrive():
    device = torch.device("cuda", torch.cuda.current_device())
    first = uploaded(words_of(1, -2, 2**62), device)
    assert first.tolist() == [1, -2, 2**62]
    assert uploaded(words_of(1, -2, 2**62), device) is first
    with torch.cuda.stream(torch.cuda.Stream()):
        second = uploaded(words_of(1, -2, 2**62), device)
        assert second.tolist() == [1, -2, 2**62]
    assert second is not first
