"""Text from a model: the engine that runs it a step at a time, sampling, and `generate`."""
