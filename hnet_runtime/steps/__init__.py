"""Training steps: as CUDA graphs with an optimizer over flat memory, or plain with autograd."""
