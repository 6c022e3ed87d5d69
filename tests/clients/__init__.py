"""Clients that people already have, against a running server: `make client-test`."""
