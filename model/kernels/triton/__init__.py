"""Kernels in Triton, each beside its plain twin.

They are imported only where they are used: on CUDA, and by tests that interpret them.
"""
