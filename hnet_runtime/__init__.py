"""What `train.py` and the scripts share: devices and processes, checkpoints, metrics, evaluation."""


class UserError(Exception):
    """A mistake of the person who started the program, told in one sentence; commands exit with status 2 on it."""
