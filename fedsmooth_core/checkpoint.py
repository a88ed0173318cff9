"""Checkpoints: weights as safetensors, and beside them a JSON sidecar that says what they are.

A checkpoint exists if and only if its sidecar does: the weights are on the disk before the sidecar
takes its name, so a process that dies at any moment leaves whole checkpoints alone. Nothing is ever
pickled, so a checkpoint from a stranger can be damaged but cannot run code.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fedsmooth_core.config import from_nested
from fedsmooth_core.durable import sync_folder, write_atomically
from fedsmooth_core.errors import CheckpointError, ConfigError
from fedsmooth_core.models import ModelSpec, build_model

_SUFFIX = ".safetensors"
_ROUND_NAME = re.compile(r"round-(\d+)\.json")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, its weights verified against the hash in its sidecar."""

    state: dict[str, Tensor]
    """The state dict, on the CPU."""
    metadata: dict[str, Any]
    """What :func:`save_checkpoint` was given, as JSON brings it back (tuples are lists)."""


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the hash of names, dtypes, shapes and bytes, as 64 hexadecimal digits.

    It does not depend on the order of the names, on devices, strides or the layout of a file.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        # One line of JSON and a known number of bytes: two different states never run together.
        header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(header.encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write ``path`` (weights) and its sidecar (metadata, hash), atomically and durably.

    Give each round a path of its own: while a checkpoint is replaced, neither old nor new exists.

    Args:
        path: ends in ``.safetensors``, e.g. ``.../round-0012.safetensors``; the folder is made.
        state: a state dict of named tensors, on any device.
        metadata: what JSON can hold. :func:`load_model` needs its ``model``: the ``ModelSpec`` as a
            nested dict.

    Raises:
        CheckpointError: for another suffix, or if the disk refuses.
        TypeError: if JSON cannot hold the metadata; nothing is written then.
    """
    _require_suffix(path)
    # A clone apiece: safetensors stores neither views that share memory nor unusual strides.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    sidecar = {"sha256": state_sha256(tensors), "metadata": dict(metadata)}
    text = json.dumps(sidecar, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An old sidecar must not vouch for new weights if this process dies between the two.
        path.with_suffix(".json").unlink(missing_ok=True)
        sync_folder(path.parent)
        write_atomically(path, safetensors.torch.save(tensors))
        write_atomically(path.with_suffix(".json"), text.encode())
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be written ({error.strerror}): make room or choose a "
            "folder that can be written."
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify its weights.

    Args:
        path: of the weights, ``.../round-0012.safetensors``.

    Raises:
        CheckpointError: if the weights or the sidecar are missing or damaged, or do not belong
            together.
    """
    _require_suffix(path)
    remedy = "delete it to use an earlier checkpoint, or restore it from a copy"
    try:
        data = path.read_bytes()
        text = path.with_suffix(".json").read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no checkpoint {path}, for {error.filename} is missing: give the path of a "
            ".safetensors file with its .json beside it."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({error.strerror}): check the path and its "
            "permissions."
        ) from error
    try:
        sidecar = json.loads(text)
        expected, metadata = sidecar["sha256"], sidecar["metadata"]
        if not isinstance(metadata, dict):
            raise TypeError("metadata is no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the sidecar {path.with_suffix('.json')} is damaged: {remedy}."
        ) from error
    try:
        state = safetensors.torch.load(data)
    # On damaged bytes its reader raises more kinds of errors than it names.
    except Exception as error:
        raise CheckpointError(f"{path} is no complete safetensors file: {remedy}.") from error
    if state_sha256(state) != expected:
        raise CheckpointError(f"{path} does not match the hash in its sidecar: {remedy}.")
    return Checkpoint(state, metadata)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the weights' path of the highest complete round in a folder, or None.

    Rounds are files named ``round-<number>.safetensors``, complete once their sidecar is there.
    """
    rounds: dict[int, Path] = {}
    if folder.is_dir():
        for sidecar in folder.iterdir():
            weights = sidecar.with_suffix(_SUFFIX)
            match = _ROUND_NAME.fullmatch(sidecar.name)
            if match and weights.is_file():
                rounds[int(match[1])] = weights
    return rounds[max(rounds)] if rounds else None


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Rebuild the model that ``metadata["model"]`` describes, with the checkpoint's weights.

    Returns:
        A model on the CPU, in eval mode: what is loaded is mostly evaluated or certified.

    Raises:
        CheckpointError: if the metadata describes no model of this version, or the weights are not
            those of that model.
    """
    description = checkpoint.metadata.get("model")
    if not isinstance(description, Mapping):
        raise CheckpointError(
            "the checkpoint's metadata describes no model: load one that a run of this "
            "project wrote."
        )
    try:
        spec = from_nested(ModelSpec, description)
        # Initial weights and normalisation are placeholders: the state replaces all of them.
        placeholder = [1.0] * spec.channels
        model = build_model(spec, placeholder, placeholder, torch.Generator())
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint's model {dict(description)} cannot be built ({error}): load it with "
            "the version that wrote it."
        ) from error
    expected = {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}
    found = {name: (value.dtype, value.shape) for name, value in checkpoint.state.items()}
    if found != expected:
        names = sorted(expected.keys() | found.keys())
        name = next(name for name in names if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"the checkpoint's weights are not those of its model {spec.name!r} (first differing: "
            f"{name!r}): load it with the version that wrote it."
        )
    model.load_state_dict(checkpoint.state)
    return model.eval()


def _require_suffix(path: Path) -> None:
    if path.suffix != _SUFFIX:
        raise CheckpointError(f"{path} does not end in {_SUFFIX}: give the path of the weights.")
