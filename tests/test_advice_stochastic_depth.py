"""The warning about stochastic depth that drops nothing: it comes once, and ordinary use is left alone."""

import pytest
import torch
from said import said

import trainops
from trainops import advice


@pytest.fixture
def fresh_count(monkeypatch):
    monkeypatch.setattr(advice, "_calls", 0)


def depth(batch=4, rate=0.1, calls=advice.CALLS_WITHOUT_A_DROP, mode="fixed", training=True):
    x = torch.ones(batch, 1)
    for _ in range(calls):
        trainops.stochastic_depth(x, torch.neg, rate, training, mode=mode)


@pytest.mark.usefixtures("fresh_count")
def test_stochastic_depth_that_never_drops_is_named_once():
    (message,) = said(lambda: depth(calls=3 * advice.CALLS_WITHOUT_A_DROP))
    assert "all of 4 at drop_prob=0.1" in message
    assert "mode='bernoulli'" in message
    assert "batches of at least 6" in message
    assert said(lambda: (depth(8, 0.5), depth())) == []


@pytest.mark.usefixtures("fresh_count")
def test_other_modes_and_evaluation_do_not_hide_it():
    def all_modes():
        for _ in range(advice.CALLS_WITHOUT_A_DROP):
            depth(calls=1)
            depth(64, 0.5, 1, mode="bernoulli")
            depth(64, 0.5, 1, training=False)

    assert len(said(all_modes)) == 1


@pytest.mark.usefixtures("fresh_count")
@pytest.mark.parametrize(("rate", "least"), [(0.1, 6), (0.3, 2), (0.125, 5), (0.9, 2)])
def test_the_batch_that_is_named_drops(rate, least):
    (message,) = said(lambda: depth(1, rate))
    assert f"batches of at least {least}" in message
    kept = []
    trainops.stochastic_depth(torch.ones(least, 1), lambda x: kept.append(len(x)) or x, rate, True)
    assert kept[0] < least


@pytest.mark.usefixtures("fresh_count")
@pytest.mark.parametrize(
    "arguments",
    [{"batch": 8}, {"mode": "bernoulli"}, {"training": False}, {"rate": 0.0}, {"rate": 1.0}, {"batch": 0}],
    ids=str,
)
def test_stochastic_depth_in_ordinary_use_is_left_alone(arguments):
    assert said(lambda: depth(**arguments, calls=advice.CALLS_WITHOUT_A_DROP + 1)) == []


@pytest.mark.usefixtures("fresh_count")
def test_small_rates_of_a_network_that_drops_are_left_alone():
    """The rate grows with depth, so that the first blocks drop nothing; and the last batch of an epoch is small."""

    def epoch():
        for _ in range(advice.CALLS_WITHOUT_A_DROP // 2):
            for batch, rate in ((8, 0.03), (8, 0.06), (8, 0.1), (2, 0.03), (2, 0.06), (2, 0.1)):
                depth(batch, rate, 1)

    assert said(epoch) == []
