"""How many times as fast training is with the one-point estimator as with the stochastic one.

The paper says 2-3 times. A local step is the attack and then the training pass, which no estimator
makes faster, so two things are measured: whole local training, and the attack alone. The stochastic
estimator is back-propagated to the images alone: without the weights' gradients, which an attack has
no use for, and which would make one-point look faster than it is.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from fedsmooth_core.attack import smoothadv_attack
from fedsmooth_core.certification.comparison import Ratio, ratio_interval
from fedsmooth_core.cohort.trainer import arithmetic
from fedsmooth_core.config import RunConfig, TrainingPlan
from fedsmooth_core.device import choose_device
from fedsmooth_core.durable import write_atomically
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.estimators import make_estimator
from fedsmooth_core.smoothing import draw_noise
from fedsmooth_core.training import InBfloat16, training_streams
from server.progress import counting
from server.reproduction.figures import ESTIMATORS
from server.reproduction.tasks import passes_of_round
from server.reproduction.timing import ProbedCohort, now, num_probed_clients

_PAIRS = 7
_SAMPLE_SECONDS = 0.2  # of the attack alone: what the clock and a busy moment add is little of it
_ROUND = 1  # all rounds are this one: both estimators get the same mini-batches and noise

Seconds = dict[str, list[float]]
"""By estimator, a value a pair."""


@dataclass(frozen=True)
class SpeedUp:
    """How much faster one-point is, and on what that was measured."""

    training: Ratio
    """Seconds of whole local training, stochastic over one-point."""
    attack: Ratio
    """Seconds of a mini-batch's attack, stochastic over one-point."""
    stochastic_step_seconds: float
    """The median round's seconds, shared out among all local steps of all its clients."""
    one_point_step_seconds: float
    """As ``stochastic_step_seconds``."""
    attack_steps: int
    """T."""
    num_noise_vectors: int
    """m."""
    batch_size: int
    """B, as far as a client has as many images."""
    model: str
    precision: str
    device: str
    """The GPU's name, or ``cpu``."""
    threads: int
    """Of PyTorch. On a CPU each client trains in one of them, and the attack alone is in one, too."""
    clients: int
    """Trained at once."""

    def is_of(
        self, model: str, precision: str, attack_steps: int, num_noise_vectors: int, batch_size: int
    ) -> bool:
        """Whether it was measured for this model, attack and mini-batch."""
        attack = (self.attack_steps, self.num_noise_vectors)
        found = (self.model, self.precision, *attack, self.batch_size)
        return found == (model, precision, attack_steps, num_noise_vectors, batch_size)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SpeedUp":
        """Invert :meth:`to_json`."""
        ratios = {name: Ratio(**values[name]) for name in ("training", "attack")}
        return cls(**{**values, **ratios})

    def save(self, path: Path) -> None:
        """Write the file whole or not at all; its folder must exist."""
        write_atomically(path, json.dumps(self.to_json(), indent=2).encode())

    @classmethod
    def load(cls, path: Path) -> "SpeedUp":
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: if the file holds something else.
        """
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"{path} is no measurement of the estimators' speed: delete it to measure again."
            ) from None


@dataclass(frozen=True)
class SpeedMeasurement:
    """Measure both estimators on this machine, into a file."""

    config: RunConfig
    """A run with an attack; its own estimator does not matter."""
    root: Path

    title = "measure the speed of the two estimators"
    category = "speed"

    @property
    def path(self) -> Path:
        """The finished measurement."""
        return self.root / "speed.json"

    def work_left(self) -> int:
        if self._is_done():
            return 0
        # Those of whole local training: the attack alone takes seconds, whatever the model.
        passes = sum(passes_of_round(plan_with(self.config, estimator)) for estimator in ESTIMATORS)
        return (1 + _PAIRS) * num_probed_clients(self.config) * passes

    def _is_done(self) -> bool:
        """Whether the file is there, whole, and of this model and attack."""
        try:
            found = SpeedUp.load(self.path)
        except (OSError, ConfigError):
            return False
        config = self.config
        batch_size = config.training.batch_size
        is_here = (found.device == "cpu") == (choose_device(config.runtime.device).type == "cpu")
        return is_here and found.is_of(
            config.model.name,
            config.runtime.precision,
            config.attack.attack_steps,
            config.smoothing.num_noise_vectors,
            min(batch_size, config.partition.samples_per_client or batch_size),
        )

    def run(self, console: Console) -> None:
        measure_speed(self.config, console).save(self.path)


def plan_with(config: RunConfig, estimator: str) -> TrainingPlan:
    """Return a run's plan with one of the paper's two estimators, the attack's budget fully grown.

    Raises:
        ConfigError: if the run has no attack, or none that one-point could do.
    """
    if not config.attack.attack_steps:
        raise ConfigError(
            "attack.attack_steps=0 needs no estimator whose speed could be measured: allowed is "
            "attack.attack_steps >= 1."
        )
    attack = replace(config.attack, estimator=estimator, variance_reduction="none")
    return replace(config.plan, attack=attack).in_round(config.federation.num_rounds)


def measure_speed(config: RunConfig, console: Console) -> SpeedUp:
    """Let both estimators do the same work in turn on this machine, and compare pair by pair.

    Args:
        config: a run with an attack. Taken from it are the plan, but for the estimator, and the
            ``runtime``; its cohort is as large as the device trains at once.
        console: for progress.

    Raises:
        ConfigError: as :func:`plan_with`.
        Exception: whatever a client failed with.
    """
    plans = {estimator: plan_with(config, estimator) for estimator in ESTIMATORS}
    cohort = ProbedCohort.of(config)
    with counting(console, "Speed", 2 * (1 + _PAIRS) * len(ESTIMATORS)) as advance:
        training = _time_training(cohort, plans, advance)
        attack = _time_attack(cohort, plans, advance)
    steps = len(cohort.members) * config.training.local_steps
    device = cohort.device
    return SpeedUp(
        training=ratio_interval(training["stochastic"], training["one_point"]),
        attack=ratio_interval(attack["stochastic"], attack["one_point"]),
        stochastic_step_seconds=median(training["stochastic"]) / steps,
        one_point_step_seconds=median(training["one_point"]) / steps,
        attack_steps=config.attack.attack_steps,
        num_noise_vectors=config.smoothing.num_noise_vectors,
        batch_size=cohort.members[0].batch_size(config.plan),
        model=config.model.name,
        precision=config.runtime.precision,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=cohort.threads,
        clients=len(cohort.members),
    )


def _time_training(
    cohort: ProbedCohort, plans: dict[str, TrainingPlan], advance: Callable[[str], None]
) -> Seconds:
    with ExitStack() as stack:
        # One each: a trainer keeps what it prepared for one plan, and a round would pay for the next.
        trainers = {
            estimator: stack.enter_context(closing(cohort.trainer())) for estimator in ESTIMATORS
        }

        def measure(estimator: str) -> float:
            seconds = cohort.seconds_of_round(trainers[estimator], plans[estimator], _ROUND)
            advance(f"{seconds:.2f} s of local training, {estimator}")
            return seconds

        return _in_turn(measure)


def _time_attack(
    cohort: ProbedCohort, plans: dict[str, TrainingPlan], advance: Callable[[str], None]
) -> Seconds:
    member, plan = cohort.members[0], plans["stochastic"]
    x, labels = member.data.batch(torch.arange(member.batch_size(plan)))
    _, noise_stream = training_streams(plan, _ROUND, member.client, cohort.device)
    noise = draw_noise(x, plan.smoothing.sigma, plan.smoothing.num_noise_vectors, noise_stream)
    classifier = InBfloat16(cohort.model) if cohort.limits.bf16 else cohort.model

    def seconds_of(estimator: str, repetitions: int) -> float:
        attack = plans[estimator].attack
        gradient = make_estimator(attack, plan.smoothing.sigma)
        started = now(cohort.device)
        for _ in range(repetitions):
            smoothadv_attack(classifier, x, labels, noise, gradient, attack)
        return now(cohort.device) - started

    with arithmetic(cohort.device, cohort.limits), _one_thread():
        repetitions = _enough(seconds_of)

        def measure(estimator: str) -> float:
            seconds = seconds_of(estimator, repetitions) / repetitions
            advance(f"{1000 * seconds:.1f} ms of the attack, {estimator}")
            return seconds

        return _in_turn(measure)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute as a client in training: more threads wait for each other wherever a core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _enough(seconds_of: Callable[[str, int], float]) -> int:
    """Return how often to repeat an attack, both estimators' alike, for a sample that is long enough."""
    for estimator in ESTIMATORS:
        seconds_of(estimator, 1)  # what a first call prepares is not the attack's
    repetitions = 1
    while min(seconds_of(estimator, repetitions) for estimator in ESTIMATORS) < _SAMPLE_SECONDS:
        repetitions *= 2
    return repetitions


def _in_turn(measure: Callable[[str], float]) -> Seconds:
    """Measure pairs, another estimator first in each of them, after a warm-up that does not count."""
    for estimator in ESTIMATORS:
        measure(estimator)
    seconds: Seconds = {estimator: [] for estimator in ESTIMATORS}
    for pair in range(_PAIRS):
        for estimator in ESTIMATORS if pair % 2 == 0 else reversed(ESTIMATORS):
            seconds[estimator].append(measure(estimator))
    return seconds
