"""Which process this is, and which GPU is its own, as launchers tell in the environment."""

from __future__ import annotations

import pytest
import torch

from e5v_st.processes import local_rank, own_device, rank, world_size


@pytest.fixture
def launched(monkeypatch):
    """Sets what a launcher sets, on a machine with some GPUs."""

    def launch(number, processes, gpus):
        for name, value in (("RANK", 10 + number), ("LOCAL_RANK", number), ("WORLD_SIZE", processes)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return launch


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), local_rank(), world_size()) == (0, 0, 1)
    assert [own_device(device) for device in (None, "cuda", "cpu")] == [None, "cuda", "cpu"]


def test_a_launcher_says_which_process_this_is(launched):
    launched(3, 20, 0)
    assert (rank(), local_rank(), world_size()) == (13, 3, 20)


@pytest.mark.parametrize(("number", "gpus", "found"), [(0, 2, 0), (1, 2, 1), (2, 2, 0), (4, 2, 0), (3, 8, 3)])
def test_more_processes_than_gpus_share_them(launched, number, gpus, found):
    launched(number, 5, gpus)
    assert own_device(None) == own_device("cuda") == f"cuda:{found}"


def test_a_device_that_the_user_chose_stays(launched):
    launched(3, 5, 2)
    assert [own_device(device) for device in ("cpu", "cuda:0", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]


def test_without_gpus_nothing_is_chosen(launched):
    launched(3, 5, 0)
    assert own_device(None) is None
