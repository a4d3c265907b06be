"""What `train.py` and the scripts share: devices and processes, checkpoints, metrics, evaluation."""


class UserError(Exception):
    """A mistake of the person who started the program, told in one sentence; commands exit with status 2 on it."""


class DataError(Exception):
    """A mistake in the data or the request, in one sentence that names the file, row or flag and what was expected."""
