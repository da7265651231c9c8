"""The kernels for NVIDIA GPUs, in Triton: the bytes and the arithmetic of the reference, and of the CPU's kernels."""
