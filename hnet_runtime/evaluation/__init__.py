"""How good a model is: bits per byte, multiple-choice questions, lm-evaluation-harness."""
