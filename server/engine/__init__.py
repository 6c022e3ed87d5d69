"""The engine: admission, scheduling, and the worker processes that compute."""
