"""Every setting of a run, as frozen dataclasses that refuse what cannot work.

A section's fields say their type, default and allowed values; one checker turns a violation into one
sentence that names the key, the value and what is allowed. The server composes a :class:`RunConfig`
once; its :class:`TrainingPlan` is what a client needs and travels, flat, with every train message.

Units: images are in [0, 1], so ``sigma``, ``epsilon`` and radii are l2 lengths in [0, 1] pixel units.
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from fedsmooth_core.errors import ConfigError
from fedsmooth_core.limits import ENGINES

Scalar = str | int | float | bool
T = TypeVar("T")


class Allowed(NamedTuple):
    """A set of values: how to say it, and how to test it."""

    text: str
    test: Callable[[Any], bool]


def at_least(low: float) -> Allowed:
    return Allowed(f"a number >= {low}", lambda value: value >= low)


def above(low: float) -> Allowed:
    return Allowed(f"a number > {low}", lambda value: value > low)


def within(low: float, high: float) -> Allowed:
    return Allowed(f"a number in [{low}, {high}]", lambda value: low <= value <= high)


def above_up_to(low: float, high: float) -> Allowed:
    return Allowed(f"a number in ({low}, {high}]", lambda value: low < value <= high)


def from_below(low: float, high: float) -> Allowed:
    return Allowed(f"a number in [{low}, {high})", lambda value: low <= value < high)


def strictly_between(low: float, high: float) -> Allowed:
    return Allowed(f"a number in ({low}, {high})", lambda value: low < value < high)


def one_of(*options: str) -> Allowed:
    return Allowed("one of " + ", ".join(options), lambda value: value in options)


_MOST_DEVICE_RADII = 1000

FILE_NAME = Allowed(
    "a name of letters, digits, dots, dashes and underscores",
    lambda value: re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", value) is not None,
)


HOST_AND_PORT = Allowed(
    "HOST:PORT with a port in 1 to 65535, e.g. 127.0.0.1:9464",
    lambda value: (
        re.fullmatch(r".+:\d{1,5}", value) is not None and 0 < int(value.rpartition(":")[2]) < 2**16
    ),
)


def setting(default: T, allowed: Allowed) -> T:
    """Declare a field with its default and the values it allows (None is always tested apart)."""
    value: T = field(default=default, metadata={"allowed": allowed})
    return value


def _type_name(hint: Any) -> str:
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return " or ".join("null" if option is type(None) else names[option] for option in options)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


class Section:
    """Base of every group of settings: checks types and allowed values when it is made."""

    def __post_init__(self) -> None:
        prefix = _prefix(type(self))
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            hint = hints[item.name]
            if isinstance(hint, type) and issubclass(hint, Section):
                continue
            value = getattr(self, item.name)
            key = f"{prefix}{item.name}"
            if not _fits(value, hint):
                raise ConfigError(
                    f"{key}={value!r} has the wrong type: allowed is {_type_name(hint)}."
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{key}={value!r} is not finite: allowed is a finite number.")
            allowed: Allowed | None = item.metadata.get("allowed")
            if value is not None and allowed is not None and not allowed.test(value):
                raise ConfigError(f"{key}={value!r} is out of range: allowed is {allowed.text}.")
            if float in (hint, *get_args(hint)) and isinstance(value, int):
                object.__setattr__(self, item.name, float(value))


def _prefix(cls: type) -> str:
    name = getattr(cls, "SECTION", "")
    return f"{name}." if name else ""


@dataclass(frozen=True)
class DatasetConfig(Section):
    """Which images, where they are, and how training images are augmented."""

    SECTION = "dataset"
    name: str = "digits"
    """Which data set."""
    root: str = "~/.cache/fedsmooth"
    """Folder of the data set's files (``imagefolder``: what holds train/<class>/*, test/<class>/*)."""
    image_size: int | None = setting(None, at_least(1))
    """Side in pixels that ``imagefolder`` images are resized to; null keeps their one native size."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    crop_padding: int = setting(0, at_least(0))
    """Crop each training image at random after padding it with this many black pixels a side."""


@dataclass(frozen=True)
class PartitionConfig(Section):
    """Who holds which training samples (the paper's section on data heterogeneity)."""

    SECTION = "partition"
    scheme: str = setting("major_class", one_of("major_class", "iid", "dirichlet"))
    """How training samples are dealt to clients."""
    num_clients: int = setting(10, within(1, 1_000_000))
    """Clients of the federation."""
    samples_per_client: int | None = setting(None, at_least(1))
    """Distinct samples a client holds; null divides the training set's size by ``num_clients``."""
    gamma: float = setting(0.1, within(0, 1))
    """Share of a client's samples from its one major class (``major_class``)."""
    concentration: float = setting(0.5, above(0))
    """Dirichlet concentration (``dirichlet``): small is heterogeneous, large is like iid."""


@dataclass(frozen=True)
class ModelConfig(Section):
    """Architecture (a name of the model registry) and how its weights start."""

    SECTION = "model"
    name: str = "small_cnn"
    """Architecture."""
    init: str = setting("he", one_of("he", "default"))
    """Initial weights: He et al. (2015), or PyTorch's own."""


@dataclass(frozen=True)
class SmoothingConfig(Section):
    """Gaussian smoothing in training: d ~ N(0, sigma^2 I), m draws an image (eq. 1)."""

    SECTION = "smoothing"
    sigma: float = setting(0.25, at_least(0))
    """Noise level in training; 0 trains without noise."""
    num_noise_vectors: int = setting(2, at_least(1))
    """m, the noise draws for each image of a mini-batch."""


@dataclass(frozen=True)
class AttackConfig(Section):
    """The inner maximisation of SmoothAdv: T projected steps in the l2 ball of radius epsilon."""

    SECTION = "attack"
    attack_steps: int = setting(2, at_least(0))
    """T; 0 trains without the attack."""
    step_rule: str = setting("gradient", one_of("gradient", "normalized"))
    """``gradient``: step_size times g. ``normalized``: step_size times g / norm of g."""
    step_size: float | None = setting(0.01, above(0))
    """``gradient``: factor of the gradient (the paper's inner learning rate). ``normalized``: l2 length
    of a step in [0, 1] pixel units; null takes 2 * epsilon / attack_steps, as in Salman et al."""
    epsilon: float | None = setting(None, at_least(0))
    """l2 budget in [0, 1] pixel units. Give this or ``epsilon_255``, never both."""
    epsilon_255: float | None = setting(128.0, at_least(0))
    """l2 budget in units of 1/255: 128 means 128/255."""
    warmup_rounds: int = setting(0, at_least(0))
    """Rounds in which the budget grows in equal steps to its full size, as in Salman et al.; a step_size of
    null grows with it. 0 has it whole from the first round."""
    estimator: str = setting("stochastic", one_of("stochastic", "one_point"))
    """Eq. 3 (back-propagation) or eq. 4 (forward passes alone)."""
    variance_reduction: str = setting("none", one_of("none", "antithetic", "leave_one_out"))
    """For ``one_point`` alone; both keep the estimate unbiased."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.epsilon is None) == (self.epsilon_255 is None):
            raise ConfigError(
                f"attack.epsilon={self.epsilon} and attack.epsilon_255={self.epsilon_255}: exactly one "
                "must be a number and the other null, e.g. attack.epsilon_255=128 attack.epsilon=null."
            )
        if self.epsilon is not None and self.epsilon >= 16:
            raise ConfigError(
                f"attack.epsilon={self.epsilon} is in [0, 1] pixel units, where 16 and more is no small "
                "perturbation: for 1/255 units set attack.epsilon_255 and attack.epsilon=null."
            )
        if self.epsilon_255 is not None and 0 < self.epsilon_255 < 1:
            raise ConfigError(
                f"attack.epsilon_255={self.epsilon_255} is in units of 1/255, where less than 1 is below "
                "one grey level: for [0, 1] units set attack.epsilon and attack.epsilon_255=null."
            )
        if self.step_size is None and self.step_rule != "normalized":
            raise ConfigError(
                "attack.step_size=null means 2 * epsilon / attack_steps, the length of a normalized "
                "step: set a number, or attack.step_rule=normalized."
            )
        if self.variance_reduction != "none" and self.estimator != "one_point":
            raise ConfigError(
                f"attack.variance_reduction={self.variance_reduction!r} belongs to the one-point "
                "estimator: set attack.estimator=one_point or attack.variance_reduction=none."
            )

    def in_round(self, server_round: int) -> "AttackConfig":
        """Return the attack of one round (>= 1), its budget as far as it has grown."""
        if server_round >= self.warmup_rounds:
            return dataclasses.replace(self, warmup_rounds=0)
        grown = self.l2_budget * server_round / self.warmup_rounds
        return dataclasses.replace(self, epsilon=grown, epsilon_255=None, warmup_rounds=0)

    @property
    def step(self) -> float:
        """Step size of the configured rule, with null resolved (attack_steps >= 1)."""
        if self.step_size is not None:
            return self.step_size
        return 2 * self.l2_budget / self.attack_steps

    @property
    def l2_budget(self) -> float:
        """The paper's epsilon, in [0, 1] pixel units."""
        if self.epsilon is not None:
            return self.epsilon
        assert self.epsilon_255 is not None
        return self.epsilon_255 / 255


@dataclass(frozen=True)
class TrainingConfig(Section):
    """LocalTrain: E mini-batches of B samples, SGD; momentum restarts every round."""

    SECTION = "training"
    local_steps: int = setting(20, at_least(1))
    """E, the mini-batches of a client's round."""
    batch_size: int = setting(30, at_least(1))
    """B. A client with fewer samples takes all of them."""
    learning_rate: float = setting(0.01, above(0))
    """Of SGD."""
    momentum: float = setting(0.9, from_below(0, 1))
    """Of SGD."""
    weight_decay: float = setting(0.0, at_least(0))
    """Of SGD."""
    loss: str = setting("smoothed", one_of("smoothed", "cross_entropy"))
    """``smoothed``: eq. 2. ``cross_entropy``: its mean over the noisy copies."""


@dataclass(frozen=True)
class FederationConfig(Section):
    """The server's side: rounds, cohorts, what a round needs, and who is left out of it."""

    SECTION = "federation"
    num_rounds: int = setting(30, at_least(1))
    """Rounds of the run."""
    cohort_fraction: float = setting(0.5, above_up_to(0, 1))
    """Share of the clients sampled in a round (at least one client)."""
    over_selection: float = setting(0.0, within(0, 10))
    """Clients sampled beyond the cohort, as a share of it, in place of those that fail. The round then
    takes the replies that come first, so its model depends on who is fast."""
    quorum: float = setting(0.5, above_up_to(0, 1))
    """Share of the cohort whose good replies a round needs (at least one); with fewer it is tried again."""
    deadline_seconds: float = setting(600.0, above(0))
    """A client that has not answered by then is left out of the attempt."""
    attempts: int = setting(3, at_least(1))
    """How often a round is tried, each time with a new cohort, before it is over with the old model."""
    strikes: int = setting(3, at_least(1))
    """Rounds with a refused reply, silence included, after which a client is left out for a while."""
    suspension_rounds: int = setting(10, at_least(0))
    """How many rounds it is left out for."""
    checkpoint_every: int = setting(1, at_least(1))
    """Rounds between two checkpoints; a resumed run repeats the rounds after its last one."""
    max_num_examples: int | None = setting(None, at_least(1))
    """A reply that claims more training samples than this is refused, for one client could outweigh all
    others; null takes the size of the server's own training set."""
    connect_timeout_seconds: float = setting(300.0, above(0))
    """How long the server waits for all of ``partition.num_clients`` before the first round (then it goes
    on with a quorum), and for a quorum before any round (then the run ends, and can be resumed). A resumed
    run waits for as many as there were, for 75 s at most."""

    def most_examples(self, num_samples: int) -> int:
        """Return what a reply may claim at most, given the size of the server's training set."""
        return self.max_num_examples or num_samples


@dataclass(frozen=True)
class AggregationConfig(Section):
    """How the replies of a round become the new model, and what one client may do to it."""

    SECTION = "aggregation"
    rule: str = setting("fedavg", one_of("fedavg", "median", "trimmed_mean", "krum"))
    """``fedavg``: the sample-weighted mean. The others are Flower's, for cohorts with clients that lie;
    median and trimmed mean weigh all clients alike, Krum takes one client's model."""
    max_update_norm: float | None = setting(None, above(0))
    """l2 norm that a client's update is clipped to before anything is averaged; null clips nothing."""
    trimmed_fraction: float = setting(0.2, from_below(0, 0.5))
    """Share of the replies that the trimmed mean drops at either end, in each coordinate."""
    num_malicious: int = setting(1, at_least(0))
    """f, the lying clients of a cohort that Krum is to withstand; it needs 2 f + 3 replies."""

    @property
    def num_needed(self) -> int:
        """Replies without which the rule withstands nobody."""
        match self.rule:
            case "median":
                return 3
            case "trimmed_mean":  # one at either end must be dropped
                return math.ceil(1 / self.trimmed_fraction) if self.trimmed_fraction else 1
            case "krum":
                return 2 * self.num_malicious + 3
        return 1


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """Clean and noisy test accuracy of the global model, on the server."""

    SECTION = "evaluation"
    every: int = setting(5, at_least(0))
    """Rounds between two evaluations; 0 evaluates at the end alone."""
    batch_size: int = setting(500, at_least(1))
    """Test images in one forward pass."""


@dataclass(frozen=True)
class CertificationConfig(Section):
    """CERTIFY (Cohen et al. 2019): n0 draws select a class, n fresh draws bound its probability."""

    SECTION = "certification"
    method: str = setting("fixed", one_of("fixed", "sequential"))
    """``fixed``: n draws for every image. ``sequential``: as many as it takes to decide its certified
    radius on the grid of ``radius_step``, at most n, at the same alpha."""
    at_end: bool = True
    """Certify the final model as the last part of a run."""
    every: int = setting(0, at_least(0))
    """Rounds between two models that are certified while training goes on, by the certification service
    (``service.address``); 0 leaves the final model alone."""
    sigma: float | None = setting(None, above(0))
    """Noise level of the certified classifier; null takes ``smoothing.sigma``."""
    n0: int = setting(100, at_least(1))
    """Draws that select a class."""
    n: int = setting(100_000, at_least(1))
    """Fresh draws that count that class; with ``sequential`` the most that an image may take."""
    alpha: float = setting(0.001, strictly_between(0, 1))
    """Failure probability of each image's certificate."""
    precision: str = setting("float32", one_of("float32", "bfloat16"))
    """In which the model computes. A certificate is about the model in this precision: serve it so."""
    num_images: int | None = setting(None, at_least(1))
    """Test images to certify, evenly spaced (every k-th); null certifies all of them."""
    batch_size: int | None = setting(None, at_least(1))
    """Noisy images in one forward pass, on each device; null takes what is fast for the model. Changes the
    speed, never a certificate."""
    compile: bool = False
    """Try ``torch.compile`` (a CPU needs a C++ compiler) and keep it where it gains: stderr says so. It may
    round a score otherwise, so a count may differ by a draw."""
    radius_step: float = setting(0.25, above(0))
    """Grid step of the printed table; with ``sequential`` also of the radii that are decided."""


@dataclass(frozen=True)
class DeviceCertificationConfig(Section):
    """Federated certified accuracy: clients certify images of their own, and send counts alone."""

    SECTION = "device_certification"
    every: int = setting(0, at_least(0))
    """Rounds between two of them, the last one included; 0 never asks the clients."""
    num_images: int = setting(10, at_least(1))
    """Images that each sampled client certifies, evenly spaced among its own; fewer where it has fewer."""
    n0: int = setting(100, at_least(1))
    """Draws that select a class."""
    n: int = setting(1000, at_least(1))
    """Fresh draws that count that class."""
    alpha: float = setting(0.001, strictly_between(0, 1))
    """Failure probability of each image's certificate."""


@dataclass(frozen=True)
class ServiceConfig(Section):
    """The certification service that certifies for this run. Files are named by absolute paths where the
    ServerApp works in a directory of its own."""

    SECTION = "service"
    address: str | None = setting(None, HOST_AND_PORT)
    """Where it is, as HOST:PORT; null certifies on this machine."""
    dataset: str | None = setting(None, FILE_NAME)
    """Name under which the service knows the data set; null takes ``dataset.name``."""
    root_certificates: str | None = None
    """The authority (PEM file) that signed the service's certificate; null trusts the system's."""
    token_file: str | None = None
    """File with the bearer token."""
    client_certificate: str | None = None
    """This client's certificate (PEM file), where the service asks for one."""
    client_key: str | None = None
    """The private key of that certificate."""
    insecure: bool = False
    """Talk without TLS: for a service on this machine."""
    patience_seconds: float = setting(600.0, at_least(0))
    """How long the end of a run waits for a service that does not answer. What it then still owes can be
    collected later."""


@dataclass(frozen=True)
class RuntimeConfig(Section):
    """Facts of the machine that runs the server or the simulation; they change no result's meaning."""

    SECTION = "runtime"
    device: str = setting("auto", one_of("auto", "cpu", "cuda"))
    """``auto`` is CUDA where there is one. In a simulation the clients use it too."""
    threads: int | None = setting(None, at_least(1))
    """CPU threads of PyTorch; null leaves its default. A simulation on a CPU trains as many clients side by
    side, each in one thread, or in more where a cohort is smaller."""
    engine: str = setting("auto", one_of(*ENGINES))
    """How a simulation computes local training; the results agree to rounding. ``auto`` takes what is fast
    for device and model, ``plain`` is the algorithm's own loop."""
    precision: str = setting("float32", one_of("float32", "tf32", "bfloat16"))
    """In which a simulation's clients compute; weights and their updates stay float32. ``tf32`` is float32
    on a CPU."""
    metrics_address: str | None = setting(None, HOST_AND_PORT)
    """Where the server serves Prometheus metrics while it trains, as HOST:PORT; null serves none."""


@dataclass(frozen=True)
class TrainingPlan(Section):
    """What a client must know to train: federation-wide facts, sent by the server with each message."""

    seed: int = setting(0, within(0, 2**62))
    """The run's seed. Every random draw of the run follows from it."""
    dataset: DatasetConfig = DatasetConfig()
    partition: PartitionConfig = PartitionConfig()
    model: ModelConfig = ModelConfig()
    smoothing: SmoothingConfig = SmoothingConfig()
    attack: AttackConfig = AttackConfig()
    training: TrainingConfig = TrainingConfig()

    def in_round(self, server_round: int) -> "TrainingPlan":
        """Return the plan of one round (>= 1), in which nothing changes any more."""
        return dataclasses.replace(self, attack=self.attack.in_round(server_round))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack.attack_steps and self.attack.estimator == "one_point":
            if self.smoothing.sigma == 0:
                raise ConfigError(
                    "attack.estimator='one_point' divides by sigma^2, but smoothing.sigma=0: allowed is "
                    "smoothing.sigma > 0, attack.estimator=stochastic, or attack.attack_steps=0."
                )
            if (
                self.attack.variance_reduction == "leave_one_out"
                and self.smoothing.num_noise_vectors < 2
            ):
                raise ConfigError(
                    "attack.variance_reduction='leave_one_out' compares noise draws, but "
                    "smoothing.num_noise_vectors=1: allowed is smoothing.num_noise_vectors >= 2."
                )


@dataclass(frozen=True)
class RunConfig(TrainingPlan):
    """Everything about a run: the training plan, and what the server alone needs."""

    name: str = setting("run", FILE_NAME)
    """Part of the name of a new run directory. No result depends on it."""
    run_dir: str | None = None
    """Folder of everything the run leaves behind; null makes a new one under ``runs/``."""
    resume: bool = False
    """Continue the interrupted run in ``run_dir`` after its last checkpoint."""
    federation: FederationConfig = FederationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    certification: CertificationConfig = CertificationConfig()
    service: ServiceConfig = ServiceConfig()
    device_certification: DeviceCertificationConfig = DeviceCertificationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.run_dir is None:
            raise ConfigError("resume=true needs the run to continue: set run_dir=<its folder>.")
        if self.certification.at_end and not self.certified_sigma:
            raise ConfigError(
                "smoothing.sigma=0 leaves nothing to certify with: set certification.sigma > 0 "
                "or certification.at_end=false."
            )
        if self.certification.every and self.service.address is None:
            raise ConfigError(
                f"certification.every={self.certification.every} needs a certification service, for this "
                "machine certifies the final model alone: set service.address=HOST:PORT or "
                "certification.every=0."
            )
        if self.device_certification.every:
            self._check_device_radii()
        if self.cohort_size < self.aggregation.num_needed:
            raise ConfigError(
                f"aggregation.rule={self.aggregation.rule} withstands nobody with fewer than "
                f"{self.aggregation.num_needed} replies, but a cohort has {self.cohort_size} clients: "
                "raise federation.cohort_fraction or partition.num_clients."
            )

    def _check_device_radii(self) -> None:
        if not self.certified_sigma:
            raise ConfigError(
                "smoothing.sigma=0 leaves nothing to certify with: set certification.sigma > 0 "
                "or device_certification.every=0."
            )
        if self._largest_device_radius / self.certification.radius_step >= _MOST_DEVICE_RADII:
            raise ConfigError(
                f"certification.radius_step={self.certification.radius_step} makes more than "
                f"{_MOST_DEVICE_RADII} radii for the clients to count at: raise it, or set "
                "device_certification.every=0."
            )

    @property
    def device_radii(self) -> list[float]:
        """Where clients count certified images: the multiples of ``certification.radius_step``, from 0
        to the largest radius that ``device_certification.n`` draws can certify."""
        step = self.certification.radius_step
        # Rounded so that 3 steps of 0.1 read 0.3.
        return [round(i * step, 12) for i in range(int(self._largest_device_radius / step) + 1)]

    @property
    def _largest_device_radius(self) -> float:
        """sigma * Phi^-1(alpha^(1/n)): every one of the n draws was of the selected class."""
        terms = self.device_certification
        p_a = float(terms.alpha ** (1 / terms.n))
        return self.certified_sigma * NormalDist().inv_cdf(max(p_a, 0.5))

    @property
    def plan(self) -> TrainingPlan:
        """The part that clients receive."""
        return TrainingPlan(
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(TrainingPlan)}
        )

    @property
    def certified_sigma(self) -> float:
        """Noise level that the final model is certified with."""
        return self.certification.sigma or self.smoothing.sigma

    @property
    def cohort_size(self) -> int:
        """Clients sampled in a round: the fraction of all clients, at least one."""
        return max(1, round(self.federation.cohort_fraction * self.partition.num_clients))

    @property
    def quorum_size(self) -> int:
        """Good replies that a round needs: the quorum's share, and what the aggregation rule needs."""
        share = math.ceil(self.federation.quorum * self.cohort_size)
        return max(share, self.aggregation.num_needed)


SectionT = TypeVar("SectionT", bound=Section)


def from_nested(cls: type[SectionT], values: Mapping[str, Any], where: str = "") -> SectionT:
    """Build a section from nested mappings; what is absent keeps its default.

    Raises:
        ConfigError: for an unknown key (with the nearest known one), a wrong type or value.
    """
    hints = get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(unknown_key(f"{where}{key}", [f"{where}{name}" for name in names]))
        hint = hints[key]
        if isinstance(hint, type) and issubclass(hint, Section):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{where}{key}={value!r} has the wrong type: allowed is a group of settings."
                )
            value = from_nested(hint, value, f"{where}{key}.")
        arguments[key] = value
    return cls(**arguments)


def unknown_key(key: str, known: list[str]) -> str:
    """Say that a key is unknown, and which were meant or are allowed."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(known))}."
    return f"{key} is not a setting: {hint}"


def to_nested(section: Section) -> dict[str, Any]:
    """Return the settings as nested dicts of scalars and None: what a config file holds."""
    return dataclasses.asdict(section)  # type: ignore[call-overload,no-any-return]


def to_flat(section: Section, prefix: str = "") -> dict[str, Scalar]:
    """Return the settings as one flat dict of scalars under kebab-case keys; None is left out."""
    flat: dict[str, Scalar] = {}
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, item.name)
        key = prefix + item.name.replace("_", "-")
        if isinstance(value, Section):
            flat.update(to_flat(value, f"{key}."))
        elif value is not None:
            flat[key] = value
    return flat


def from_flat(cls: type[SectionT], flat: Mapping[str, Any]) -> SectionT:
    """Invert :func:`to_flat`: every setting must be there, but for those that may be None.

    Raises:
        ConfigError: for a missing or unknown key, a wrong type or value.
    """
    rest = dict(flat)
    section = _take(cls, rest, "")
    if rest:
        raise ConfigError(unknown_key(min(rest), sorted(to_flat(section))))
    return section


def _take(cls: type[SectionT], rest: dict[str, Any], prefix: str) -> SectionT:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = prefix + item.name.replace("_", "-")
        hint = hints[item.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            arguments[item.name] = _take(hint, rest, f"{key}.")
        elif key in rest:
            arguments[item.name] = rest.pop(key)
        elif _fits(None, hint):
            arguments[item.name] = None
        else:
            raise ConfigError(f"{key} is missing from the settings that were received.")
    return cls(**arguments)
