"""What a certification job is: its terms, its key, its states."""

import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.config import (
    FILE_NAME,
    Allowed,
    Section,
    at_least,
    setting,
    to_nested,
    within,
)
from fedsmooth_core.models import ModelSpec


@dataclass(frozen=True)
class JobTerms(Section):
    """Which test images a job certifies, and how."""

    SECTION = "terms"
    dataset: str = field(metadata={"allowed": FILE_NAME})
    """A name that the service knows."""
    procedure: Procedure
    image_size: int | None = setting(None, at_least(1))
    """Side in pixels that the images of a folder are resized to."""
    num_images: int | None = setting(None, at_least(1))
    """Evenly spaced test images; None for all."""


class JobState(StrEnum):
    """Where a job stands. The last four have ended; submitting one of the last three queues it again."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is done for such a job."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


RUN_NAME = Allowed(
    "at most 200 characters that can be printed, and neither . nor ..",
    # Those two are no part of an address: browsers take them for folders.
    lambda value: len(value) <= 200 and value.isprintable() and value not in (".", ".."),
)


@dataclass(frozen=True)
class Submission(Section):
    """Which model of a federation was submitted; an empty run is none."""

    SECTION = "submission"
    run: str = setting("", RUN_NAME)
    """Name of the run."""
    round: int = setting(0, within(0, 2**32 - 1))
    """Rounds of training behind the model."""


@dataclass(frozen=True)
class Job:
    """A job as it stands."""

    spec: ModelSpec
    terms: JobTerms
    weights: str
    """SHA-256 of the state (:func:`fedsmooth_core.checkpoint.state_sha256`)."""
    fingerprint: str
    """Of the data set."""
    class_names: tuple[str, ...]
    device: str
    """``cpu`` or ``cuda``: they draw different noise from one seed, so a job stays on one kind."""
    num_images: int
    submissions: tuple[Submission, ...] = ()
    """Oldest first."""
    state: JobState = JobState.QUEUED
    problem: str = ""
    """Why it failed."""
    images_done: int = 0
    submitted_at: float = 0.0
    """Seconds since the epoch, of the first submission."""
    ended_at: float | None = None
    seconds: float = 0.0
    """On the device so far."""

    @property
    def key(self) -> str:
        """Hash of all that determines the rows, as 64 hexadecimal digits: equal jobs are one job."""
        spec = to_nested(self.spec)
        # Weights that are given need no initialisation.
        del spec["init"]
        facts = [self.weights, spec, self.fingerprint, to_nested(self.terms), self.device]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
