"""The networks of both published families, under their published parameter names."""
