"""Share what several test modules need. No test module imports another."""
