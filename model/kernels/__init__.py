"""Faster forms of the networks' operations, each beside its plain equivalent."""
