"""LocalTrain of many clients at once: the steps of :func:`~fedsmooth_core.training.local_train`.

All clients' images of a local step are one batch, client after client: the attack and its
estimators, which treat every image by itself, are the very same code. What differs is the
classifier, which applies to each image the weights of its client, and the SGD step, which is one
step on stacked weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fedsmooth_core.attack import smoothadv_attack
from fedsmooth_core.cohort.copies import by_client, by_copy
from fedsmooth_core.cohort.layers import Weights
from fedsmooth_core.config import TrainingPlan
from fedsmooth_core.data import ClientData, draw_order, move_images
from fedsmooth_core.estimators import make_estimator
from fedsmooth_core.smoothing import NoisyClassifier, training_noise
from fedsmooth_core.training import LOSSES, LocalMetrics, training_streams


@dataclass(frozen=True, eq=False)
class Member:
    """A client of a cohort."""

    client: int
    """Its stable number: what names its random streams."""
    data: ClientData
    """Its samples, on the cohort's device."""
    local_steps: int | None = None
    """E of this client alone; None takes the plan's."""

    def steps(self, plan: TrainingPlan) -> int:
        """Return E."""
        return plan.training.local_steps if self.local_steps is None else self.local_steps

    def own_plan(self, plan: TrainingPlan) -> TrainingPlan:
        """Return the plan with this client's number of steps."""
        if self.steps(plan) == plan.training.local_steps:
            return plan
        return replace(plan, training=replace(plan.training, local_steps=self.steps(plan)))

    def batch_size(self, plan: TrainingPlan) -> int:
        """Return B: a client with fewer samples takes all of them."""
        return min(plan.training.batch_size, len(self.data))


@dataclass(frozen=True, eq=False)
class Trained:
    """What a client's round gives."""

    state: dict[str, Tensor]
    """Its model; perhaps views of the tensors of all that were trained at once."""
    metrics: LocalMetrics
    seconds: float
    """That its training took, or that of all who were trained at once with it."""


class CohortNetwork(Protocol):
    """The networks of K clients: see :class:`~fedsmooth_core.cohort.network.StackedNetwork`."""

    num_clients: int
    weights: list[Tensor]

    def load(self, state: Mapping[str, Tensor]) -> None: ...
    def states(self, num_clients: int) -> list[dict[str, Tensor]]: ...
    def prepare(self, weights: Sequence[Tensor]) -> list[Weights]: ...
    def logits(self, prepared: Sequence[Weights], x: Tensor, training: bool) -> Tensor: ...
    def at_noise(self, prepared: Sequence[Weights], noise: Tensor) -> NoisyClassifier: ...


class LocalStep:
    """One mini-batch of SmoothAdv training for the first clients of a network, in place.

    Args:
        network: the clients'.
        plan: hyper-parameters.
    """

    def __init__(self, network: CohortNetwork, plan: TrainingPlan) -> None:
        self.network, self._plan = network, plan
        self._estimator = make_estimator(plan.attack, plan.smoothing.sigma)
        has_momentum = plan.training.momentum > 0
        self._velocity = [torch.empty_like(w) for w in network.weights if has_momentum]
        totals = network.weights[0].new_empty((2, network.num_clients), dtype=torch.float32)
        self.loss, self.accuracy = totals
        """(K,) sums over the steps so far."""

    def start(self, state: Mapping[str, Tensor]) -> None:
        """Begin a round: every client has the global model, no momentum and no metrics."""
        self.network.load(state)
        for tensor in (*self._velocity, self.loss, self.accuracy):
            tensor.zero_()

    def __call__(self, num_active: int, x: Tensor, labels: Tensor, noise: Tensor) -> None:
        """Take a step with B images of each of the first clients.

        Args:
            num_active: k, how many of them.
            x: (k * B, C, H, W) in [0, 1], client after client.
            labels: (k * B,).
            noise: (m, k * B, C, H, W).
        """
        num_copies = len(noise)
        weights = [weight[:num_active] for weight in self.network.weights]
        leaves = [weight.detach().requires_grad_() for weight in weights]
        prepared = self.network.prepare(leaves)
        frozen = [tuple(weight.detach() for weight in layer) for layer in prepared]
        classifier = self.network.at_noise(frozen, noise)
        x_adv = smoothadv_attack(classifier, x, labels, noise, self._estimator, self._plan.attack)
        # The attack's own noise once more.
        copies = by_client(x_adv + noise, num_active)
        logits = by_copy(self.network.logits(prepared, copies, training=True), num_copies)
        of_image = LOSSES[self._plan.training.loss](logits, labels)
        losses = of_image.unflatten(0, (num_active, -1)).mean(1)
        # A sum: each client's gradient is its own.
        gradients = torch.autograd.grad(losses.sum(), leaves)
        self._descend(weights, gradients)
        correct = (logits.detach().argmax(-1) == labels).float()
        self.loss[:num_active] += losses.detach()
        self.accuracy[:num_active] += correct.unflatten(1, (num_active, -1)).mean((0, 2))

    @torch.no_grad()
    def _descend(self, weights: list[Tensor], gradients: Sequence[Tensor]) -> None:
        """SGD as PyTorch's: v = mu v + g + lambda theta, theta = theta - eta v."""
        config, directions = self._plan.training, list(gradients)
        if config.weight_decay:
            directions = list(torch._foreach_add(directions, weights, alpha=config.weight_decay))
        if self._velocity:
            velocity = [v[: len(w)] for v, w in zip(self._velocity, weights, strict=True)]
            torch._foreach_mul_(velocity, config.momentum)
            torch._foreach_add_(velocity, directions)
            directions = velocity
        torch._foreach_add_(weights, directions, alpha=-config.learning_rate)


TakeStep = Callable[[int, Tensor, Tensor, Tensor], None]


def train_stacked(
    step: LocalStep,
    take_step: TakeStep,
    state: Mapping[str, Tensor],
    members: Sequence[Member],
    plan: TrainingPlan,
    server_round: int,
    dtype: torch.dtype,
) -> list[tuple[dict[str, Tensor], LocalMetrics]]:
    """Train K clients, each from ``state``; return their models and metrics in order.

    They have one batch size and one kind of images. Clients with more steps are kept first, so that
    those who still train are always the first ones.

    Args:
        step: of a network of K clients or more, on their device; it is started anew.
        take_step: takes it: ``step`` itself, or a captured graph of it.
        state: the global model.
        members: K of them.
        plan: hyper-parameters.
        server_round: >= 1.
        dtype: of images and noise.

    Raises:
        DataError: when a member has no sample.
    """
    order = sorted(range(len(members)), key=lambda place: -members[place].steps(plan))
    ordered = [members[place] for place in order]
    num_steps = [member.steps(plan) for member in ordered]
    batches = _Batches(ordered, plan, server_round, dtype)
    step.start(state)
    for number in range(num_steps[0]):
        num_active = sum(steps > number for steps in num_steps)
        take_step(num_active, *batches.take(number, num_active))
    sums = torch.stack([step.loss, step.accuracy]).tolist()
    states = step.network.states(len(members))
    results: dict[int, tuple[dict[str, Tensor], LocalMetrics]] = {}
    for row, place in enumerate(order):
        loss, accuracy = (of_client[row] / num_steps[row] for of_client in sums)
        results[place] = (states[row], LocalMetrics(loss, accuracy))
    return [results[place] for place in range(len(members))]


class _Batches:
    """The mini-batches of K clients' round and their noise, as each would draw them alone."""

    def __init__(
        self, members: Sequence[Member], plan: TrainingPlan, server_round: int, dtype: torch.dtype
    ) -> None:
        self._images, self._labels, first_rows = _shared(members)
        self._max_value, self._dtype = members[0].data.max_value, dtype
        self._augmentation = (plan.dataset.flip, plan.dataset.crop_padding)
        device, most_steps = self._labels.device, members[0].steps(plan)
        places, moves, self._noises = [], [], []
        for member, first_row in zip(members, first_rows, strict=True):
            batch_size, steps = member.batch_size(plan), member.steps(plan)
            batch_stream, noise_stream = training_streams(plan, server_round, member.client, device)
            drawn = draw_order(
                len(member.data), batch_size, steps, batch_stream, *self._augmentation
            )
            padding = (0, 0) * (drawn.indices.dim() - 1) + (0, most_steps - steps)
            indices = member.data.places(drawn.indices) + first_row
            places.append(torch.nn.functional.pad(indices, padding))
            moves.append(torch.nn.functional.pad(drawn.moves, (0, 0, *padding)))
            self._noises.append(
                training_noise(
                    torch.empty((), dtype=dtype, device=device),
                    (batch_size, *self._images.shape[1:]),
                    plan.smoothing.sigma,
                    plan.smoothing.num_noise_vectors,
                    steps,
                    noise_stream,
                )
            )
        # (E, K, B): a step's are contiguous.
        self._places = torch.stack(places, dim=1)
        self._moves = torch.stack(moves, dim=1).to(device)

    def take(self, step: int, num_clients: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, labels and noise of a step for the first clients; steps come in order."""
        places = self._places[step, :num_clients].flatten()
        images = self._images[places].to(self._dtype) / self._max_value
        moves = self._moves[step, :num_clients].flatten(0, 1)
        # Pixels in one dimension: of more than four, CUDA would copy one client's noise at a time.
        noise = torch.cat([next(each).flatten(2) for each in self._noises[:num_clients]], dim=1)
        return (
            move_images(images, moves, *self._augmentation),
            self._labels[places],
            noise.unflatten(2, images.shape[1:]),
        )


def _shared(members: Sequence[Member]) -> tuple[Tensor, Tensor, list[int]]:
    """Return one tensor of images, one of labels, and where in them each member's data begin."""
    distinct = {id(member.data.images): member.data for member in members}
    first_rows, total = {}, 0
    for identity, data in distinct.items():
        first_rows[identity] = total
        total += len(data.images)
    images = [data.images for data in distinct.values()]
    labels = [data.labels for data in distinct.values()]
    return (
        images[0] if len(images) == 1 else torch.cat(images),
        labels[0] if len(labels) == 1 else torch.cat(labels),
        [first_rows[id(member.data.images)] for member in members],
    )
