"""Choose the accelerator that a process computes on."""

import re

import torch

from fedsmooth_core.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the device for ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:K``.

    Raises:
        ConfigError: for another name, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"device={name!r} is unknown: allowed are auto, cpu, cuda and cuda:K.")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={name!r} asks for CUDA, but PyTorch finds no CUDA device here: take device=cpu, "
            "or install a driver and a CUDA build of PyTorch."
        )
    if (
        device.index is not None
        and device.type == "cuda"
        and device.index >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"device={name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices, "
            "counted from 0."
        )
    return device
