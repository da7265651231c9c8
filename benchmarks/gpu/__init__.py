"""Benchmarks of the Triton kernels: on a machine with torch, Triton and numpy alone, and what can be said without a GPU."""
