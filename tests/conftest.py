"""No test waits for a network, and several test processes share the cores; long files begin first."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# before torch is imported, and for the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TESTS = Path(__file__).parent
LONG = [TESTS / name for name in ("train/training", "hub", "house")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(item.path.is_relative_to(folder) for folder in LONG))


def pytest_collection_finish():
    # each training run collects garbage, and would go through all that was imported
    gc.collect()
    gc.freeze()
