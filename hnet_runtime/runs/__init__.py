"""A training run: its flags, folder, checkpoints, metrics, console and watchdog."""
