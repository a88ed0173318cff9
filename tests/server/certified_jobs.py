"""Jobs with rows for tests of what the store's readers show: nothing is really certified."""

import hashlib
from collections.abc import Sequence

import numpy as np

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.models import ModelSpec
from server.certification.jobs import Job, JobTerms, Submission
from server.certification.store import JobStore

CLASSES = tuple("0123456789")


def rows(num: int, seed: int = 0, n: int | None = None) -> list[CertifiedRow]:
    """Certificates of ``num`` images, in no order of their indices: most are correct, some abstain."""
    random = np.random.default_rng(seed)
    made = []
    for i in random.permutation(num).tolist():
        label = i % 10
        predict = int(random.choice([label, label, label, label, (label + 1) % 10, -1]))
        radius = 0.0 if predict < 0 else float(random.uniform(0, 0.9))
        made.append(CertifiedRow(i, label, predict, radius, int(predict == label), 0.5, n))
    return made


def add_job(
    store: JobStore,
    run: str = "",
    number: int = 0,
    certified: Sequence[CertifiedRow] = (),
    *,
    num_images: int | None = None,
    weights: str | None = None,
    class_names: tuple[str, ...] = CLASSES,
    **procedure: object,
) -> Job:
    """Submit a model of a run's round, with rows: it is done if they are as many as its images."""
    num_images = num_images or len(certified) or 10
    job = Job(
        ModelSpec("small_cnn", "he", 10, 1, 8, 8),
        JobTerms("digits", Procedure(**procedure), num_images=num_images),
        weights or hashlib.sha256(f"{run} {number}".encode()).hexdigest(),
        "f" * 64,
        class_names,
        "cpu",
        num_images,
    )
    job = store.submit(job, b"weights", Submission(run, number), max_queued=10_000)
    if certified:
        store.start(job.key)
        store.append(job.key, certified)
    return store.get(job.key) or job
