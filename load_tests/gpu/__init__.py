"""Check and measure everything that needs a CUDA device: `python -m load_tests.gpu`."""
