"""What trainops warns of."""

import sys
import warnings


def said(call):
    """The messages of the warnings that a call gives, all of which point to the file of whoever asks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    asker = sys._getframe(1).f_code.co_filename
    assert all(warning.filename == asker and warning.category is UserWarning for warning in caught)
    return [str(warning.message) for warning in caught]
