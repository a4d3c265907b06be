"""Output for people: chunks in a terminal, curves, the explorer, reports, progress bars."""
