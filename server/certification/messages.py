"""Between the messages of certification.proto and the project's own types, both ways."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.models import ModelSpec
from server.certification import certification_pb2 as pb
from server.certification.jobs import Job, JobState, JobTerms, Submission

# A model that comes with its weights is not initialised: any name that is known will do.
_INIT = "he"

_SUBMISSIONS = 100
"""As many of a job are written: each is a name that its submitter chose."""

_STATE = {
    JobState.QUEUED: pb.JOB_STATE_QUEUED,
    JobState.RUNNING: pb.JOB_STATE_RUNNING,
    JobState.DONE: pb.JOB_STATE_DONE,
    JobState.CANCELLED: pb.JOB_STATE_CANCELLED,
    JobState.SUPERSEDED: pb.JOB_STATE_SUPERSEDED,
    JobState.FAILED: pb.JOB_STATE_FAILED,
}
_STATE_OF = {message: state for state, message in _STATE.items()}


def architecture_message(spec: ModelSpec) -> pb.Architecture:
    """Write an architecture."""
    return pb.Architecture(
        name=spec.name,
        num_classes=spec.num_classes,
        channels=spec.channels,
        height=spec.height,
        width=spec.width,
    )


def spec_of(message: pb.Architecture) -> ModelSpec:
    """Read an architecture.

    Raises:
        ConfigError: for a size of 0.
    """
    return ModelSpec(
        message.name,
        _INIT,
        message.num_classes,
        message.channels,
        message.height,
        message.width,
    )


def terms_message(terms: JobTerms) -> pb.Terms:
    """Write a job's terms."""
    procedure = terms.procedure
    return pb.Terms(
        dataset=terms.dataset,
        image_size=terms.image_size,
        num_images=terms.num_images,
        sigma=procedure.sigma,
        n0=procedure.n0,
        n=procedure.n,
        alpha=procedure.alpha,
        method=procedure.method,
        radius_step=procedure.radius_step,
        seed=procedure.seed,
        precision=procedure.precision,
    )


def terms_of(message: pb.Terms) -> JobTerms:
    """Read a job's terms.

    Raises:
        ConfigError: for a value that is out of range.
    """
    return JobTerms(
        dataset=message.dataset,
        procedure=Procedure(
            sigma=message.sigma,
            n0=message.n0,
            n=message.n,
            alpha=message.alpha,
            method=message.method,
            radius_step=message.radius_step,
            seed=message.seed,
            precision=message.precision,
        ),
        image_size=message.image_size if message.HasField("image_size") else None,
        num_images=message.num_images if message.HasField("num_images") else None,
    )


def states_of(states: Collection[pb.JobState]) -> list[JobState]:
    """Read states.

    Raises:
        ConfigError: for a number that is none.
    """
    unknown = [state for state in states if state not in _STATE_OF]
    if unknown:
        raise ConfigError(
            f"states={unknown[0]} is no state of a job: see JobState for those that are."
        )
    return [_STATE_OF[state] for state in states]


def state_messages(states: Iterable[JobState]) -> list[pb.JobState]:
    """Write states."""
    return [_STATE[state] for state in states]


def job_message(job: Job) -> pb.Job:
    """Write a job: of very many submissions the first and the latest."""
    shown = job.submissions
    if len(shown) > _SUBMISSIONS:
        shown = (shown[0], *shown[1 - _SUBMISSIONS :])
    message = pb.Job(
        key=job.key,
        state=_STATE[job.state],
        problem=job.problem,
        architecture=architecture_message(job.spec),
        terms=terms_message(job.terms),
        weights_sha256=job.weights,
        dataset_fingerprint=job.fingerprint,
        class_names=job.class_names,
        device=job.device,
        num_images=job.num_images,
        images_done=job.images_done,
        submissions=[pb.Submission(run=one.run, round=one.round) for one in shown],
        submitted_at=_timestamp(job.submitted_at),
        seconds=job.seconds,
    )
    if job.ended_at is not None:
        message.ended_at.CopyFrom(_timestamp(job.ended_at))
    return message


def job_of(message: pb.Job) -> Job:
    """Read a job.

    Raises:
        ConfigError: when it is none of this version.
    """
    ended = _seconds(message.ended_at) if message.HasField("ended_at") else None
    return Job(
        spec=spec_of(message.architecture),
        terms=terms_of(message.terms),
        weights=message.weights_sha256,
        fingerprint=message.dataset_fingerprint,
        class_names=tuple(message.class_names),
        device=message.device,
        num_images=message.num_images,
        submissions=tuple(Submission(one.run, one.round) for one in message.submissions),
        state=_STATE_OF.get(message.state, JobState.FAILED),
        problem=message.problem,
        images_done=message.images_done,
        submitted_at=_seconds(message.submitted_at),
        ended_at=ended,
        seconds=message.seconds,
    )


def row_messages(rows: Iterable[CertifiedRow], procedure: Procedure) -> list[pb.Row]:
    """Write rows of a job with this procedure."""
    return [
        pb.Row(
            idx=row.idx,
            label=row.label,
            predict=row.predict,
            radius=row.radius,
            correct=bool(row.correct),
            n=row.n or procedure.n,
            seconds=row.time,
        )
        for row in rows
    ]


def rows_of(messages: Iterable[pb.Row], procedure: Procedure) -> list[CertifiedRow]:
    """Read rows of a job with this procedure: as local certification makes them."""
    return [
        CertifiedRow(
            idx=row.idx,
            label=row.label,
            predict=row.predict,
            radius=row.radius,
            correct=int(row.correct),
            time=row.seconds,
            n=None if procedure.method == "fixed" else row.n,
        )
        for row in messages
    ]


def summary_message(figures: Mapping[str, Any], procedure: Procedure) -> pb.Summary:
    """Write what :func:`fedsmooth_core.certification.analysis.summary` returns for a job's rows."""
    return pb.Summary(
        num_images=figures["num_images"],
        average_certified_radius=_number(figures["average_certified_radius"]),
        abstention_rate=_number(figures["abstention_rate"]),
        mean_n=figures.get("mean_n", procedure.n),
        certified_accuracy=[
            pb.CertifiedAccuracy(
                radius=one["radius"],
                accuracy=_number(one["accuracy"]),
                low=one["confidence_interval_95"][0],
                high=one["confidence_interval_95"][1],
            )
            for one in figures["certified_accuracy"]
        ],
    )


def summary_of(message: pb.Summary, procedure: Procedure) -> dict[str, Any]:
    """Read a summary, as :func:`fedsmooth_core.certification.analysis.summary` returns it."""
    is_fixed = procedure.method == "fixed" or not message.num_images
    return {
        "num_images": message.num_images,
        "average_certified_radius": _or_none(message.average_certified_radius),
        "abstention_rate": _or_none(message.abstention_rate),
        **({} if is_fixed else {"mean_n": message.mean_n}),
        "certified_accuracy": [
            {
                "radius": one.radius,
                "accuracy": _or_none(one.accuracy),
                "confidence_interval_95": [one.low, one.high],
            }
            for one in message.certified_accuracy
        ],
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _timestamp(seconds: float) -> Timestamp:
    # Apart: as nanoseconds since the epoch a float would lose its last digits.
    whole = math.floor(seconds)
    stamp = Timestamp()
    stamp.FromNanoseconds(whole * 10**9 + round((seconds - whole) * 1e9))
    return stamp


def _seconds(stamp: Timestamp) -> float:
    return stamp.seconds + stamp.nanos / 1e9
