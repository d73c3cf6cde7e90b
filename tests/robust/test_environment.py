"""The hardware and software description of a measurement."""

from pathlib import Path

import pytest
import torch

from robust.environment import device_in_words, unused_gpu, versions

CPU = torch.device("cpu")


def test_the_cpu_is_named_with_its_threads() -> None:
    threads = torch.get_num_threads()
    assert device_in_words(CPU) == device_in_words(CPU, threads)
    assert device_in_words(CPU, 1) == "cpu (1 thread)"
    assert device_in_words(CPU, 12) == "cpu (12 threads)"


@pytest.mark.gpu
def test_a_gpu_has_its_own_name() -> None:
    assert device_in_words(torch.device("cuda")) == torch.cuda.get_device_name()


def test_gpu_is_reported_unused_if_the_cpu_is_used(tmp_path: Path) -> None:
    control = tmp_path / "nvidiactl"
    assert not unused_gpu(CPU, control)
    control.touch()
    assert unused_gpu(CPU, control)
    assert not unused_gpu(torch.device("cuda"), control)


def test_versions_match_the_installed_packages() -> None:
    assert versions()["torch"] == torch.__version__
