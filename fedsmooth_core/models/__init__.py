"""Architectures by name, with normalisation inside: images in [0, 1] in, logits out.

Importing this package registers ``alexnet``, ``resnet20``, ``resnet110`` and ``small_cnn``.
"""

from fedsmooth_core.models import alexnet, resnet, small_cnn  # noqa: F401 (they register themselves)
from fedsmooth_core.models.initialisation import initialise
from fedsmooth_core.models.normalisation import Normalise
from fedsmooth_core.models.registry import (
    NORMALISATION,
    Architecture,
    ModelSpec,
    build_model,
    check_buildable,
    register,
)

__all__ = [
    "NORMALISATION",
    "Architecture",
    "ModelSpec",
    "Normalise",
    "build_model",
    "check_buildable",
    "initialise",
    "register",
]
