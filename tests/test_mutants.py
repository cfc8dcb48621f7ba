"""The list of mutants fits the source, and the table of what noticed them is whole. `make mutants` makes it."""

from pathlib import Path

import pytest
from mutate import MUTANTS, UNNOTICED, rows

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert all((ROOT / name).is_file() for name in mutant.tests if name.startswith("tests/"))


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_mutant_was_noticed():
    outcomes = rows()
    assert outcomes.keys() >= {mutant.name for mutant in MUTANTS}
    assert not [name for name, outcome in outcomes.items() if UNNOTICED in outcome]
