import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # tests run in parallel processes; two threads for small tensors mostly wait for each other


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not item.keywords, where the folders of the path are too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
