"""Check what clients send back; nothing of a reply is used before it has passed."""

import io
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray
from torch import Tensor

from fedsmooth_core import wire
from fedsmooth_core.models import NORMALISATION

_SERIALIZATION = "numpy.ndarray"  # NumPy's own format, which is read without unpickling


_REASON_LENGTH = 500  # of what a client may have written
_MOST_COUNTED = 1e6  # batches of one round: far more than any client can see
_SMALL = 2**16  # elements: tensors up to this are looked at together


def readable(reason: str) -> str:
    """Return whatever text a client wrote as one short line without a terminal's control characters."""
    start = reason[: 4 * _REASON_LENGTH].rstrip(".\n")
    letters = "".join(letter if letter.isprintable() else " " for letter in start)
    return " ".join(letters.split())[:_REASON_LENGTH]


@dataclass(frozen=True)
class Refusal:
    """A reply, or silence, that a round goes on without."""

    client: int
    reason: str


class BadReplyError(Exception):
    """Why a reply is refused: the rest of a sentence about it."""


class GlobalModel:
    """The model that a round starts from, on every device that its replies are on.

    Args:
        state: its state dict, on one device.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self._copies: dict[torch.device, Mapping[str, Tensor]] = {}

    def on(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return its state on a device, moved there once."""
        if device not in self._copies:
            self._copies[device] = {name: x.to(device) for name, x in self.state.items()}
        return self._copies[device]


def state_of(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return a record as a state dict: its tensors where they are, or else views into its bytes.

    Not to be changed in place: nothing is copied.

    Raises:
        BadReplyError: if an array cannot be decoded.
    """
    with warnings.catch_warnings():
        # PyTorch knows no tensor that cannot be written to. Nothing here writes.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: _tensor(name, array) for name, array in arrays.items()}


def read_reply(
    reply: Message, model: GlobalModel, max_num_examples: int
) -> tuple[dict[str, Tensor], MetricRecord]:
    """Return a reply's weights and metrics, after checking every one of them.

    Arrays that hold a tensor (the in-process simulation's) are taken with it, on its device, and that
    device is waited for once. An array that came over a connection is bytes, and its tensor a view of them.

    Args:
        reply: a train reply without error; its tensors are on one device.
        model: what it was asked to train; names, shapes and dtypes must be equal to its.
        max_num_examples: the cap on n_k.

    Raises:
        BadReplyError: with the reason.
    """
    metrics, arrays = reply.content.get(wire.METRICS), reply.content.get(wire.ARRAYS)
    if not isinstance(metrics, MetricRecord) or not isinstance(arrays, ArrayRecord):
        raise BadReplyError(f"it lacks the record '{wire.ARRAYS}' or '{wire.METRICS}'")
    _check_metrics(metrics, max_num_examples)
    return _read_state(arrays, model), metrics


@dataclass(frozen=True)
class Counts:
    """What one client counted of its own images."""

    num_examples: int
    num_held_out: int
    num_abstained: int
    correct: list[int]
    """How many are certified to be right, at each radius that was asked for."""


def read_counts(reply: Message, num_asked: int, num_radii: int) -> Counts:
    """Return what an evaluate reply counts, after checking that images can be counted so.

    Args:
        reply: an evaluate reply without error.
        num_asked: the most images that it was asked for.
        num_radii: radii that it was asked for, ascending.

    Raises:
        BadReplyError: with the reason.
    """
    if list(reply.content) != [wire.METRICS] or wire.METRICS not in reply.content.metric_records:
        raise BadReplyError(
            f"its records are {sorted(reply.content)} instead of the metrics '{wire.METRICS}' alone"
        )
    metrics = reply.content.metric_records[wire.METRICS]
    if set(metrics) != wire.CERTIFY_METRICS:
        raise BadReplyError(
            f"its metrics are {sorted(metrics)} instead of {sorted(wire.CERTIFY_METRICS)}"
        )
    num_examples = _whole(wire.NUM_EXAMPLES, metrics[wire.NUM_EXAMPLES], 1, num_asked)
    held_out = _whole(wire.HELD_OUT, metrics[wire.HELD_OUT], 0, num_examples)
    abstained = _whole(wire.ABSTAINED, metrics[wire.ABSTAINED], 0, num_examples)
    correct = metrics[wire.CORRECT]
    if not isinstance(correct, list) or len(correct) != num_radii:
        raise BadReplyError(f"{wire.CORRECT} is no list of {num_radii} counts, one a radius")
    # Nothing is certified at a larger radius that is not at a smaller one.
    most, counts = num_examples - abstained, []
    for count in correct:
        most = _whole(wire.CORRECT, count, 0, most)
        counts.append(most)
    return Counts(num_examples, held_out, abstained, counts)


def _whole(name: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise BadReplyError(f"{name}={value!r} is not an integer in [{low}, {high}]")
    return value


def _check_metrics(metrics: MetricRecord, max_num_examples: int) -> None:
    if set(metrics) != wire.TRAIN_METRICS:
        raise BadReplyError(
            f"its metrics are {sorted(metrics)} instead of {sorted(wire.TRAIN_METRICS)}"
        )
    for name, value in metrics.items():
        # NaN compares as false; an integer beyond all floats is none that can be averaged.
        if isinstance(value, bool | list) or not abs(value) <= sys.float_info.max:
            raise BadReplyError(f"{name}={value!r} is not a finite number")
    num_examples = metrics[wire.NUM_EXAMPLES]
    if not isinstance(num_examples, int) or not 0 < num_examples <= max_num_examples:
        raise BadReplyError(
            f"{wire.NUM_EXAMPLES}={num_examples!r} is not an integer in [1, {max_num_examples}]"
        )
    for name in wire.TRAIN_METRICS:
        if metrics[name] < 0:  # type: ignore[operator]
            raise BadReplyError(f"{name}={metrics[name]!r} is negative")
    if metrics[wire.TRAIN_ACCURACY] > 1:  # type: ignore[operator]
        raise BadReplyError(
            f"{wire.TRAIN_ACCURACY}={metrics[wire.TRAIN_ACCURACY]!r} is more than 1"
        )


def _read_state(arrays: ArrayRecord, model: GlobalModel) -> dict[str, Tensor]:
    expected = model.state
    if arrays.keys() != expected.keys():
        missing = sorted(expected.keys() - arrays.keys())
        extra = sorted(arrays.keys() - expected.keys())
        raise BadReplyError(
            f"its tensors differ from the model's: missing {missing}, extra {extra}"
        )
    received = state_of(arrays)
    state = {name: received[name] for name in expected}
    for name, tensor in state.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise BadReplyError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)}"
            )
        if tensor.dtype != wanted.dtype:
            raise BadReplyError(f"tensor {name!r} is {tensor.dtype} instead of {wanted.dtype}")
    for tensor in state.values():
        expected = model.on(tensor.device)
        break
    if not _is_sound(state, expected):
        for name, tensor in state.items():
            _check_values(name, tensor, expected[name])
    return state


def _tensor(name: str, array: Array) -> Tensor:
    # An array from a connection is Flower's own: it never brings a tensor.
    tensor = getattr(array, "tensor", None)
    if isinstance(tensor, Tensor):
        return tensor
    if array.stype != _SERIALIZATION:
        raise BadReplyError(f"tensor {name!r} is serialised as {array.stype!r}")
    try:
        return torch.from_numpy(_view(array.data))
    except Exception as error:
        # Any bytes can arrive here, and NumPy raises many kinds of errors on them.
        raise BadReplyError(
            f"tensor {name!r} cannot be decoded (it is no array in NumPy's format)"
        ) from error


def _view(data: bytes) -> NDArray[np.generic]:
    """Read NumPy's format as ``np.load`` does without pickles, but without a copy of the values."""
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, order, dtype = _layout(data[:start])
    view: NDArray[np.generic]
    view = np.ndarray(shape, dtype, buffer=data, offset=start, order=order)
    return view if view.flags.aligned else view.copy()


@lru_cache(maxsize=256)
def _layout(header: bytes) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[np.generic]]:
    """Read a header of NumPy's format: Python's parser takes 40 us, and all replies have the same."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # what np.save writes for any array of numbers
        raise ValueError(f"version {version}")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("objects")
    return shape, "F" if is_fortran else "C", dtype


def _is_sound(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Say whether all tensors pass ``_check_values``: few passes, and one look at the device."""

    def joined(names: list[str], of: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([of[name].reshape(-1) for name in names])

    filled = [name for name, tensor in state.items() if tensor.numel()]
    floats = [name for name in filled if state[name].is_floating_point()]
    counters = [name for name in filled if not state[name].is_floating_point()]
    fixed = [name for name in filled if name.startswith(NORMALISATION)]
    variances = [name for name in floats if name.endswith("running_var")]
    small = [name for name in floats if state[name].numel() <= _SMALL]
    spread = [state[name] for name in floats if state[name].numel() > _SMALL]
    if small:
        spread.append(joined(small, state))
    # NaN is its own least and largest value, and both are kept in one pass.
    ends = [end.double() for tensor in spread for end in torch.aminmax(tensor)]
    verdicts = [torch.stack(ends).isfinite().all()] if ends else []
    if counters:
        moved = joined(counters, state).double() - joined(counters, expected).double()
        verdicts.append((moved.abs() <= _MOST_COUNTED).all())
    if fixed:
        verdicts.append((joined(fixed, state) == joined(fixed, expected)).all())
    if variances:
        verdicts.append((joined(variances, state) >= 0).all())
    return bool(torch.stack(verdicts).all()) if verdicts else True


def _check_values(name: str, received: Tensor, expected: Tensor) -> None:
    if received.is_floating_point() and not bool(torch.isfinite(received).all()):
        raise BadReplyError(f"tensor {name!r} has values that are not finite")
    if not received.is_floating_point() and received.numel():
        moved = (received.double() - expected.double()).abs().max().item()
        if moved > _MOST_COUNTED:
            raise BadReplyError(f"tensor {name!r} counts {moved:g} more or less than the model's")
    if name.startswith(NORMALISATION) and not torch.equal(received, expected):
        raise BadReplyError(f"tensor {name!r} was changed, but normalisation is not trained")
    if name.endswith("running_var") and bool((received < 0).any()):
        raise BadReplyError(f"tensor {name!r} has negative variances")
