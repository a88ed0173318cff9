"""The one worker of the service: it gives the device to unfinished jobs, turn by turn."""

import itertools
import logging
import threading
import time
from collections.abc import Hashable

import torch
from torch import nn

from fedsmooth_core.certification.procedure import certify_images
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.errors import CertificationError, FedSmoothError
from fedsmooth_core.models import ModelSpec
from server.certification.datasets import Datasets
from server.certification.jobs import Job, JobState
from server.certification.models import LoadedModels
from server.certification.store import JobStore, StorageError
from server.certification.turns import TakingTurns, Turns

TURN_SECONDS = 1.0
"""Length of a turn, about; at least one image. What a crash loses, and what a commit is paid for."""

RETRY_SECONDS = 2.0
"""Between two attempts while the disk or the device refuses."""

logger = logging.getLogger(__name__)


class Engine:
    """Certifies what the store holds, in a thread of its own.

    The run whose last turn is longest ago goes next, and of a run the job of the newest round; a job
    without a run is a run of its own. A turn is a number of images that takes about
    :data:`TURN_SECONDS`, at least one. Its rows are one transaction, so what a crash leaves is whole
    turns, and the next one begins at the first image without a row.

    What goes wrong with a job ends that job. What goes wrong with the disk or the device is in
    :attr:`problem` until it is over; meanwhile the turn is tried again.

    Args:
        store: the jobs; whoever submits or cancels one there need not say so here.
        datasets: the images.
        device: where to compute.
        batch_size: noisy images in one forward pass.
        drop_superseded: a job that has its turn drops the unfinished jobs of older rounds of its run
            with the same terms, unless somebody else wants them.

    Attributes:
        device: where it computes.
        batch_size: noisy images in one forward pass.
        turns: taken for every forward pass on the device, by the models of :meth:`loaded` too.
        images_certified: since the start of this process.
        draws: noisy images that these took.
    """

    def __init__(
        self,
        store: JobStore,
        datasets: Datasets,
        device: torch.device,
        batch_size: int = 512,
        *,
        drop_superseded: bool = False,
    ) -> None:
        self.device = device
        self.batch_size = batch_size
        self.turns = Turns()
        self.images_certified = 0
        self.draws = 0
        self._store = store
        self._datasets = datasets
        self._drop_superseded = drop_superseded
        self._models = LoadedModels(store, device)
        self._thread = threading.Thread(target=self._work, name="certification", daemon=True)
        self._problem = ""
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._interrupted = False
        self._current = ""
        self._current_changed = False
        self._clock = itertools.count(1)
        self._last_turn: dict[Hashable, int] = {}
        self._seconds_per_image: dict[str, float] = {}

    def start(self) -> None:
        """Begin to certify what is unfinished, and whatever comes."""
        self._unsubscribe = self._store.subscribe(self._notice)
        self._thread.start()

    def stop(self, grace: float = 5.0) -> None:
        """End after the turn under way, or in the middle of it when the seconds of grace are over.

        What a turn had not committed is certified again by the next process, to the same rows.
        """
        self._stopping.set()
        self._changed.set()
        self._thread.join(grace)
        self._interrupted = True
        self._thread.join()
        self._unsubscribe()

    def wake(self) -> None:
        """Look for work now; the store's changes do that by themselves."""
        self._changed.set()

    @property
    def problem(self) -> str:
        """Why nothing is certified now, as a sentence; empty while all is well."""
        if self._stopping.is_set() or self._thread.is_alive() or self._thread.ident is None:
            return self._problem
        return "the thread that certifies has ended: restart the service, and report this."

    def loaded(self, weights: str, spec: ModelSpec, precision: str) -> nn.Module:
        """Return a stored model for an online call: every forward pass takes its turn.

        It is ready for ``certify_images`` and ``predict`` on :attr:`device`.

        Args:
            weights: hash of its state.
            spec: its architecture.
            precision: in which it computes, as :class:`Procedure` names it.

        Raises:
            CheckpointError: if the stored weights are not sound.
            UnknownJobError: if there are none of this hash.
        """
        return TakingTurns(self._models.get(weights, spec, precision), self.turns)

    def _notice(self, key: str) -> None:
        if key == self._current:
            self._current_changed = True
        self._changed.set()

    def _work(self) -> None:
        while not self._stopping.is_set():
            # Before looking: what comes meanwhile is looked for again.
            self._changed.clear()
            try:
                is_busy = self._take_turn()
            except StorageError as error:
                self._wait_for_mending(str(error))
            except torch.AcceleratorError as error:
                logger.exception("The device failed.")
                reason = str(error).splitlines()[0].rstrip(".")
                self._wait_for_mending(f"the device failed ({reason}): restart the service.")
            else:
                self._problem = ""
                if not is_busy and not self._stopping.is_set():
                    self._changed.wait()

    def _wait_for_mending(self, problem: str) -> None:
        if problem != self._problem:
            logger.error("Nothing is certified now: %s", problem)
        self._problem = problem
        self._stopping.wait(RETRY_SECONDS)

    def _take_turn(self) -> bool:
        """Certify some images of one job, and return whether there was one."""
        key = self._next_job()
        if key is None:
            return False
        # In this order: a change after the reading is noticed.
        self._current, self._current_changed = key, False
        job = self._store.get(key)
        if job is None or job.state.has_ended:
            return True
        try:
            rows = self._certify_some(key, job)
            self._store.append(key, rows, drop_superseded=self._drop_superseded)
        except _LetGoError:
            return True
        except (StorageError, torch.AcceleratorError):
            raise
        except FedSmoothError as error:
            self._fail(key, str(error))
        except Exception as error:
            logger.exception("The job %s failed.", key)
            self._fail(
                key, f"an unexpected error ended it ({error!r}): its trace is in the service's log."
            )
        else:
            self._count(key, job, rows)
        return True

    def _next_job(self) -> str | None:
        newest: dict[Hashable, tuple[int, str]] = {}
        for key, name, server_round in self._store.unfinished():
            run: Hashable = ("run", name) if name else ("job", key)
            # Of one round the latest submission.
            if run not in newest or server_round >= newest[run][0]:
                newest[run] = (server_round, key)
        if not newest:
            return None
        run = min(newest, key=lambda run: self._last_turn.get(run, 0))
        self._last_turn[run] = next(self._clock)
        return newest[run][1]

    def _certify_some(self, key: str, job: Job) -> list[CertifiedRow]:
        if job.device != self.device.type:
            raise CertificationError(
                f"the job was submitted for the device {job.device!r}, but this service computes on "
                f"{self.device.type!r}, whose noise is another: submit it again, as a new job."
            )
        terms = job.terms
        test_set = self._datasets.test_set(terms.dataset, terms.image_size)
        if test_set.info.fingerprint != job.fingerprint:
            raise CertificationError(
                f"the images of {terms.dataset!r} are not those that the job was submitted for: "
                "submit it again, as a new job, or restore them."
            )
        model = self._models.get(job.weights, job.spec, terms.procedure.precision)
        if job.state is JobState.QUEUED:
            self._store.start(key)
            logger.info(
                "Job %s: %d of %d images to certify.",
                key,
                job.num_images - job.images_done,
                job.num_images,
            )
        indices = subset_indices(len(test_set), terms.num_images)
        todo = list(indices[job.images_done :][: self._images_of_turn(key)])
        started = time.perf_counter()
        rows = list(
            certify_images(
                TakingTurns(model, self.turns, before=self._check_wanted),
                torch.from_numpy(test_set.images[todo]),
                torch.from_numpy(test_set.labels[todo]),
                todo,
                max_value=test_set.info.max_value,
                procedure=terms.procedure,
                batch_size=self.batch_size,
                device=self.device,
            )
        )
        self._seconds_per_image[key] = (time.perf_counter() - started) / len(rows)
        return rows

    def _images_of_turn(self, key: str) -> int:
        # How fast it is, its first image tells.
        if key not in self._seconds_per_image:
            return 1
        return max(1, int(TURN_SECONDS / self._seconds_per_image[key]))

    def _check_wanted(self) -> None:
        """Before every forward pass: a turn may be one image, and take minutes."""
        if self._interrupted:
            raise _LetGoError
        if self._current_changed:
            self._current_changed = False
            job = self._store.get(self._current)
            if job is None or job.state.has_ended:
                raise _LetGoError

    def _count(self, key: str, job: Job, rows: list[CertifiedRow]) -> None:
        self.images_certified += len(rows)
        procedure = job.terms.procedure
        self.draws += sum(procedure.n0 + (row.n or procedure.n) for row in rows)
        done = job.images_done + len(rows)
        logger.debug("Job %s: certified images %s.", key, [row.idx for row in rows])
        if done == job.num_images:
            del self._seconds_per_image[key]
            logger.info("Job %s: all %d images are certified.", key, done)

    def _fail(self, key: str, problem: str) -> None:
        logger.warning("Job %s failed: %s", key, problem)
        self._store.fail(key, problem)


class _LetGoError(Exception):
    """The job under way was cancelled, or the service ends."""
