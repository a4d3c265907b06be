import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # tests run in parallel processes; two threads for small tensors mostly wait for each other

if os.environ.get("HNET_GPU") and torch.cuda.is_available():
    from hnet_kernels import cards

    cards.start(torch.device("cuda", 0))  # the memory of the card that this GPU imitates

# nohup and a shell's background jobs ignore these signals, and so would every program that a test starts and signals.
# A handler that does nothing protects this process as well, and programs start with the default instead.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not item.keywords, where the folders of the path are too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """Says why a whole file was skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    files = {report.nodeid: report.longrepr[2] for report in skipped if "::" not in report.nodeid}
    for file, reason in sorted(files.items()):
        terminalreporter.write_line(f"{file}: {reason.removeprefix('Skipped: ')}")
