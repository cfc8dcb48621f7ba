"""How words get to a device."""

from array import array
from types import SimpleNamespace

import pytest
import torch

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


@pytest.fixture
def gpu(monkeypatch):
    """The calls that ``uploaded`` makes of CUDA, without it: streams, capture, and pinned memory, which is recorded.

    The device is "meta", whose tensors have no content; what was copied is found in the pinned memory.
    """
    fake = SimpleNamespace(device=torch.device("meta"), stream=1, capturing=False, pinned=[])

    def pin_memory(x):
        fake.pinned.append(x)
        return x

    def pinned(count):
        assert not fake.capturing  # no pinned memory may be allocated then
        return torch.zeros(count, dtype=torch.int64)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=fake.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(uploads, "_pinned", pinned)
    monkeypatch.setattr(uploads, "_uploads", Recent(2))
    monkeypatch.setattr(uploads, "_spares", {})
    monkeypatch.setattr(uploads, "_captured", [])
    fake.upload = lambda *numbers: uploaded(words_of(*numbers), fake.device)
    return fake


def test_uploads_are_reused_by_content(gpu):
    first = gpu.upload(1, 2)
    assert first.device == gpu.device
    assert gpu.upload(1, 2) is first
    assert gpu.upload(1, 3) is not first
    assert gpu.upload(1, 2) is first
    assert [x.tolist() for x in gpu.pinned] == [[1, 2], [1, 3]]


def test_uploads_that_are_not_recent_are_made_again(gpu):
    first = gpu.upload(1)
    gpu.upload(2)
    gpu.upload(3)
    assert gpu.upload(1) is not first
    assert len(gpu.pinned) == 4
    assert len(uploads._spares[8]) == 4
    gpu.upload(4)
    assert len(uploads._spares[8]) == 4


def test_another_stream_has_uploads_of_its_own(gpu):
    first = gpu.upload(1)
    gpu.stream = 2
    second = gpu.upload(1)
    assert second is not first
    assert gpu.upload(1) is second
    gpu.stream = 1
    assert gpu.upload(1) is first


def test_capture_takes_what_is_there_and_keeps_it(gpu):
    first = gpu.upload(1)
    gpu.capturing = True
    assert gpu.upload(1) is first
    assert uploads._captured[0] is first
    gpu.capturing = False
    gpu.upload(2)
    gpu.upload(3)
    assert uploads._captured[0] is first  # which a replay may still read


def test_capture_copies_from_a_spare_and_remembers_nothing(gpu):
    gpu.upload(1)
    gpu.upload(2)
    gpu.capturing = True
    first = gpu.upload(7)
    (spare,) = uploads._captured
    assert spare.tolist() == [7]
    assert len(uploads._spares[8]) == 3
    second = gpu.upload(7)  # the first is filled by that graph alone
    assert second is not first
    assert uploads._captured[1] is not spare
    gpu.capturing = False
    assert gpu.upload(7) is not second
    assert spare.tolist() == [7]
    assert gpu.pinned[-1].tolist() == [7]


def test_capture_without_a_spare_raises(gpu):
    gpu.upload(1)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="take a step on tensors of these sizes outside of a CUDA graph"):
        gpu.upload(1, 2)


def test_many_captures_one_after_the_other(gpu):
    for i in range(10):
        gpu.upload(1)
        gpu.capturing = True
        assert gpu.upload(100 + i) is not gpu.upload(200 + i)
        gpu.capturing = False
    assert [x.tolist() for x in uploads._captured] == [[100 * k + i] for i in range(10) for k in (1, 2)]
    gpu.capturing = True
    for i in range(2):
        gpu.upload(i + 3)
    with pytest.raises(RuntimeError, match="at most 4 steps"):
        gpu.upload(5)


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
