"""Networks compiled ahead of time for this machine's CPU, beside the same networks in PyTorch.

`programs` says what is compiled, `build` compiles it, and `use` lets a pipeline compute by it.
"""
