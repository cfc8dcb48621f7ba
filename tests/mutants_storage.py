"""Faults of how weights and moments are stored: see ``mutants.py``."""

from mutants import planted, tests_of

STATE_DTYPE = tests_of("state_dtype", k="cpu-cpu or reference-cpu or loading or refused")

STORAGE = [
    *planted(
        "trainops/storage.py",
        STATE_DTYPE,
        {"state_dtype: the first of a pair for both": ("others if i else first", "first")},
    ),
    *planted(
        "trainops/rows.py",
        STATE_DTYPE,
        {"state_dtype: moments are made in the parameter's dtype": (", dtype=dtypes.get(name))", ")")},
    ),
    *planted(
        "trainops/loading.py",
        STATE_DTYPE,
        {
            "state_dtype: not kept by load_state_dict": (
                'held | self._chosen_dtypes(state["param_groups"])',
                "held",
            ),
        },
    ),
    *planted(
        "trainops/optimizer.py",
        STATE_DTYPE,
        {
            "state_dtype: a refused group stays": (
                "                self.param_groups.pop()\n",
                "                pass\n",
            )
        },
    ),
]
