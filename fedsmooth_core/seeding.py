"""Random streams that depend on what they are for, never on who else draws or in which order.

Every stream is named by (run seed, purpose, indices): the noise of client 7 in round 3 is the same
whether that client runs alone, in a cohort of 100, in another process, or after a restart.
"""

import hashlib
from enum import StrEnum

import numpy as np
import torch


class Purpose(StrEnum):
    """What a stream is for. Two purposes never share draws, whatever their indices."""

    MODEL_INIT = "model-init"
    PARTITION = "partition"
    HELD_OUT = "held-out"
    COHORT = "cohort"
    CERTIFIED_COHORT = "certified-cohort"
    LOCAL_TRAINING = "local-training"
    EVALUATION = "evaluation"
    SELECTION = "certify-selection"
    ESTIMATION = "certify-estimation"
    PREDICTION = "predict"
    ON_DEVICE = "certify-on-device"
    EMPIRICAL_ATTACK = "empirical-attack"


def derive_seed(run_seed: int, purpose: Purpose, *indices: int) -> int:
    """Hash (run seed, purpose, indices) to a seed in [0, 2^63).

    PyTorch's CPU generator keeps the low 32 bits alone, so two CPU streams coincide with
    probability 2^-32; its CUDA generator uses all of them.
    """
    name = "/".join([str(run_seed), purpose.value, *map(str, indices)])
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(
    run_seed: int, purpose: Purpose, *indices: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator on ``device`` for one stream (its draws differ between device types)."""
    return torch.Generator(device=device).manual_seed(derive_seed(run_seed, purpose, *indices))


def numpy_generator(run_seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """Return a NumPy generator for one stream."""
    return np.random.default_rng(derive_seed(run_seed, purpose, *indices))
