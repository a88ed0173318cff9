"""Models from what was submitted: read without trust, kept on the device while they are in use."""

import threading
from collections import OrderedDict

import safetensors.torch
import torch
from torch import nn

from fedsmooth_core.certification.precision import in_precision
from fedsmooth_core.checkpoint import Checkpoint, load_model, state_sha256
from fedsmooth_core.config import to_nested
from fedsmooth_core.errors import CheckpointError
from fedsmooth_core.models import NORMALISATION, ModelSpec
from server.certification.store import JobStore

_ROOM = 2 * 2**30
"""Bytes of weights that stay on the device when another model is loaded."""

_MOST_HEADER = 2**20
"""Bytes of a safetensors header; ResNet-110's is a twelfth of it."""


def read_model(data: bytes, spec: ModelSpec) -> tuple[str, nn.Module]:
    """Build a model from a safetensors file of which nothing is believed.

    Returns:
        The hash of its state, and the model: on the CPU, in eval mode.

    Raises:
        CheckpointError: if the file is none, its tensors are not exactly those of the architecture,
            or a value is not finite, or a standard deviation of the normalisation is not > 0.
    """
    # A tensor without values costs a line of the header, and a thousand times that once it is loaded.
    if int.from_bytes(data[:8], "little") > _MOST_HEADER:
        raise CheckpointError(
            f"the weights have more than {_MOST_HEADER} bytes of names and shapes, so they are not those "
            f"of {spec.name!r}: send the file as it was written."
        )
    try:
        state = safetensors.torch.load(data)
    # On damaged bytes its reader raises more kinds of errors than it names.
    except Exception as error:
        raise CheckpointError(
            "the weights are no complete safetensors file: send the file as it was written."
        ) from error
    model = load_model(Checkpoint(state, {"model": to_nested(spec)}))
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"the weights {name!r} hold values that are not finite: such a model cannot be "
                "certified (did training diverge?)."
            )
    if bool((state[f"{NORMALISATION}std"] <= 0).any()):
        raise CheckpointError(
            f"the weights '{NORMALISATION}std' are not all > 0, so the images cannot be divided by them: "
            "such a model cannot be certified."
        )
    return state_sha256(state), model


class LoadedModels:
    """The models that were used last, on the device; safe for threads.

    Args:
        store: has the weights.
        device: where the models are kept.
    """

    def __init__(self, store: JobStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[str, ModelSpec, str], nn.Module] = OrderedDict()

    def get(self, weights: str, spec: ModelSpec, precision: str) -> nn.Module:
        """Return a stored model in eval mode, for all who ask: it must stay as it is.

        Args:
            weights: hash of its state.
            spec: its architecture.
            precision: in which it computes, as :class:`Procedure` names it.

        Raises:
            CheckpointError: if the stored weights are not sound.
            UnknownJobError: if there are none of this hash.
        """
        key = (weights, spec, precision)
        with self._lock:
            if key not in self._models:
                self._models[key] = self._load(weights, spec, precision)
            self._models.move_to_end(key)
            while len(self._models) > 1 and sum(map(_num_bytes, self._models.values())) > _ROOM:
                self._models.popitem(last=False)
            return self._models[key]

    def _load(self, weights: str, spec: ModelSpec, precision: str) -> nn.Module:
        found, model = read_model(self._store.weights(weights), spec)
        if found != weights:
            raise CheckpointError(
                f"the stored weights {weights} have changed on the disk: restore the service's "
                "directory from a copy."
            )
        return in_precision(model.to(self._device), precision).eval()


def _num_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
