"""Marks for tests that need CUDA devices. Those of this folder have not been run on a GPU yet."""

import pytest
import torch


def needs_gpus(num):
    """Mark a module, so that it is skipped, with a reason, where there are fewer CUDA devices."""
    num_devices = torch.cuda.device_count()
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(num_devices < num, reason=f"needs {num} CUDA device(s), and {num_devices} are here"),
    ]
