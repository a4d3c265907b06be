"""Checks that fast steps and generation compute what the model file says."""
