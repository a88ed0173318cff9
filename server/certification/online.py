"""The smoothed classifier put to use: PREDICT and CERTIFY for images that a caller sends."""

import asyncio
import math
import secrets
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedsmooth_core.certification.bounds import ABSTAIN, check_alpha, check_sigma
from fedsmooth_core.certification.certify import certify
from fedsmooth_core.certification.predict import predict
from fedsmooth_core.errors import CertificationError, ServiceError, ServiceUnreachableError
from server.certification import certification_pb2 as pb
from server.certification.engine import Engine
from server.certification.guard import ANYBODY, CALLER
from server.certification.jobs import Job
from server.certification.limits import Limits
from server.certification.store import JobStore

T = TypeVar("T")

_MAX_SEED = 2**62

_AT_A_TIME = 2
"""Calls that compute: they share the device pass by pass with each other and with the jobs."""


class _Share:
    """What one caller has of the places: half of them, so that others find one whatever it asks."""

    def __init__(self, places: int, at_a_time: int) -> None:
        self.places = places
        self.taken = 0
        self.computing = asyncio.Semaphore(at_a_time)


class Online:
    """Answers calls of Predict and Certify; a caller that has gone is computed for no longer."""

    def __init__(self, store: JobStore, engine: Engine, limits: Limits) -> None:
        self._store = store
        self._engine = engine
        self._limits = limits
        self._waiting = 0
        self._computing = asyncio.Semaphore(_AT_A_TIME)
        self._shares: dict[str, _Share] = {}

    async def predict(self, request: pb.PredictRequest) -> pb.PredictResponse:
        """Answer with PREDICT of Cohen et al.

        Raises:
            FedSmoothError: when the request cannot be answered.
        """
        job, sigma, seed, images = await self._question(request)
        self._check(sigma, request.alpha, {"n": request.n}, len(images))

        def work(model: nn.Module) -> list[int]:
            labels = predict(
                model,
                images,
                range(len(images)),
                max_value=255,
                sigma=sigma,
                n=request.n,
                alpha=request.alpha,
                seed=seed,
                batch_size=self._engine.batch_size,
                device=self._engine.device,
            )
            return [int(label) for label in labels]

        labels = await self._compute(job, work)
        return pb.PredictResponse(
            predictions=[
                pb.Prediction(label=label, class_name=_name(job, label)) for label in labels
            ],
            sigma=sigma,
            n=request.n,
            alpha=request.alpha,
            weights_sha256=job.weights,
        )

    async def certify(self, request: pb.CertifyRequest) -> pb.CertifyResponse:
        """Answer with CERTIFY of Cohen et al.

        Raises:
            FedSmoothError: when the request cannot be answered.
        """
        job, sigma, seed, images = await self._question(request)
        self._check(sigma, request.alpha, {"n0": request.n0, "n": request.n}, len(images))

        def work(model: nn.Module) -> list[tuple[int, float]]:
            rows = certify(
                model,
                images,
                torch.full((len(images),), ABSTAIN),  # nobody knows their true classes
                range(len(images)),
                max_value=255,
                sigma=sigma,
                n0=request.n0,
                n=request.n,
                alpha=request.alpha,
                seed=seed,
                batch_size=self._engine.batch_size,
                device=self._engine.device,
            )
            return [(row.predict, row.radius) for row in rows]

        certificates = await self._compute(job, work)
        return pb.CertifyResponse(
            certificates=[
                pb.Certificate(label=label, class_name=_name(job, label), radius=radius)
                for label, radius in certificates
            ],
            sigma=sigma,
            n0=request.n0,
            n=request.n,
            alpha=request.alpha,
            weights_sha256=job.weights,
        )

    async def _question(
        self, request: pb.PredictRequest | pb.CertifyRequest
    ) -> tuple[Job, float, int, Tensor]:
        """Return the model's job, the noise level, the seed of the noise, and the images."""
        job = await self._model(request.model)
        sigma = request.sigma if request.HasField("sigma") else job.terms.procedure.sigma
        seed = self._seed(request.seed if request.HasField("seed") else None)
        return job, sigma, seed, self._images(request.images, job)

    async def _model(self, name: str) -> Job:
        job = await asyncio.to_thread(self._store.find_model, name)
        if job is None:
            raise ServiceError(
                f"there is no model {name[:80]!r}: give the key of a job, or the hash of its weights.",
                "NOT_FOUND",
            )
        return job

    def _images(self, message: pb.Images, job: Job) -> Tensor:
        """Return the images, uint8 (count, channels, height, width)."""
        shape = message.channels, message.height, message.width
        wanted = job.spec.channels, job.spec.height, job.spec.width
        if not message.count:
            raise _wrong("the request has no images: send at least one.")
        if message.count > self._limits.max_images_per_call:
            raise ServiceError(
                f"{message.count} images are more than the {self._limits.max_images_per_call} that this "
                "service takes in a call: send several calls.",
                "RESOURCE_EXHAUSTED",
            )
        if shape != wanted:
            raise _wrong(
                f"images of (channels, height, width) {shape} do not suit this model, which takes "
                f"{wanted}: resize them."
            )
        if len(message.pixels) != message.count * math.prod(shape):
            raise _wrong(
                f"{message.count} images of {shape} have {message.count * math.prod(shape)} bytes, but "
                f"{len(message.pixels)} came: send one byte a value."
            )
        pixels = np.frombuffer(message.pixels, np.uint8).reshape(message.count, *shape)
        return torch.from_numpy(pixels.copy())

    def _check(self, sigma: float, alpha: float, draws: dict[str, int], num_images: int) -> None:
        check_sigma(sigma)
        check_alpha(alpha)
        for name, value in draws.items():
            if value < 1:
                raise _wrong(f"{name}={value} draws are none: ask for at least 1.")
            if value > self._limits.max_n:
                raise ServiceError(
                    f"{name}={value} draws are more than the {self._limits.max_n} that this service makes "
                    "for an image: ask for fewer.",
                    "RESOURCE_EXHAUSTED",
                )
        total = num_images * sum(draws.values())
        if total > self._limits.max_draws_per_call:
            raise ServiceError(
                f"{num_images} images with {sum(draws.values())} draws each are {total} draws, and this "
                f"service makes {self._limits.max_draws_per_call} in a call: send fewer images at a time.",
                "RESOURCE_EXHAUSTED",
            )

    def _seed(self, given: int | None) -> int:
        if given is None:
            return secrets.randbelow(_MAX_SEED)
        if given > _MAX_SEED:
            raise _wrong(f"seed={given} is out of range: allowed is a number in [0, {_MAX_SEED}].")
        return given

    async def _compute(self, job: Job, work: Callable[[nn.Module], T]) -> T:
        if self._waiting >= self._limits.max_online:
            raise ServiceUnreachableError(
                f"{self._waiting} calls wait for the device, as many as this service lets wait: try again "
                "later.",
                "RESOURCE_EXHAUSTED",
            )
        caller = CALLER.get().name
        share = self._shares.get(caller) or self._new_share(caller)
        if share.taken >= share.places:
            raise ServiceUnreachableError(
                f"{share.taken} calls of {caller} wait for the device, as many as one caller may have: try "
                "again when one is answered.",
                "RESOURCE_EXHAUSTED",
            )
        gone = threading.Event()

        def run() -> T:
            # As it is certified, so it serves: in another precision it is another classifier.
            precision = job.terms.procedure.precision
            model = self._engine.loaded(job.weights, job.spec, precision)
            return work(_Abandonable(model, gone))

        self._waiting += 1
        self._shares[caller] = share
        share.taken += 1
        try:
            async with share.computing, self._computing:
                return await asyncio.to_thread(run)
        except CertificationError as error:
            # The request was checked before: what is left is the model.
            raise ServiceError(str(error), "FAILED_PRECONDITION") from error
        finally:
            gone.set()
            self._waiting -= 1
            share.taken -= 1
            if not share.taken:
                del self._shares[caller]

    def _new_share(self, caller: str) -> _Share:
        if caller == ANYBODY:  # without tokens nobody knows whose calls are whose
            return _Share(self._limits.max_online, _AT_A_TIME)
        return _Share((self._limits.max_online + 1) // 2, _AT_A_TIME // 2)


class _Abandonable(nn.Module):
    """A model whose work ends with the next forward pass once its caller has gone."""

    def __init__(self, model: nn.Module, gone: threading.Event) -> None:
        super().__init__()
        self._model = model
        self._gone = gone

    def forward(self, images: Tensor) -> Tensor:
        if self._gone.is_set():
            raise CertificationError("the caller has gone.")
        scores: Tensor = self._model(images)
        return scores


def _name(job: Job, label: int) -> str:
    return "" if label == ABSTAIN else job.class_names[label]


def _wrong(sentence: str) -> ServiceError:
    return ServiceError(sentence, "INVALID_ARGUMENT")
