"""Measure a running Paellera, break it, and compare it with others."""
