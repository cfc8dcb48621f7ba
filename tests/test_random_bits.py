"""The random bits of stochastic rounding: every bit of what they depend on changes half of them."""

import numpy as np
import pytest
import torch
from contract import same_bits

from trainops import reference_rounding as rounding
from trainops.reference_rounding import Random

SAMPLES = 1 << 14
# A share of so many coin tosses is as far from 1/2 as this once in 1e8 times; there are some thousand shares.
FURTHEST = 5.7 * 0.5 / SAMPLES**0.5


def words(generator):
    return torch.randint(0, 1 << 32, (SAMPLES,), generator=generator)


def bits_of(inputs):
    """16 random bits for each sample of seeds (two halves), places, steps and elements."""
    low, high, place, step, element = inputs
    key = rounding.mix(0x9E3779B9 ^ low)
    for word in (high, place, step):
        key = rounding.mix(key ^ word)
    return rounding.random_bits(Random(key, element))


def share_of_flips(before, after):
    flipped = (before ^ after).numpy()
    return np.array([(flipped >> bit & 1).mean() for bit in range(16)])


@pytest.mark.parametrize("which", range(5), ids=["low_seed", "high_seed", "place", "step", "element"])
@pytest.mark.parametrize("small", [False, True], ids=["random", "small"])
def test_every_input_bit_flips_half_of_the_bits(which, small):
    """Of random inputs, and of small ones: the first steps and places, neighbouring elements, the default seed."""
    generator = torch.Generator().manual_seed(which)
    inputs = [words(generator) for _ in range(5)]
    if small:
        inputs = [x % limit for x, limit in zip(inputs, (1, 1, 64, 256, 4096), strict=True)]
    before = bits_of(inputs)
    for bit in range(32):
        after = bits_of([x ^ (1 << bit if i == which else 0) for i, x in enumerate(inputs)])
        if not small or which == 4:  # else there are few different samples
            assert abs(share_of_flips(before, after) - 0.5).max() < FURTHEST, bit
        assert (before == after).double().mean() < 0.001, bit


def test_bits_are_uniform_and_neighbours_do_not_follow_each_other():
    x = torch.zeros(1 << 18, dtype=torch.bfloat16)
    word = rounding.seed_word(0)
    bits, later = (
        rounding.random_bits(rounding.random_of(x, x, word, 0, 0, torch.tensor(step))).double() / 65536
        for step in (1, 2)
    )
    assert abs(bits.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 512
    assert abs(bits.var() - 1 / 12) < 0.001
    for other in (bits.roll(1), bits.roll(2), bits.roll(1024), later):
        correlation = torch.corrcoef(torch.stack([bits, other]))[0, 1]
        assert abs(correlation) < 5 / 512


def test_the_definition():
    """Numbers of another implementation, in Python's integers."""

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * factor % (1 << 32)
        return x ^ x >> 16

    seed, place, step, origin = (1 << 62) + 12345, 7, 1000, (1 << 32) - 2
    word = mix(mix(0x9E3779B9 ^ seed % (1 << 32)) ^ seed >> 32)
    assert rounding.seed_word(seed) == word
    assert rounding.seed_word(seed, 3) == mix(word ^ 3)
    x = torch.zeros(2, 3, dtype=torch.bfloat16).t()
    keys = {None: mix(word ^ place), step: mix(mix(word ^ place) ^ step)}
    for its_step, key in keys.items():
        t = None if its_step is None else torch.tensor(float(its_step))
        expected = [mix(key ^ (origin + i) % (1 << 32)) >> 16 for i in range(6)]
        found = rounding.random_bits(rounding.random_of(x, x, word, place, origin, t))
        assert found.t().flatten().tolist() == expected
    assert rounding.random_of(x, x, word, -1, 0) is None
    assert rounding.random_of(x.float(), x, word, 0, 0) is None


@pytest.mark.parametrize("bits", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_rounding_takes_a_neighbour_and_leaves_what_fits(monkeypatch, bits):
    monkeypatch.setattr(rounding, "random_bits", lambda random: torch.full(random.elements.shape, bits))
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    numbers, random = every[~every.isnan()], Random(torch.tensor(0), torch.arange(1 << 16))

    def rounded(x):
        return rounding.rounded_stochastically(x, random._replace(elements=torch.arange(len(x))))

    assert same_bits(rounded(numbers.float()), numbers)
    assert rounded(every[every.isnan()].float()).isnan().all()
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001]).to(torch.int32).view(torch.float32)
    assert rounded(payloads).view(torch.int16).tolist() == [0x7FC0] * 3
    finite = numbers[numbers.isfinite()]
    for rest in (1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (finite.float().view(torch.int32) + rest).view(torch.float32)
        away = (finite.view(torch.int16) + 1).view(torch.bfloat16)  # by bits: from zero, and the largest to infinity
        assert same_bits(rounded(x), away if rest + bits > 0xFFFF else finite)
