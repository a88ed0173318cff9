"""Examine a device before it joins: its facts, its images, its accelerator, its server.

Every check ends in one sentence: what was found, or what is wrong and what to do about it.
"""

import contextlib
import os
import resource
import ssl
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec

from client.connection import (
    Address,
    check_certificate,
    check_enrolled,
    check_key,
    check_reachable,
    tls_context,
)
from client.local_data import images_to_certify, local_data
from client.node import NodeFacts
from fedsmooth_core import wire
from fedsmooth_core.cohort import CohortTrainer, Member
from fedsmooth_core.config import TrainingPlan
from fedsmooth_core.data import ClientData, folder_problems
from fedsmooth_core.errors import ConfigError, DataError, FedSmoothError
from fedsmooth_core.invitation import Invitation
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.models import ModelSpec, build_model

_TIMED_STEPS = 3
_GIB = 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class Questions:
    """What the person at the device gave to examine."""

    federation: Path
    """The joining kit's federation.json."""
    node_config: str = ""
    """As for Flower's SuperNode."""
    server: str | None = None
    """HOST:PORT; None leaves the connection out."""
    root_certificates: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    sound: bool
    sentence: str


Watch = Callable[[str], AbstractContextManager[object]]
"""Shows what is being done, for as long as it takes."""


class Examination:
    """The checks of one device, in an order in which the later ones use what the earlier ones found."""

    def __init__(self, questions: Questions, watch: Watch) -> None:
        self._questions = questions
        self._watch = watch
        self.findings: list[Finding] = []

    def run(self) -> list[Finding]:
        """Make all checks that can be made."""
        invitation = self._check("federation", self._invitation)
        facts = self._check("node configuration", lambda: self._facts(invitation))
        if facts is not None:
            device = self._check("device", lambda: self._device(facts))
            if invitation is not None and device is not None:
                data = self._check("images", lambda: self._images(invitation, facts, device))
                self._check("local step", lambda: self._step(invitation, facts, device, data))
        self._connection()
        return self.findings

    def _check(self, check: str, function: Callable[[], T]) -> T | None:
        """Make one check; no error of any kind ends the examination."""
        try:
            return function()
        except FedSmoothError as error:
            self._problem(check, str(error))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._problem(
                check,
                f"This could not be checked ({reason[:300]}): tell the operator of the federation.",
            )
        return None

    def _sound(self, check: str, sentence: str) -> None:
        self.findings.append(Finding(check, True, sentence))

    def _problem(self, check: str, sentence: str) -> None:
        self.findings.append(Finding(check, False, sentence))

    def _invitation(self) -> Invitation:
        invitation = Invitation.read(self._questions.federation)
        spec = invitation.spec
        self._sound(
            "federation",
            f"Model {spec.name}, images of {spec.width}x{spec.height} pixels and "
            f"{_counted(spec.channels, 'channel')}, "
            f"{len(invitation.class_names)} classes.",
        )
        return invitation

    def _facts(self, invitation: Invitation | None) -> NodeFacts:
        facts = NodeFacts.parse(self._questions.node_config)
        for key, path in (
            (wire.DATA_PATH, facts.data_path),
            (wire.DATASET_ROOT, facts.dataset_root),
        ):
            if path is not None and not Path(path).expanduser().is_absolute():
                raise ConfigError(
                    f"{key}={path!r} depends on the folder that a program is started in: give a path from "
                    "the root, beginning with /."
                )
        clients = invitation.plan.partition.num_clients if invitation is not None else None
        if facts.partition is not None and clients is not None and facts.partition[1] != clients:
            raise ConfigError(
                f"{wire.NUM_PARTITIONS}={facts.partition[1]} in the node configuration, but the federation "
                f"divides its data set into {clients} parts: set {wire.NUM_PARTITIONS}={clients}, and "
                f"{wire.PARTITION_ID} to the number that the operator gave this device, 0 to {clients - 1}."
            )
        if facts.data_path is not None:
            source = f"images of its own in {facts.data_path}"
        elif facts.partition is not None:
            source = f"partition {facts.partition[0]} of {facts.partition[1]} of the federation's data set"
        else:
            source = "a partition of the federation's data set, whose number the server hands out"
        self._sound("node configuration", f"It trains on {source}.")
        return facts

    def _device(self, facts: NodeFacts) -> torch.device:
        device = facts.prepare()
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            name, memory = torch.cuda.get_device_name(device), (free, total)
        else:
            name, memory = f"CPU, {_counted(torch.get_num_threads(), 'thread')}", _memory()
        self._sound(
            "device",
            f"{name}, {memory[0] / _GIB:.1f} of {memory[1] / _GIB:.1f} GiB memory free, PyTorch "
            f"{torch.__version__}.",
        )
        return device

    def _images(
        self, invitation: Invitation, facts: NodeFacts, device: torch.device
    ) -> ClientData | None:
        plan, spec, names = invitation.plan, invitation.spec, invitation.class_names

        try:
            with self._watch("Reading the images ..."):
                data = local_data(facts, plan, spec, names, 0, device)
                if facts.data_path is not None:  # its test/, if any, may be asked for as well
                    images_to_certify(facts, plan, spec, names, 0, 1, device)
        except DataError as error:
            problems = []
            if facts.data_path is not None:
                with self._watch("Looking at every image ..."):
                    shape = (spec.channels, spec.height, spec.width)
                    size = plan.dataset.image_size
                    problems = folder_problems(facts.data_path, size, names, shape)
            for problem in problems or [str(error)]:
                self._problem("images", problem)
            return None
        counts = np.bincount(data.labels.cpu().numpy(), minlength=len(names))
        listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        number, cap = _counted(len(data), "image"), invitation.max_num_examples
        if len(data) > cap:
            self._problem(
                "images",
                f"{number} can be used, but the server refuses a device with more than {cap}: ask the "
                f"operator to set federation.max_num_examples={len(data)} or more, or use fewer images.",
            )
        else:
            self._sound("images", f"{number} can be used; by class: {listed}.")
        return data

    def _step(
        self,
        invitation: Invitation,
        facts: NodeFacts,
        device: torch.device,
        data: ClientData | None,
    ) -> None:
        """Time steps of the configured training; without usable images, on images of noise."""
        plan, spec = invitation.plan, invitation.spec
        used = data or _noise_images(spec, plan.training.batch_size, device)
        statistics_of = [0.5] * spec.channels
        model = build_model(spec, statistics_of, statistics_of, torch.Generator()).to(device)
        one_step = replace(plan, training=replace(plan.training, local_steps=1))

        state, members = dict(model.state_dict()), [Member(0, used)]
        trainers = {facts.limits: CohortTrainer(device, facts.engine, facts.limits)}

        def seconds(limits: DeviceLimits = facts.limits) -> float:
            if limits not in trainers:
                trainers[limits] = CohortTrainer(device, limits=limits)
            ((_, outcome),) = trainers[limits].train(model, state, members, one_step, 1)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome.seconds  # up to a copy to the host

        try:
            with self._watch("Training one step to warm up ..."):
                seconds()
            times = []
            for number in range(1, _TIMED_STEPS + 1):
                with self._watch(f"Timing a local step ({number} of {_TIMED_STEPS}) ..."):
                    times.append(seconds())
        except torch.OutOfMemoryError:
            raise ConfigError(_what_fits(seconds, plan, facts)) from None
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"PyTorch cannot train on {device} ({reason}): install the build of PyTorch that is made "
                f'for this device, or set {wire.DEVICE}="cpu".'
            ) from error
        step, steps = statistics.median(times), plan.training.local_steps
        self._sound(
            "local step",
            f"{step:.3g} s (median of {_TIMED_STEPS}), so about {step * steps:.3g} s for the "
            f"{_counted(steps, 'step')} of a round; {_peak(device) / _GIB:.2f} GiB of memory at most.",
        )

    def _connection(self) -> None:
        questions = self._questions
        key = None
        if questions.key is not None:
            path = questions.key
            key = self._check("key", lambda: check_key(path))
            if key is not None:
                self._sound("key", f"{path} is of the right kind and for this user alone.")
        if questions.server is None:
            return
        if questions.key is None:
            self._problem(
                "key",
                "No key was given, and a server takes enrolled devices alone: have this device's key "
                "enrolled, and give it with --key.",
            )
        text = questions.server
        with self._watch(f"Asking {text} ..."):
            address = self._check("server", lambda: self._reach(Address.parse(text)))
            if address is None:
                return
            context = self._check("certificate", lambda: self._verify(address))
            if context is not None and key is not None:
                self._check("enrolment", lambda: self._known(address, context, key))

    def _reach(self, address: Address) -> Address:
        self._sound("server", check_reachable(address))
        return address

    def _verify(self, address: Address) -> ssl.SSLContext:
        context = tls_context(self._questions.root_certificates)
        self._sound("certificate", check_certificate(address, context))
        return context

    def _known(
        self, address: Address, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey
    ) -> None:
        self._sound("enrolment", check_enrolled(address, context, key))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _noise_images(spec: ModelSpec, count: int, device: torch.device) -> ClientData:
    random = torch.Generator().manual_seed(0)
    shape = (count, spec.channels, spec.height, spec.width)
    images = torch.randint(256, shape, generator=random, dtype=torch.uint8)
    labels = torch.randint(spec.num_classes, (count,), generator=random)
    return ClientData(images.to(device), labels.to(device), 255)


def _what_fits(
    seconds: Callable[[DeviceLimits], float], plan: TrainingPlan, facts: NodeFacts
) -> str:
    """Halve what goes through the model at once until a step gets through."""
    copies = plan.smoothing.num_noise_vectors if plan.smoothing.sigma > 0 else 1
    size = facts.limits.max_batch or plan.training.batch_size * copies
    while (size := size // 2) >= copies:
        with contextlib.suppress(torch.OutOfMemoryError):
            seconds(replace(facts.limits, max_batch=size))
            return (
                f"The accelerator's memory is too small for a whole mini-batch: set {wire.MAX_BATCH}="
                f"{size} in the node configuration."
            )
    return f'The accelerator\'s memory is too small for this model: set {wire.DEVICE}="cpu".'


def _memory() -> tuple[int, int]:
    """Return (free, all) bytes of main memory; what programs cached counts as free where Linux tells."""
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = (
            next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        )
    return free, total


def _peak(device: torch.device) -> int:
    """Return the most memory this process had, in bytes: the accelerator's, or else main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
