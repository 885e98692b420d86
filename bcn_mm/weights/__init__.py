"""Other people's weights: single norms, and whole checkpoints."""

# Nothing is imported here: the layers read single norms, and so import
# .layouts, which imports no layers; the other modules do.
