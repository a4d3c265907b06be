"""What `train.py` and the scripts share, by room.

    data/          text files into documents, shards into batches
    steps/         training steps as CUDA graphs, the optimizer over flat memory, activation checkpointing
    checks/        whether what runs is what the model file says; training against generation
    runs/          a run's flags, folder, checkpoints, metrics, console, and what watches over it
    evaluation/    validation, scoring of texts, multiple-choice questions, lm-evaluation-harness
    pages/         chunks in a terminal, curves, the explorer, reports, progress bars

Beside them: processes and sharding (`distributed.py`), FLOPs, what commands share, the console commands.
"""


class UserError(Exception):
    """A mistake of the person who started the program, told in one sentence; commands exit with status 2 on it."""


class DataError(Exception):
    """A mistake in the data or the request, in one sentence that names the file, row or flag and what was expected."""
