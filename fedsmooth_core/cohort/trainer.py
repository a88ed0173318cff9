"""Trains cohorts on one device by the engine that suits it.

- On a CPU one client after the other, by its exact savings, in as many single-threaded workers as there
  are cores: stacking clients loses there, for one client's weights stay in the cache and ten do not.
- On CUDA as many clients as fit into memory at once, each local step one graph.
- A model of unknown layers by vmap on CUDA, and by the plain loop on a CPU.
- The plain loop as well where a device limits the batch.
"""

import copy
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsmooth_core.cohort.convolution import for_one_client
from fedsmooth_core.cohort.cuda import CapturedStep, FastestWay, clients_that_fit
from fedsmooth_core.cohort.generic import MappedNetwork
from fedsmooth_core.cohort.local_training import (
    CohortNetwork,
    LocalStep,
    Member,
    TakeStep,
    Trained,
    train_stacked,
)
from fedsmooth_core.cohort.network import (
    ChooseWay,
    StackedNetwork,
    UnknownLayerError,
    is_stackable,
)
from fedsmooth_core.config import TrainingPlan
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.limits import ENGINES, DeviceLimits
from fedsmooth_core.training import LocalMetrics, local_train

_NO_LIMITS = DeviceLimits()
_PROBED = 8  # clients whose memory is measured before a cohort is divided

Outcome = tuple[int, Trained | Exception]
"""A member's place, and what its round gave, or why it failed."""


@dataclass(frozen=True, eq=False)
class _Job:
    """What all members of a cohort share."""

    model: nn.Module
    state: Mapping[str, Tensor]
    plan: TrainingPlan
    server_round: int
    engine: str


@dataclass(eq=False)
class _Stack:
    """The networks of K clients, ready for rounds."""

    step: LocalStep
    captured: CapturedStep | None = None
    cannot_be_captured: bool = False


class _Kept(threading.local):
    """What a thread keeps from round to round, for one model and plan."""

    model: nn.Module | None = None
    plan: TrainingPlan | None = None

    def __init__(self) -> None:
        self.stacks: dict[tuple[int, int], _Stack] = {}
        self.sizes: dict[tuple[int, int], int] = {}
        self.modules: list[nn.Module] = []

    def forget_others(self, model: nn.Module, plan: TrainingPlan) -> None:
        """Keep nothing of another model or plan."""
        if self.model is not model or self.plan != plan:
            self.stacks.clear()
            self.sizes.clear()
            self.modules.clear()
            self.model, self.plan = model, plan


class CohortTrainer:
    """Trains many clients' local models, each as :func:`~fedsmooth_core.training.local_train` would.

    A client's draws depend on the plan's seed, the round and its number alone, and its result not on
    who else is in its cohort: on a CPU to the bit, given the threads of a worker; on CUDA to rounding.

    Args:
        device: where the members' data are.
        engine: ``auto``, ``plain`` (the loop of ``local_train``), ``stacked`` or ``vmap``.
        limits: of the device: precision, largest batch.
        workers: threads that train side by side on a CPU; None trains in the calling thread, with all
            threads of PyTorch.
        threads_per_worker: of PyTorch.
        is_kept: whether many rounds will come: worth timing kernels and capturing graphs on CUDA.
        max_clients: trained at once; None takes one on a CPU, and what fits on CUDA.

    Raises:
        ConfigError: for an unknown engine, or one that cannot keep the limits.
    """

    def __init__(
        self,
        device: torch.device,
        engine: str = "auto",
        limits: DeviceLimits = _NO_LIMITS,
        workers: int | None = None,
        threads_per_worker: int = 1,
        is_kept: bool = False,
        max_clients: int | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise ConfigError(
                f"engine={engine!r} is unknown: allowed is one of {', '.join(ENGINES)}."
            )
        if limits.max_batch is not None and engine not in ("auto", "plain"):
            raise ConfigError(
                f"engine={engine!r} cannot divide a mini-batch, but max-batch={limits.max_batch} may "
                "ask for it: allowed are engine=auto and engine=plain."
            )
        self._device, self._engine, self._limits = device, engine, limits
        self._is_kept, self._max_clients = is_kept, max_clients
        self._kept = _Kept()
        self._stackable: tuple[nn.Module | None, bool] = (None, False)
        self._fastest: FastestWay | None = None
        self._pool: ThreadPoolExecutor | None = None
        if workers is not None and device.type == "cpu":
            self._pool = ThreadPoolExecutor(
                workers, "cohort", torch.set_num_threads, (threads_per_worker,)
            )

    def train(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        members: Sequence[Member],
        plan: TrainingPlan,
        server_round: int,
    ) -> Iterator[Outcome]:
        """Train each member from ``state``; give results as they come.

        Args:
            model: the architecture, on the device; its weights are neither used nor changed. The same
                object in every round lets the preparations be kept.
            state: the global model, on the device.
            members: clients, with data on the device.
            plan: hyper-parameters, federation-wide.
            server_round: >= 1.

        Yields:
            The place of a member, and its :class:`Trained` or the exception that it failed with. What
            fails for one member fails for it alone, or for those that were trained at once with it.
        """
        job = _Job(model, state, plan, server_round, self._engine_for(model, members))
        chunks = self._chunks(job, members)
        if self._pool is None:
            for chunk in chunks:
                yield from self._outcomes(job, members, chunk)
            return
        futures = [self._pool.submit(self._outcomes, job, members, chunk) for chunk in chunks]
        try:
            for future in as_completed(futures):
                yield from future.result()
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End the workers; what they have begun is waited for."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _engine_for(self, model: nn.Module, members: Sequence[Member]) -> str:
        if self._engine != "auto":
            return self._engine
        if self._limits.max_batch is not None or not members:
            return "plain"
        if self._stackable[0] is not model:
            self._stackable = (model, is_stackable(model, members[0].data.shape))
        if self._stackable[1]:
            return "stacked"
        return "vmap" if self._device.type == "cuda" else "plain"

    def _chunks(self, job: _Job, members: Sequence[Member]) -> list[list[int]]:
        """Divide the members' places into chunks, each of one batch size, that are trained at once."""
        by_batch_size: dict[int, list[int]] = defaultdict(list)
        for place, member in enumerate(members):
            by_batch_size[member.batch_size(job.plan)].append(place)
        chunks = []
        for places in by_batch_size.values():
            size = self._chunk_size(job, [members[place] for place in places])
            # Those of one chunk had better take as many steps.
            places.sort(key=lambda place: -members[place].steps(job.plan))
            chunks += [places[first : first + size] for first in range(0, len(places), size)]
        return chunks

    def _chunk_size(self, job: _Job, members: Sequence[Member]) -> int:
        if job.engine == "plain" or not len(members[0].data):
            return 1
        if self._max_clients is not None:
            return self._max_clients
        if self._device.type == "cpu" or len(members) == 1:
            return 1
        self._kept.forget_others(job.model, job.plan)
        key = (len(members), members[0].batch_size(job.plan))
        if key not in self._kept.sizes:
            try:
                self._kept.sizes[key] = self._clients_that_fit(job, members)
            except torch.OutOfMemoryError:
                self._kept.sizes[key] = 1
        return self._kept.sizes[key]

    def _clients_that_fit(self, job: _Job, members: Sequence[Member]) -> int:
        """Measure what a few clients take, and divide the cohort into equal chunks by it."""
        probed = members[:_PROBED]
        with arithmetic(self._device, self._limits):
            stack = self._stack(job, probed)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            stack.step.start(job.state)
            stack.step(*_blank(stack, members[0], job.plan, len(probed)))
            peak = torch.cuda.max_memory_allocated(self._device) - before
        if len(probed) < len(members):  # else it is the one that will be used
            self._kept.stacks.clear()
        own = sum(tensor.nbytes for tensor in job.state.values())
        # Of a client: weights, momentum and result, besides what a step takes.
        per_client = peak // len(probed) + 3 * own
        return clients_that_fit(len(members), per_client, len(members) * own, self._device)

    def _outcomes(self, job: _Job, members: Sequence[Member], chunk: list[int]) -> list[Outcome]:
        try:
            results = self._train_chunk(job, [members[place] for place in chunk])
            return list(zip(chunk, results, strict=True))
        except torch.OutOfMemoryError as error:
            if len(chunk) == 1:
                return [(chunk[0], error)]
        except Exception as error:  # a member's, whatever it is: the others go on
            return [(place, error) for place in chunk]
        # Other programs may have taken memory since it was measured.
        self._kept.stacks.clear()
        torch.cuda.empty_cache()
        half = -(-len(chunk) // 2)
        self._kept.sizes = {key: min(size, half) for key, size in self._kept.sizes.items()}
        return [
            outcome
            for part in (chunk[:half], chunk[half:])
            for outcome in self._outcomes(job, members, part)
        ]

    def _train_chunk(self, job: _Job, members: Sequence[Member]) -> list[Trained]:
        started = time.perf_counter()
        with arithmetic(self._device, self._limits):
            if job.engine == "plain":
                results = [self._train_plainly(job, member) for member in members]
            else:
                stack = self._stack(job, members)
                results = train_stacked(
                    stack.step,
                    self._taking(job, stack, members),
                    job.state,
                    members,
                    job.plan,
                    job.server_round,
                    next(job.model.parameters()).dtype,
                )
        seconds = time.perf_counter() - started
        return [Trained(state, metrics, seconds) for state, metrics in results]

    def _train_plainly(self, job: _Job, member: Member) -> tuple[dict[str, Tensor], LocalMetrics]:
        self._kept.forget_others(job.model, job.plan)
        if not self._kept.modules:
            self._kept.modules.append(copy.deepcopy(job.model))
        model, plan = self._kept.modules[0], member.own_plan(job.plan)
        model.load_state_dict(job.state)
        metrics = local_train(
            model, member.data, plan, job.server_round, member.client, self._limits
        )
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, metrics

    def _stack(self, job: _Job, members: Sequence[Member]) -> _Stack:
        """Return networks for so many clients of this batch size, made once."""
        self._kept.forget_others(job.model, job.plan)
        key = (len(members), members[0].batch_size(job.plan))
        if key not in self._kept.stacks:
            step = LocalStep(self._network(job, members), key[1], job.plan)
            self._kept.stacks[key] = _Stack(step)
        return self._kept.stacks[key]

    def _network(self, job: _Job, members: Sequence[Member]) -> CohortNetwork:
        if job.engine == "vmap":
            return MappedNetwork(copy.deepcopy(job.model), len(members), self._limits.bf16)
        dtype = torch.bfloat16 if self._limits.bf16 else next(job.model.parameters()).dtype
        choose: ChooseWay = for_one_client(job.plan.attack)
        if self._device.type == "cuda" and self._is_kept:
            if self._fastest is None:
                copies = job.plan.smoothing.num_noise_vectors * members[0].batch_size(job.plan)
                self._fastest = FastestWay(len(members), copies, dtype, self._device)
            choose = self._fastest
        try:
            return StackedNetwork(job.model, members[0].data.shape, len(members), choose, dtype)
        except UnknownLayerError as error:
            raise ConfigError(
                f"engine=stacked cannot train {job.plan.model.name}: {error}. Allowed are engine=auto, "
                "engine=vmap and engine=plain."
            ) from error

    def _taking(self, job: _Job, stack: _Stack, members: Sequence[Member]) -> TakeStep:
        """Return how steps are taken: by graphs where the device has them and rounds will come."""
        if self._device.type != "cuda" or not self._is_kept or stack.cannot_be_captured:
            return stack.step
        if stack.captured is None:
            stack.captured = CapturedStep(stack.step)
        steps = [member.steps(job.plan) for member in members]
        for num_active in {sum(each > number for each in steps) for number in range(max(steps))}:
            blank = _blank(stack, members[0], job.plan, num_active)
            if not stack.captured.has(len(blank[0])):
                stack.step.start(job.state)
                try:
                    stack.captured.capture(*blank)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # a model that looks at its data, say
                    warnings.warn(
                        f"Steps of {job.plan.model.name} cannot be captured in a CUDA graph ({error}): "
                        "they are taken one by one, which is slower.",
                        RuntimeWarning,
                        stacklevel=1,
                    )
                    stack.captured, stack.cannot_be_captured = None, True
                    return stack.step
        return stack.captured


def _blank(
    stack: _Stack, member: Member, plan: TrainingPlan, num_clients: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, labels and noise of a step's sizes, all zero."""
    size = num_clients * member.batch_size(plan)
    copies = plan.smoothing.num_noise_vectors if plan.smoothing.sigma > 0 else 1
    like = stack.step.network.weights[0]
    x = like.new_zeros((size, *member.data.shape))
    return x, member.data.labels.new_zeros(size), like.new_zeros((copies, *x.shape))


@contextmanager
def arithmetic(device: torch.device, limits: DeviceLimits) -> Iterator[None]:
    """Let CUDA multiply float32 in TF32 where the limits say so, and nowhere else."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = limits.tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
