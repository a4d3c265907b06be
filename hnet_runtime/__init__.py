"""The code that `train.py` and the scripts share.

    data/          text files into documents, shards into batches
    steps/         training steps as CUDA graphs, the optimizer over flat memory, activation checkpointing
    checks/        whether fast steps and generation compute what the model file says
    runs/          flags, folder, checkpoints, metrics, console and watchdog of a run
    evaluation/    validation, scoring of texts, multiple-choice questions, lm-evaluation-harness
    pages/         chunks in a terminal, curves, the explorer, reports, progress bars

Beside them: processes and sharding (`distributed.py`), memory and threads of a CPU, FLOPs, the code that commands
share, the console commands.
"""


class UserError(Exception):
    """A mistake of the user, in one sentence; commands print it and exit with its status."""

    status = 2


class RunFailed(UserError):
    """A run ended because of its own numbers, such as a loss that is not finite: it would end in the same way again."""

    status = 1


class WriteFailed(UserError):
    """A file of a run that has started can't be written, as on a full disk."""

    status = 1


class DataError(Exception):
    """A mistake in the data or the request, in one sentence that names the file, row or flag and what was expected."""
