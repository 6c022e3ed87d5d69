"""AUTOMATIC1111's endpoints, mapped to the native operations so that its clients work unchanged.

docs/automatic1111.md has the mapping. `PAELLERA_SDAPI` switches them on.
"""
