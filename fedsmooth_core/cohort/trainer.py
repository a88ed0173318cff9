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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsmooth_core.cohort.agreement import require_agreement
from fedsmooth_core.cohort.convolution import for_one_client
from fedsmooth_core.cohort.cuda import CapturedStep, FastestWay, Inputs, clients_that_fit
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
)
from fedsmooth_core.config import AttackConfig, TrainingPlan
from fedsmooth_core.errors import ConfigError, DataError
from fedsmooth_core.limits import ENGINES, DeviceLimits
from fedsmooth_core.smoothing import NOISE_BYTES
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
    """Networks of K clients, ready for rounds of K or fewer."""

    step: LocalStep
    captured: CapturedStep | None = None
    cannot_be_captured: bool = False


class _Kept(threading.local):
    """What a thread keeps from round to round, for one model and plan."""

    model: nn.Module | None = None
    plan: TrainingPlan | None = None
    stack: _Stack | None = None
    module: nn.Module | None = None

    def __init__(self) -> None:
        self.sizes: dict[tuple[int, int], int] = {}

    def forget_others(self, model: nn.Module, plan: TrainingPlan) -> None:
        """Keep nothing of another model or plan."""
        if self.model is not model or self.plan != plan:
            self.model, self.plan, self.stack, self.module = model, plan, None, None
            self.sizes.clear()


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
        self._found: tuple[nn.Module | None, str] = (None, "")
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
        if not members:
            return
        plan = plan.in_round(server_round)
        job = _Job(model, state, plan, server_round, self._engine_for(model, members[0].data.shape))
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
        """End the workers, and give back what was kept; what they have begun is waited for."""
        self._kept = _Kept()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # A worker's number of threads is also that of threads which start later: no longer.
            torch.set_num_threads(torch.get_num_threads())

    def _engine_for(self, model: nn.Module, shape: tuple[int, int, int]) -> str:
        if self._engine != "auto":
            return self._engine
        if self._limits.max_batch is not None:
            return "plain"
        known, engine = self._found
        if known is not model:
            engine = _suitable_engine(model, shape, self._device)
            self._found = (model, engine)
        return engine

    def _chunks(self, job: _Job, members: Sequence[Member]) -> list[list[int]]:
        """Divide the members' places into chunks, each of one kind of batch, that are trained at once."""
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for place, member in enumerate(members):
            data = member.data
            kind = (member.batch_size(job.plan), data.max_value, data.images.dtype, data.shape)
            alike[kind].append(place)
        chunks = []
        for places in alike.values():
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
            except Exception:  # each client will say for itself what it is
                self._kept.sizes[key] = 1
        return self._kept.sizes[key]

    def _clients_that_fit(self, job: _Job, members: Sequence[Member]) -> int:
        """Measure what a few clients take, and divide the cohort into equal chunks by it."""
        probed = members[:_PROBED]
        with arithmetic(self._device, self._limits):
            inputs = _blank(job, members[0], len(probed))
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            step = LocalStep(self._network(job, probed, for_one_client(job.plan.attack)), job.plan)
            step.start(job.state)
            step(len(probed), *inputs)
            peak = torch.cuda.max_memory_allocated(self._device) - before
        of_inputs = sum(tensor.nbytes for tensor in inputs) // len(probed)
        # Of a client, besides: its round's noise, a step's inputs and the graph's copy of them.
        of_step = inputs[2].nbytes // len(probed)
        of_noise = max(of_step, min(NOISE_BYTES, job.plan.training.local_steps * of_step))
        per_client = peak // len(probed) + of_noise + 2 * of_inputs
        kept = len(members) * sum(tensor.nbytes for tensor in job.state.values())
        return clients_that_fit(len(members), per_client, kept, self._device)

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
        self._kept.stack = None
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
        if not len(members[0].data):  # those of a chunk have equally many
            raise DataError("There is no sample to train on: give this client at least one image.")
        with arithmetic(self._device, self._limits):
            if job.engine == "plain":
                results = [self._train_plainly(job, member) for member in members]
            else:
                stack = self._stack(job, members)
                take_step = self._taking(job, stack, members)
                results = train_stacked(
                    stack.step,
                    take_step,
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
        if self._kept.module is None:
            self._kept.module = copy.deepcopy(job.model)
        model = self._kept.module
        if set(job.state) != {name for name, _ in _tensors(model)}:
            model = copy.deepcopy(job.model)  # it has buffers that no state sets back
        model.load_state_dict(job.state)
        plan = member.own_plan(job.plan)
        metrics = local_train(
            model, member.data, plan, job.server_round, member.client, self._limits
        )
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, metrics

    def _stack(self, job: _Job, members: Sequence[Member]) -> _Stack:
        """Return networks for so many clients or more, kept from chunk to chunk."""
        self._kept.forget_others(job.model, job.plan)
        stack = self._kept.stack
        if stack is None or stack.step.network.num_clients < len(members):
            self._kept.stack = None  # before the larger one takes its place
            network = self._network(job, members, self._choose_way(job, members))
            stack = self._kept.stack = _Stack(LocalStep(network, job.plan))
        return stack

    def _choose_way(self, job: _Job, members: Sequence[Member]) -> ChooseWay:
        if self._device.type != "cuda" or not self._is_kept:
            return for_one_client(job.plan.attack)
        copies = num_copies(job.plan) * members[0].batch_size(job.plan)
        return FastestWay(len(members), copies, self._dtype(job), self._device)

    def _network(
        self, job: _Job, members: Sequence[Member], choose_way: ChooseWay
    ) -> CohortNetwork:
        if job.engine == "vmap":
            return MappedNetwork(copy.deepcopy(job.model), len(members), self._limits.bf16)
        try:
            return StackedNetwork(
                job.model, members[0].data.shape, len(members), choose_way, self._dtype(job)
            )
        except UnknownLayerError as error:
            raise ConfigError(
                f"engine=stacked cannot train {job.plan.model.name}: {error}. Allowed are engine=auto, "
                "engine=vmap and engine=plain."
            ) from error

    def _dtype(self, job: _Job) -> torch.dtype:
        return torch.bfloat16 if self._limits.bf16 else next(job.model.parameters()).dtype

    def _taking(self, job: _Job, stack: _Stack, members: Sequence[Member]) -> TakeStep:
        """Return how steps are taken: by graphs where the device has them and rounds will come."""
        if self._device.type != "cuda" or not self._is_kept or stack.cannot_be_captured:
            return stack.step
        if stack.captured is None:
            stack.captured = CapturedStep(stack.step)
        steps = [member.steps(job.plan) for member in members]
        sizes = {sum(each > number for each in steps) for number in range(max(steps))}
        for num_active in sorted(sizes, reverse=True):  # the largest first: all share its memory
            inputs = _blank(job, members[0], num_active)
            if stack.captured.has(num_active, len(inputs[0])):
                continue
            stack.step.start(job.state)
            stack.captured.warm_up(num_active, inputs)
            try:
                stack.captured.capture(num_active, inputs)
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


def _suitable_engine(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> str:
    """Try which engine does what the model does, the fastest first."""

    def stacked(model: nn.Module) -> CohortNetwork:
        return StackedNetwork(model, shape, 1, for_one_client(AttackConfig()))

    engines: dict[str, Callable[[nn.Module], CohortNetwork]] = {"stacked": stacked}
    if device.type == "cuda":
        engines["vmap"] = lambda model: MappedNetwork(model, 2)
    for engine, make in engines.items():
        try:
            require_agreement(make, model, shape)
        except UnknownLayerError:
            continue
        return engine
    return "plain"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def num_copies(plan: TrainingPlan) -> int:
    """Return m, or 1 without noise: copies that were all equal would be in vain."""
    return plan.smoothing.num_noise_vectors if plan.smoothing.sigma > 0 else 1


def _blank(job: _Job, member: Member, num_clients: int) -> Inputs:
    """Return images, labels and noise of a step's sizes, all zero."""
    size = num_clients * member.batch_size(job.plan)
    x = next(job.model.parameters()).new_zeros((size, *member.data.shape))
    return x, member.data.labels.new_zeros(size), x.new_zeros((num_copies(job.plan), *x.shape))


@contextmanager
def arithmetic(device: torch.device, limits: DeviceLimits) -> Iterator[None]:
    """Compute on this device; let CUDA multiply float32 in TF32 where the limits say so, only there."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = limits.tf32
    try:
        # Streams, events and graphs are of the current device, whatever their tensors are on.
        with torch.cuda.device(device):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
