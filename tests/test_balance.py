"""The simulation of how evenly chunks keep a GPU busy, and what it says of the chunks that the kernels have."""

import math

import pytest
from targets import thorough

from benchmarks.models import MODELS, numel
from benchmarks.simulate_balance import (
    CARDS,
    CHUNK_NUMEL,
    FIXED,
    KERNELS,
    LEAST,
    Card,
    Chunking,
    Kernel,
    balance,
    chunk_sizes,
    queue,
    static_wave,
)
from trainops.adapters import cuda

LARGE = ("GPT-2 XL", "TinyLlama 1.1B", "ViT-L")


def test_chunks_are_those_of_the_kernels():
    if cuda._cuda is None:
        pytest.skip("the cuda backend was not built")
    assert cuda._cuda.CHUNK_NUMEL == CHUNK_NUMEL


def test_sizes_of_chunks():
    assert chunk_sizes([(3, 3), (8,), ()], Chunking(4)) == [4, 4, 1, 4, 4, 1]


def test_growing_chunks():
    """Powers of 2 that are no more than a share of the tensor."""
    assert chunk_sizes([(7,), (8,), (17,), (0,)], Chunking(2, share=2)) == [2, 2, 2, 1, 4, 4, 8, 8, 1, 0]
    growing = Chunking(share=64)
    assert [growing.of(2**i) for i in (0, 18, 19, 22, 40)] == [4096, 4096, 8192, 65536, 65536]
    assert growing.of(2**19 - 1) == 4096


def test_static_wave():
    assert static_wave([1, 2, 3, 4], 2, 2) == 6
    assert static_wave([1, 2, 3, 4], 2, 1) == 10  # the second block begins when the first one has ended
    assert static_wave([5], 4, 4) == 5


def test_a_queue():
    assert queue([1, 1, 4], 2) == 5
    assert queue([5], 4) == 5
    assert queue([1, 1, 1, 1, 1, 1, 4], 3) == 6
    # A block draws its next chunk when it begins with one, and keeps it: here the first block has both long ones.
    assert queue([4, 1, 4, 1, 1], 2) == 8


def test_a_held_multiprocessor_doubles_the_time_of_a_static_wave_alone():
    card, kernel = Card("", 10, 1.0), Kernel("", 4, 1)
    shapes = 1000 * [(CHUNK_NUMEL,)]
    assert balance(shapes, kernel, card).static == pytest.approx(1.0)
    assert balance(shapes, kernel, card).efficiency == pytest.approx(1 / (1 + FIXED / (CHUNK_NUMEL * 4 * 10 / 1e3)))
    held = balance(shapes, kernel, card, held=1)
    assert held.static == pytest.approx(1000 / 9 / 200)
    assert held.queued == pytest.approx(1000 / 9 / math.ceil(1000 / 9))


@thorough(lambda model, **_: model in LARGE)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_keeps_every_card_busy(model, kernel):
    """One multiprocessor less is the ruin of a static wave, where blocks have several chunks."""
    for card in CARDS:
        for held in (0, 1):
            found = balance(MODELS[model], kernel, card, held)
            assert LEAST <= found.queued <= 1.0
            assert found.queued > found.static - 0.01
            if held and numel(MODELS[model]) > 10_000_000:
                assert found.static < 0.6


def test_larger_chunks_are_too_few_for_a_small_model():
    _, norm = KERNELS
    assert min(balance(MODELS["ViT-Ti"], norm, card, chunking=Chunking(8192)).queued for card in CARDS) < LEAST


@pytest.mark.parametrize("model", ["ViT-Ti", "ViT-S", "ViT-B"])
def test_what_growing_chunks_would_bring(model):
    _, norm = KERNELS
    for card in CARDS:
        now, then = (balance(MODELS[model], norm, card, 1, Chunking(share=share)) for share in (None, 64))
        assert then.queued >= LEAST
        assert then.draws <= now.draws
        assert then.efficiency >= now.efficiency
    assert (then.draws < now.draws / 5) is (model == "ViT-B")
