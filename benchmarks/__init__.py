"""Benchmarks: trainops beside every other way to do the same, verified before it is timed.

`python -m benchmarks --help` says how to run them, `bench_<op>.py` what is compared, `runner.py` how it is timed.
"""

import os

# PyTorch's profiler, which counts memory and launches, is chatty; it reads these when torch is loaded.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
