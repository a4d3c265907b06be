"""Is what runs what the model file says? Checks before a run, and training against generation."""
