"""A validated request to a `Plan`: the worker's job, and what is made of its images.

`operations.plan` chooses weights, sampling and size, within the work allowed (`draft`, `sizes`);
decodes images and lays them out (`layout`, `conditions`); and returns a `Plan`.
"""
