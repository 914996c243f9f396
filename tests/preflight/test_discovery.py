"""Resources of this machine."""

import os

from rayrl.preflight import find_cluster


def test_resources_of_this_machine(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    (here,) = find_cluster().nodes
    assert (here["CPU"], here["GPU"]) == (float(os.cpu_count() or 1), 2.0)
    assert 2**28 < here["memory"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_cluster().has("GPU") == 0.0
