"""Tests with the frameworks, in an environment that has them: ``make test-integrations``."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if __file__.rpartition("/")[0] in str(item.path):
            # Warnings of the frameworks are no faults of ours.
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
            item.add_marker(pytest.mark.filterwarnings("error:::trainops"), append=False)
