"""A validated request to a `Plan`: decoded and laid out images, the worker's job, postprocessing."""
