"""FedAvg's aggregation: the sample-weighted mean of the clients' models, and clipping before it."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@torch.no_grad()
def weighted_mean(states: Iterable[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return theta = sum_k (n_k / n) theta_k with n = sum_k n_k (McMahan et al., 2017).

    Floating-point tensors are averaged in float64, as a running mean: theta moves to theta_k by
    n_k / (n_1 + ... + n_k). That is the same sum, it needs one state at a time, and equal states
    give exactly that state. Integer and boolean tensors are counters and flags, such as batch
    normalisation's ``num_batches_tracked``: a mean of them would be none, so they take the maximum.

    Args:
        states: one state dict per client, equal in names, shapes and dtypes; read once, in order,
            and left as they are. The order changes the result by float64 rounding alone.
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
    largest = max(weights)
    remaining = iter(states)
    mean: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    total = 0.0
    for index, weight in enumerate(weights):
        state = next(remaining, None)
        if state is None:
            raise ValueError(f"there are {index} states for {len(weights)} weights: give as many.")
        share = weight / largest  # at most 1, so the total cannot overflow
        total += share
        if index == 0:
            dtypes = {name: tensor.dtype for name, tensor in state.items()}
            mean = {name: _accumulator(tensor) for name, tensor in state.items()}
            continue
        _require_match(state, mean, dtypes, index)
        for name, tensor in state.items():
            if tensor.dtype.is_floating_point:
                mean[name].lerp_(tensor.to(torch.float64), share / total)
            else:
                torch.maximum(mean[name], tensor, out=mean[name])
    if next(remaining, None) is not None:
        raise ValueError(f"there are more than {len(weights)} states for as many weights.")
    return {name: tensor.to(dtypes[name]) for name, tensor in mean.items()}


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
    """Return the l2 distance of two models, over their floating-point tensors."""
    squares = [
        (new[name].double() - old[name].double()).square().sum().item()
        for name in new
        if new[name].is_floating_point()
    ]
    # Exact, so that it does not depend on the order in which a file keeps the tensors.
    return math.sqrt(math.fsum(squares))


def _accumulator(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.dtype.is_floating_point else tensor.dtype
    return tensor.detach().to(dtype, copy=True)


def _require_match(
    state: State, first: State, dtypes: Mapping[str, torch.dtype], index: int
) -> None:
    if state.keys() != first.keys():
        name = min(state.keys() ^ first.keys())
        there, missing = (index, 0) if name in state else (0, index)
        raise ValueError(
            f"state {there} has a tensor {name!r} that state {missing} lacks: aggregate states of "
            "one model alone."
        )
    for name, tensor in state.items():
        if tensor.shape != first[name].shape or tensor.dtype != dtypes[name]:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)} in state {index}, but "
                f"{dtypes[name]} {tuple(first[name].shape)} in state 0: aggregate states of one "
                "model alone."
            )
