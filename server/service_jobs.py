"""Between a run's files and the certification service's jobs: a checkpoint in, a file of rows out."""

import dataclasses
from pathlib import Path
from typing import Any

from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.certification.rows import Parameters, RowFile
from fedsmooth_core.checkpoint import Checkpoint, load_checkpoint, state_sha256
from fedsmooth_core.config import RunConfig, from_nested
from fedsmooth_core.errors import CheckpointError, ConfigError, ServiceError
from fedsmooth_core.models import ModelSpec
from server.certification.client import CertificationClient, Connection
from server.certification.jobs import Job, JobTerms, Submission
from server.owed import ROWS
from server.terms import procedure_of


def connection_of(config: RunConfig) -> Connection:
    """Return where a run's service is, and how to be let in.

    Raises:
        ConfigError: when the run has none.
    """
    service = config.service
    if service.address is None:
        raise ConfigError("The run has no certification service: set service.address=HOST:PORT.")

    def path(name: str | None) -> Path | None:
        return None if name is None else Path(name).expanduser()

    return Connection(
        service.address,
        path(service.root_certificates),
        path(service.token_file),
        path(service.client_certificate),
        path(service.client_key),
        service.insecure,
    )


def described(checkpoint: Checkpoint, path: Path) -> tuple[ModelSpec, str]:
    """Return a checkpoint's architecture, and the fingerprint of what it was trained on.

    Raises:
        CheckpointError: when it does not say; ``path`` is what the error calls it.
    """
    try:
        spec = from_nested(ModelSpec, checkpoint.metadata["model"])
        return spec, str(checkpoint.metadata["dataset"]["fingerprint"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} does not say what model of which data set it is: certify it with the version that "
            "wrote it."
        ) from error


def submit_checkpoint(
    client: CertificationClient, path: Path, config: RunConfig, submission: Submission | None = None
) -> Job:
    """Submit a checkpoint on the terms of its run's settings; return the job as it stands.

    Raises:
        CheckpointError: when the checkpoint is damaged or does not say what it is.
        ServiceError: as any call of the client, and when the answer is about another job.
    """
    checkpoint = load_checkpoint(path)
    spec, fingerprint = described(checkpoint, path)
    terms = JobTerms(
        dataset=config.service.dataset or config.dataset.name,
        procedure=procedure_of(config),
        image_size=config.dataset.image_size,
        num_images=config.certification.num_images,
    )
    job = client.submit(spec, terms, checkpoint.state, submission, fingerprint)
    # The service leaves the number out where it is that of all images.
    num_images = None if job.terms.num_images is None else terms.num_images
    counted = terms.num_images in (None, job.num_images)
    answered = dataclasses.replace(terms, num_images=num_images)
    if not counted or (job.weights, job.terms) != (state_sha256(checkpoint.state), answered):
        raise ServiceError(
            "the certification service answered with another job than was submitted: run the same "
            "version on both sides.",
            "FAILED_PRECONDITION",
        )
    return job


def write_rows(rows: list[CertifiedRow], job: Job, folder: Path) -> Parameters:
    """Put a job's rows into a folder as local certification would; return what they were certified with.

    Rows that are there already stay.

    Raises:
        CertificationError: when the folder holds rows with other parameters.
    """
    parameters = {
        "dataset": job.fingerprint,
        **job.terms.procedure.terms,
        "num_images": job.num_images,
        "device": job.device,
        "weights": job.weights,
    }
    with RowFile(folder / ROWS, parameters) as file:
        file.extend([row for row in rows if row.idx not in file.done])
    return parameters


def progress_note(figures: dict[str, Any], seconds_left: float | None) -> str:
    """Say how a job goes: certified accuracy at radius 0 with its interval, and what is left."""
    notes = []
    if figures["num_images"]:
        first = figures["certified_accuracy"][0]
        low, high = first["confidence_interval_95"]
        notes.append(
            f"certified accuracy at radius 0: {first['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
        )
    if seconds_left:
        notes.append(f"about {seconds_left:.0f} s left")
    return ", ".join(notes)
