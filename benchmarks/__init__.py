"""Benchmarks: trainops beside every other way to do the same, verified before it is timed.

`python -m benchmarks --help` says how to run them, `bench_<op>.py` what is compared, `runner.py` how it is timed.
"""

import os

# PyTorch's profiler, which counts memory and launches, is chatty; it reads these when torch is loaded.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TEARDOWN_CUPTI", "1")  # else it slows down every launch after it

# What large fresh results cost depends on the pages that they get more than on anything else: all providers get huge
# ones on the CPU, where the system has them for those who ask. PyTorch by itself does not ask; trainops does.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
