"""Training steps that are fast: as CUDA graphs, with an optimizer over flat memory."""
