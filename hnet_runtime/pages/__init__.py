"""What a person looks at: chunks in a terminal, curves, the explorer, reports, progress bars."""
