"""FedAvg's aggregation: the sample-weighted mean of the clients' models, and clipping before it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_SPAN = 2**17
"""Elements of a tensor that a CPU thread takes at a time: long enough to read memory as a stream."""
_CPU_BUFFER = 2**19
"""float64 values that it converts at a time, 4 MB: they are still in cache when they are summed."""
_DEVICE_BUFFER = 2**23
"""The same on an accelerator, 64 MB: few launches."""


@torch.no_grad()
def weighted_mean(states: Iterable[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return theta = sum_k (n_k / n) theta_k with n = sum_k n_k (McMahan et al., 2017).

    Floating-point tensors are summed in float64 and rounded once; equal states give exactly that
    state. Integer and boolean tensors are counters and flags, such as batch normalisation's
    ``num_batches_tracked``: a mean of them would be none, so they take the maximum.

    Each value is read once, by ``torch.get_num_threads()`` threads on a CPU; nothing is read back
    from a device. Beside the result it holds 5 MB a thread (64 MB on a device), and never a copy
    of the states, unless they are not contiguous. States that are slices of one stack of tensors
    (K, ...) are read as that stack.

    Args:
        states: one state dict per client, equal in names, shapes, dtypes and devices; left as they
            are. The order changes the result by float64 rounding alone.
        weights: n_k, the clients' numbers of samples; positive and finite.

    Returns:
        A new state dict with the dtypes and devices of the given ones.

    Raises:
        ValueError: for no states, a weight that is not positive and finite, states that do not
            match each other, or another number of states than of weights.
    """
    if not weights:
        raise ValueError("there is nothing to aggregate: give at least one state and its weight.")
    for index, weight in enumerate(weights):
        if not 0 < weight < math.inf:
            raise ValueError(f"weight {index} is {weight!r}: allowed is a finite number > 0.")
    states = list(states)
    if len(states) != len(weights):
        raise ValueError(
            f"there are {len(states)} states for {len(weights)} weights: give as many."
        )
    for index in range(1, len(states)):
        _require_match(states[index], states[0], index)
    largest = max(weights)
    portions = [weight / largest for weight in weights]  # at most 1: no sum of them overflows
    total = math.fsum(portions)
    shares = torch.tensor([portion / total for portion in portions], dtype=torch.float64)
    mean: dict[str, Tensor] = {}
    parts: dict[torch.device, list[_Part]] = {}
    for name, first in states[0].items():
        tensors = [state[name] for state in states]
        if first.is_floating_point():
            mean[name] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
            parts.setdefault(first.device, []).extend(_split(tensors, mean[name].view(-1)))
        else:
            mean[name] = torch.stack(tensors).amax(0)
    for device, its_parts in parts.items():
        _average_all(its_parts, shares.to(device, non_blocking=True))
    return mean


@torch.no_grad()
def clip_update(state: State, old: State, max_norm: float) -> tuple[dict[str, Tensor], bool]:
    """Shorten a client's update theta_k - theta to an l2 norm of at most ``max_norm``.

    The norm is over all floating-point tensors together. Integer tensors are left as they are.

    Args:
        state: theta_k, the client's state.
        old: theta, the global state it started from; equal names, shapes and dtypes.
        max_norm: > 0.

    Returns:
        The state of the shortened update, and whether it was too long.
    """
    norm = update_norm(state, old)
    if norm <= max_norm:
        return dict(state), False
    share = max_norm / norm
    clipped = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            start = old[name].double()
            tensor = start.lerp(tensor.double(), share).to(tensor.dtype)
        clipped[name] = tensor
    return clipped, True


@torch.no_grad()
def update_norm(new: State, old: State) -> float:
    """Return the l2 distance of two models of one device, over their floating-point tensors."""
    squares = []
    for name, tensor in new.items():
        if tensor.is_floating_point():
            span = _SPAN if tensor.device.type == "cpu" else max(tensor.numel(), 1)
            parts = zip(
                tensor.reshape(-1).split(span), old[name].reshape(-1).split(span), strict=True
            )
            for part, start in parts:
                moved = part.double() - start
                squares.append(moved.dot(moved))
    # One look at the device. An exact sum, so that it does not depend on the order in which a file
    # keeps the tensors.
    return math.sqrt(math.fsum(torch.stack(squares).tolist())) if squares else 0.0


class _Part(NamedTuple):
    """A span of one tensor, over all K states."""

    stack: Tensor | None
    """(K, span), where the states are slices of a stack."""
    rows: list[Tensor]
    """K times (span,), where they are not."""
    mean: Tensor
    """(span,); to be written."""


def _split(tensors: Sequence[Tensor], mean: Tensor) -> Iterator[_Part]:
    """Cut one tensor of all states into spans; ``mean`` is flat."""
    size, count = mean.numel(), len(tensors)
    span = _SPAN if mean.device.type == "cpu" else max(_DEVICE_BUFFER // count, 1)
    stack = _as_stack(tensors)
    flat = [tensor.detach().reshape(-1) for tensor in tensors] if stack is None else []
    for start in range(0, size, span):
        stop = min(start + span, size)
        yield _Part(
            None if stack is None else stack[:, start:stop],
            flat if size <= span else [row[start:stop] for row in flat],
            mean[start:stop],
        )


def _average_all(parts: Sequence[_Part], shares: Tensor) -> None:
    queue = iter(parts)
    num_threads = min(torch.get_num_threads(), len(parts)) if not shares.is_cuda else 1
    if num_threads < 2:
        _average(queue, shares)
        return

    def work() -> None:
        # Of this thread alone. Threads that share each small operation wait for each other after
        # each, which takes many times the work where another process keeps a core busy.
        torch.set_num_threads(1)
        _average(queue, shares)

    own = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            for future in [pool.submit(work) for _ in range(num_threads)]:
                future.result()
    finally:
        torch.set_num_threads(own)  # and of threads that start from now on


@torch.inference_mode()
def _average(queue: Iterator[_Part], shares: Tensor) -> None:
    """Write sum_k shares_k * states_k into each part's mean.

    K states of float32 that are all x give exactly x: the shares sum to 1 and the products are
    summed with relative errors of 2**-53 each, so the sum is off by less than (2 K + 2) 2**-53 |x|,
    and for any K < 2**26 the nearest float32 is x. Narrower types have more room. float64 has none,
    so there the mean is taken of the differences to the first state.
    """
    count = len(shares)
    buffer = sums = shares.new_empty(0)
    for part in queue:
        span = part.mean.numel()
        capacity = _CPU_BUFFER if shares.device.type == "cpu" else _DEVICE_BUFFER
        height = min(count, max(capacity // span, 1))
        if buffer.numel() < height * span:
            buffer = shares.new_empty(height * span)
        if sums.numel() < span:
            sums = shares.new_empty(span)
        total = sums[:span].zero_()
        centre = None
        if part.mean.dtype == torch.float64:
            centre = part.rows[0] if part.stack is None else part.stack[0]
        for top in range(0, count, height):
            bottom = min(top + height, count)
            rows = buffer[: (bottom - top) * span].view(-1, span)
            if part.stack is None:
                torch._foreach_copy_(rows.unbind(), part.rows[top:bottom])
            else:
                rows.copy_(part.stack[top:bottom])
            if centre is not None:
                rows.sub_(centre)
            total.addmv_(rows.t(), shares[top:bottom])
        part.mean.copy_(total if centre is None else total.add_(centre))


def _as_stack(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors that lie in one storage at equal distances as one view (K, elements), or None."""
    first, size = tensors[0], tensors[0].numel()
    addresses = [tensor.data_ptr() for tensor in tensors]
    step = addresses[1] - addresses[0] if len(tensors) > 1 else 0
    if step < 0 or step % first.element_size():
        return None
    if any(after - before != step for before, after in pairwise(addresses)):
        return None
    if not all(tensor.is_contiguous() for tensor in tensors):
        return None
    # What lies within the first one's storage is of that storage.
    stride = step // first.element_size()
    end = first.storage_offset() + (len(tensors) - 1) * stride + size
    if end * first.element_size() > first.untyped_storage().nbytes():
        return None
    return first.detach().as_strided((len(tensors), size), (stride, 1))


def _require_match(state: State, first: State, index: int) -> None:
    if state.keys() != first.keys():
        name = min(state.keys() ^ first.keys())
        there, missing = (index, 0) if name in state else (0, index)
        raise ValueError(
            f"state {there} has a tensor {name!r} that state {missing} lacks: aggregate states of "
            "one model alone."
        )
    for name, tensor in state.items():
        wanted = first[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)} in state {index}, but "
                f"{wanted.dtype} {tuple(wanted.shape)} in state 0: aggregate states of one "
                "model alone."
            )
