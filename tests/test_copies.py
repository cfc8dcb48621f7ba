"""Copies of many tensors: bits, whatever they mean, in few operations."""

import pytest
import torch

from trainops.copies import copy_all, fetch

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16]
DTYPES += [torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn]
SKIPS = {"none": None, "false": False, "true": True}


def random_bits(dtype, shape):
    if dtype == torch.bool:
        return torch.randint(2, shape).bool()
    size = dtype.itemsize * int(torch.tensor(shape).prod())
    return torch.randint(256, (size,), dtype=torch.uint8).view(dtype).view(shape)


def pairs():
    targets, sources = ([random_bits(dtype, (3, 5)) for dtype in DTYPES for _ in range(2)] for _ in range(2))
    targets.append(torch.zeros(4, 6)[:, ::2])
    sources.append(torch.randn(4, 3).double())
    return targets, sources


def bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_every_bit(fake, where, skip):
    """Elements that have NaN's bits, too. The host reads a `skip` of its own, but not that of a device."""
    targets, sources = pairs()
    before = [x.clone() for x in targets]
    skip = None if SKIPS[skip] is None else torch.tensor(SKIPS[skip])
    if where == "device":
        moved = [[fake.on(x) for x in column] for column in (targets, sources)]
        copy_all(*moved, skip=None if skip is None else fake.on(skip))
        assert fake.synchronizations == []
        targets = [x.memory for x in moved[0]]
    else:
        copy_all(targets, sources, skip)
    for target, source, old in zip(targets, sources, before, strict=True):
        expected = old if skip is not None and skip else source.to(target.dtype)
        assert torch.equal(bits(target), bits(expected)), target.dtype


def test_what_is_no_plain_tensor():
    class Other(torch.Tensor):
        pass

    targets, sources = [torch.zeros(2).as_subclass(Other)], [torch.ones(2)]
    copy_all(targets, sources, torch.tensor(True))
    assert targets[0].tolist() == [0.0, 0.0]
    copy_all(targets, sources, torch.tensor(False))
    assert targets[0].tolist() == [1.0, 1.0]


def test_versions_tell_of_copies():
    target = torch.zeros(2, dtype=torch.int64)
    copy_all([target], [torch.ones(2, dtype=torch.int64)])
    assert target._version > 0


def test_fetching_waits_once(fake):
    tensors = [fake.on(torch.full((2,), float(i))) for i in range(3)]
    fetched = fetch([*tensors, torch.ones(1)], [torch.device("cpu")] * 4)
    assert fake.synchronizations == ["a stream"]
    assert [x.tolist() for x in fetched] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [1.0]]
    assert fetch(tensors, [x.device for x in tensors])[0] is tensors[0]


@pytest.mark.parametrize(("skip", "most"), [(None, 1), (True, 5)])
def test_the_number_of_operations_is_that_of_one_tensor(fake, skip, most):
    targets, sources = ([fake.on(random_bits(torch.int64, ())) for _ in range(50)] for _ in range(2))
    copy_all(targets, sources, None if skip is None else fake.on(torch.tensor(skip)))
    assert 0 < len(fake.operations) <= most
