"""Check what clients send back; nothing of a reply is used before it has passed."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedsmooth_core import wire
from fedsmooth_core.models import NORMALISATION

_SERIALIZATION = "numpy.ndarray"  # NumPy's own format, which is read without unpickling


_REASON_LENGTH = 500  # of what a client may have written
_MOST_COUNTED = 1e6  # batches of one round: far more than any client can see


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


def read_reply(
    reply: Message, expected: Mapping[str, Tensor], max_num_examples: int
) -> tuple[dict[str, Tensor], MetricRecord]:
    """Return a reply's weights and metrics, after checking every one of them.

    Args:
        reply: a train reply without error.
        expected: the global model's state; names, shapes and dtypes must be equal to its.
        max_num_examples: the cap on n_k.

    Raises:
        BadReplyError: with the reason.
    """
    metrics = reply.content.metric_records.get(wire.METRICS)
    arrays = reply.content.array_records.get(wire.ARRAYS)
    if metrics is None or arrays is None:
        raise BadReplyError(f"it lacks the record '{wire.ARRAYS}' or '{wire.METRICS}'")
    _check_metrics(metrics, max_num_examples)
    return _read_state(arrays, expected), metrics


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


def _read_state(arrays: ArrayRecord, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if arrays.keys() != expected.keys():
        missing = sorted(expected.keys() - arrays.keys())
        extra = sorted(arrays.keys() - expected.keys())
        raise BadReplyError(
            f"its tensors differ from the model's: missing {missing}, extra {extra}"
        )
    state = {}
    for name, tensor in expected.items():
        array = arrays[name]
        if array.stype != _SERIALIZATION:
            raise BadReplyError(f"tensor {name!r} is serialised as {array.stype!r}")
        try:
            received = torch.from_numpy(array.numpy())
        except Exception as error:
            # Any bytes can arrive here, and NumPy raises many kinds of errors on them.
            raise BadReplyError(
                f"tensor {name!r} cannot be decoded (it is no array in NumPy's format)"
            ) from error
        if received.shape != tensor.shape:
            raise BadReplyError(
                f"tensor {name!r} has shape {tuple(received.shape)} instead of {tuple(tensor.shape)}"
            )
        if received.dtype != tensor.dtype:
            raise BadReplyError(f"tensor {name!r} is {received.dtype} instead of {tensor.dtype}")
        if received.is_floating_point() and not bool(torch.isfinite(received).all()):
            raise BadReplyError(f"tensor {name!r} has values that are not finite")
        if not received.is_floating_point() and received.numel():
            moved = (received.double() - tensor.double()).abs().max().item()
            if moved > _MOST_COUNTED:
                raise BadReplyError(
                    f"tensor {name!r} counts {moved:g} more or less than the model's"
                )
        if name.startswith(NORMALISATION) and not torch.equal(received, tensor):
            raise BadReplyError(f"tensor {name!r} was changed, but normalisation is not trained")
        if name.endswith("running_var") and bool((received < 0).any()):
            raise BadReplyError(f"tensor {name!r} has negative variances")
        state[name] = received
    return state
