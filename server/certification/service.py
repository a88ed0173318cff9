"""The calls of certification.proto: what is asked is checked here, and answered by store and engine."""

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncIterator

import safetensors.torch
from torch import nn

from fedsmooth_core.certification.bounds import certified_radius, p_a_lower
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.data import ArrayDataset
from fedsmooth_core.errors import (
    CertificationError,
    CheckpointError,
    ConfigError,
    ServiceError,
    ServiceUnreachableError,
)
from fedsmooth_core.models import ModelSpec, check_buildable
from server.certification import certification_pb2 as pb
from server.certification.certification_pb2_grpc import CertificationServicer
from server.certification.datasets import Datasets
from server.certification.engine import Engine
from server.certification.feeds import MAX_RADII, Feeds, figures_of, unknown_job
from server.certification.guard import CALLER, Context
from server.certification.jobs import Job, JobTerms, Submission
from server.certification.limits import Limits
from server.certification.messages import (
    job_message,
    row_messages,
    spec_of,
    states_of,
    summary_message,
    terms_of,
)
from server.certification.models import read_model
from server.certification.online import Online
from server.certification.store import JobStore
from server.certification.uploads import Uploads

_log = logging.getLogger(__name__)

_ROWS_A_MESSAGE = 5000
_MOST_JOBS = 1000
_JOBS = 100
_LIST_BYTES = 8 << 20
"""Of an answer with jobs, about: a caller may take no more than 16 MiB."""


class Service(CertificationServicer):  # type: ignore[misc]
    """The servicer; made in the event loop that serves it. What blocks is done in threads."""

    def __init__(self, store: JobStore, engine: Engine, datasets: Datasets, limits: Limits) -> None:
        self._store = store
        self._engine = engine
        self._datasets = datasets
        self._limits = limits
        self._uploads = Uploads(limits)
        self._feeds = Feeds(store)
        self._online = Online(store, engine, limits)

    async def Submit(  # noqa: N802
        self, requests: AsyncIterator[pb.SubmitRequest], context: Context
    ) -> pb.Job:
        header = await self._uploads.header(requests)
        terms = terms_of(header.terms)
        submission = Submission(header.submission.run, header.submission.round)
        spec = _architecture(header.architecture)
        self._check_limits(spec, terms)
        # Before the upload: what can be refused for its header is not received at all.
        test_set = await self._test_set(terms)
        self._check_fit(spec, terms, test_set, header.dataset_fingerprint)
        if terms.num_images == len(test_set):
            # Said or not, these are the same rows, so the same job.
            terms = dataclasses.replace(terms, num_images=None)
        async with self._uploads.place():
            data = await self._uploads.content(requests, header.num_bytes)
            job = await asyncio.to_thread(self._accept, data, spec, terms, test_set, submission)
        return job_message(job)

    async def Get(self, request: pb.JobRequest, context: Context) -> pb.Job:  # noqa: N802
        return job_message(await self._job(request.key))

    async def List(  # noqa: N802
        self, request: pb.ListRequest, context: Context
    ) -> pb.ListResponse:
        return await asyncio.to_thread(self._list, request)

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.Progress]:
        seen = request.rows_seen
        async for now in self._feeds.follow(request.key):
            for message in now.messages(seen):
                yield message
            seen = max(seen, now.num_rows)

    async def Cancel(self, request: pb.JobRequest, context: Context) -> pb.Job:  # noqa: N802
        await self._job(request.key)
        job = await asyncio.to_thread(self._store.cancel, request.key)
        _log.info(
            "Job %s: %s by %s after %d images.", job.key, job.state, CALLER.get(), job.images_done
        )
        return job_message(job)

    async def Fetch(  # noqa: N802
        self, request: pb.JobRequest, context: Context
    ) -> AsyncIterator[pb.FetchResponse]:
        job = await self._job(request.key)
        rows = await asyncio.to_thread(self._store.rows, request.key)
        figures = await asyncio.to_thread(figures_of, job, rows)
        ordered = iter(row_messages(sorted(rows, key=lambda row: row.idx), job.terms.procedure))
        while part := list(itertools.islice(ordered, _ROWS_A_MESSAGE)):
            yield pb.FetchResponse(rows=part)
        yield pb.FetchResponse(
            job=job_message(job), summary=summary_message(figures, job.terms.procedure)
        )

    async def Predict(  # noqa: N802
        self, request: pb.PredictRequest, context: Context
    ) -> pb.PredictResponse:
        return await self._online.predict(request)

    async def Certify(  # noqa: N802
        self, request: pb.CertifyRequest, context: Context
    ) -> pb.CertifyResponse:
        return await self._online.certify(request)

    def _list(self, request: pb.ListRequest) -> pb.ListResponse:
        limit = min(request.limit or _JOBS, _MOST_JOBS)
        response, size = pb.ListResponse(), 0
        for job in self._store.jobs(request.run, states_of(request.states), limit):
            message = job_message(job)
            size += message.ByteSize()
            if size > _LIST_BYTES and response.jobs:
                break
            response.jobs.append(message)
        return response

    async def _test_set(self, terms: JobTerms) -> ArrayDataset:
        limits = self._limits
        found = self._datasets.ask(terms.dataset, terms.image_size, limits.max_image_sizes)
        try:
            async with asyncio.timeout(limits.opening_seconds):
                return await asyncio.wrap_future(found)
        except TimeoutError:
            raise ServiceUnreachableError(
                f"the images of {terms.dataset!r} are being opened for the first time: try again later.",
                "UNAVAILABLE",
            ) from None

    async def _job(self, key: str) -> Job:
        job = await asyncio.to_thread(self._store.get, key)
        if job is None:
            raise unknown_job(key)
        return job

    def _check_limits(self, spec: ModelSpec, terms: JobTerms) -> None:
        procedure, limits = terms.procedure, self._limits
        # Before the images are opened: they would be decoded at this size.
        side = terms.image_size
        if side is not None and (spec.height, spec.width) != (side, side):
            raise ServiceError(
                f"image_size={side} makes images that the model does not take: its own are "
                f"{spec.height}x{spec.width}.",
                "INVALID_ARGUMENT",
            )
        if side is not None and side > limits.max_image_size:
            raise ServiceError(
                f"image_size={side} is more than the {limits.max_image_size} that this service resizes "
                "images to: ask for less.",
                "RESOURCE_EXHAUSTED",
            )
        for name, value in (("n0", procedure.n0), ("n", procedure.n)):
            if value > limits.max_n:
                raise ServiceError(
                    f"{name}={value} draws are more than the {limits.max_n} that this service makes for an "
                    "image: ask for fewer.",
                    "RESOURCE_EXHAUSTED",
                )
        largest = certified_radius(
            p_a_lower(procedure.n, procedure.n, procedure.alpha), procedure.sigma
        )
        if not largest / procedure.radius_step < MAX_RADII - 2:
            raise ServiceError(
                f"radius_step={procedure.radius_step:g} is too small for radii up to {largest:.3g}: "
                f"allowed is a step that makes fewer than {MAX_RADII - 2} radii.",
                "INVALID_ARGUMENT",
            )

    def _check_fit(
        self, spec: ModelSpec, terms: JobTerms, test_set: ArrayDataset, fingerprint: str
    ) -> None:
        """Before a model is built: its sizes are those of images that are here, so not absurd."""
        info = test_set.info
        sizes = (spec.channels, spec.height, spec.width)
        if sizes != info.shape or spec.num_classes != info.num_classes:
            raise ServiceError(
                f"the model classifies images of (channels, height, width) {sizes} into {spec.num_classes} "
                f"classes, but {terms.dataset} has {info.shape} and {info.num_classes}: certify it on what "
                "it was trained for.",
                "INVALID_ARGUMENT",
            )
        if fingerprint not in ("", info.fingerprint):
            raise ServiceError(
                f"this service has other images under the name {terms.dataset!r} (fingerprint "
                f"{info.fingerprint[:12]}) than the submitter ({fingerprint[:12]}): give it "
                "the same data set, or certify elsewhere.",
                "FAILED_PRECONDITION",
            )
        try:
            num_images = len(subset_indices(len(test_set), terms.num_images))
        except CertificationError as error:
            raise ServiceError(str(error), "INVALID_ARGUMENT") from error
        if num_images > self._limits.max_images:
            raise ServiceError(
                f"{num_images} images are more than the {self._limits.max_images} that this service "
                "certifies in a job: ask for fewer.",
                "RESOURCE_EXHAUSTED",
            )

    def _check_submissions(self, known: Job | None, submission: Submission) -> None:
        most = self._limits.max_submissions
        if known and len(known.submissions) >= most and submission not in known.submissions:
            raise ServiceError(
                f"the job {known.key} was submitted for {most} models already, and this service notes no "
                "more: fetch it by its key.",
                "RESOURCE_EXHAUSTED",
            )

    def _accept(
        self,
        data: bytes,
        spec: ModelSpec,
        terms: JobTerms,
        test_set: ArrayDataset,
        submission: Submission,
    ) -> Job:
        weights, model = _read(data, spec)
        wanted = Job(
            spec=spec,
            terms=terms,
            weights=weights,
            fingerprint=test_set.info.fingerprint,
            class_names=test_set.info.class_names,
            device=self._engine.device.type,
            num_images=len(subset_indices(len(test_set), terms.num_images)),
        )
        self._check_submissions(self._store.get(wanted.key), submission)
        job = self._store.submit(
            wanted,
            # Written anew: nothing but its tensors is kept of a stranger's file.
            safetensors.torch.save(dict(model.state_dict())),
            submission,
            self._limits.max_queued,
        )
        of = f" of round {submission.round} of {submission.run}" if submission.run else ""
        _log.info(
            "Job %s: a %s%s for %d images of %s at sigma %g, from %s; it is %s.",
            job.key,
            spec.name,
            of,
            job.num_images,
            terms.dataset,
            terms.procedure.sigma,
            CALLER.get(),
            job.state,
        )
        return job


def _architecture(message: pb.Architecture) -> ModelSpec:
    try:
        spec = spec_of(message)
        check_buildable(spec)
    except ConfigError as error:
        # The caller knows no settings: to him they are the fields of Architecture.
        sentence = str(error).replace("model.", "architecture.")
        raise ServiceError(sentence, "INVALID_ARGUMENT") from error
    return spec


def _read(data: bytes, spec: ModelSpec) -> tuple[str, nn.Module]:
    try:
        return read_model(data, spec)
    except CheckpointError as error:
        # He has sent no checkpoint, and need not have this project.
        sentence = str(error).replace("the checkpoint's weights", "the weights")
        sentence = sentence.replace("its model", "the architecture")
        sentence = sentence.replace(
            "load it with the version that wrote it", "send exactly the tensors that it has"
        )
        raise ServiceError(sentence, "INVALID_ARGUMENT") from error
