"""Kernels in Triton, each beside its plain twin. Imported only where they are used: on CUDA, and by tests that interpret them."""
