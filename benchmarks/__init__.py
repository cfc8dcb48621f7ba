"""Benchmarks: what a step's tail costs, side by side with the best that PyTorch offers."""
