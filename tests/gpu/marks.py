"""What the tests of this folder need. Nobody has run them yet: no machine of ours has a GPU."""

import pytest
import torch


def needs_gpus(num):
    """Marks for a module: skip it, with a reason, where there are fewer CUDA devices."""
    there = torch.cuda.device_count()
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(there < num, reason=f"needs {num} CUDA device(s), and {there} are here"),
    ]
