"""Triton kernels of the cuda target: every file that exposes KERNEL or KERNELS is found by the selector."""
