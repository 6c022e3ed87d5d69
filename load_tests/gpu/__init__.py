"""Everything that a CUDA device has to show, in one program: `python -m load_tests.gpu`."""
