"""The workers of the service: they give the device to unfinished jobs, turn by turn."""

import itertools
import logging
import threading
import time
from collections.abc import Hashable, Iterable
from typing import Any

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

OVERDUE_SECONDS = 1.5
"""A turn that takes longer goes on beside the next one, forward pass by forward pass."""

MOST_AT_ONCE = 16
"""Turns under way at one time: one, and those that are overdue. It bounds the models in memory."""

RETRY_SECONDS = 2.0
"""Between two attempts while the disk or the device refuses."""

DEVICE_ATTEMPTS = 5
"""After so many failures of the device in a row only a new process can help."""

MEMORY_ATTEMPTS = 5
"""After so many turns without enough memory on the device a job fails."""

_RUNS_REMEMBERED = 1000

logger = logging.getLogger(__name__)


class _Turn:
    """A turn under way. Who leads chooses the next job; an overdue turn goes on without the lead."""

    def __init__(self, lead: threading.Lock) -> None:
        self.run: Hashable = None
        self.key = ""
        self.has_changed = False
        self._lead = lead
        self._leads = False

    def __enter__(self) -> "_Turn":
        self._lead.acquire()
        self._leads = True
        self._started = time.monotonic()
        return self

    def __exit__(self, *raised: object) -> None:
        self.give_up_the_lead()

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() - self._started > OVERDUE_SECONDS

    def begin(self, run: Hashable, key: str) -> None:
        self.run, self.key, self.has_changed = run, key, False
        self._started = time.monotonic()

    def give_up_the_lead(self) -> None:
        if self._leads:
            self._leads = False
            self._lead.release()


class Engine:
    """Certifies what the store holds, in threads of its own.

    The run whose last turn is longest ago goes next, and of a run the job of the newest round; a job
    without a run is a run of its own. A turn is a number of images that takes about
    :data:`TURN_SECONDS`, at least one. Its rows are one transaction, so what a crash leaves is whole
    turns, and the next one begins at the first image without a row.

    An image may take minutes. A turn that is not over after :data:`OVERDUE_SECONDS` goes on, but other
    runs have their turns meanwhile, and the device is shared forward pass by forward pass. So jobs wait
    for long images of others only where :data:`MOST_AT_ONCE` runs are within one.

    What goes wrong with a job ends that job. What goes wrong with the disk or the device is in
    :attr:`problem` until it is over; meanwhile the turn is tried again.

    Args:
        store: the jobs; whoever submits or cancels one there need not say so here.
        datasets: the images.
        device: where to compute.
        batch_size: noisy images in one forward pass; None takes what is fast for the model.
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
        batch_size: int | None = None,
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
        self._threads = [
            threading.Thread(target=self._work, name=f"certification-{i}", daemon=True)
            for i in range(MOST_AT_ONCE)
        ]
        self._problem = ""
        self._device_failures = 0
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._interrupted = False
        self._lead = threading.Lock()
        # Of what follows, and of the counters.
        self._mutex = threading.Lock()
        self._under_way: set[_Turn] = set()
        self._clock = itertools.count(1)
        self._last_turn: dict[Hashable, int] = {}
        self._seconds_per_image: dict[str, float] = {}
        self._without_memory: dict[str, int] = {}

    def start(self) -> None:
        """Begin to certify what is unfinished, and whatever comes."""
        self._unsubscribe = self._store.subscribe(self._notice)
        for thread in self._threads:
            thread.start()

    def stop(self, grace: float = 5.0) -> None:
        """End after the turns under way, or in the middle of them when the seconds of grace are over.

        What a turn had not committed is certified again by the next process, to the same rows.
        """
        self._stopping.set()
        self._changed.set()
        due = time.monotonic() + grace
        for thread in self._threads:
            thread.join(max(0.0, due - time.monotonic()))
        self._interrupted = True
        for thread in self._threads:
            thread.join()
        self._unsubscribe()

    def wake(self) -> None:
        """Look for work now; the store's changes do that by themselves."""
        self._changed.set()

    @property
    def problem(self) -> str:
        """Why nothing is certified now, as a sentence; empty while all is well."""
        if self._has_lost_a_thread:
            return "a thread that certifies has ended: restart the service, and report this."
        return self._problem

    @property
    def problem_is_final(self) -> bool:
        """Whether nothing but another process can end the problem."""
        return self._has_lost_a_thread or self._device_failures >= DEVICE_ATTEMPTS

    @property
    def _has_lost_a_thread(self) -> bool:
        return not self._stopping.is_set() and any(
            thread.ident is not None and not thread.is_alive() for thread in self._threads
        )

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
        with self._mutex:
            for turn in self._under_way:
                if turn.key == key:
                    turn.has_changed = True
        self._changed.set()

    def _work(self) -> None:
        while not self._stopping.is_set():
            with _Turn(self._lead) as turn:
                if not self._stopping.is_set():
                    self._try_turn(turn)

    def _try_turn(self, turn: _Turn) -> None:
        # Before looking: what comes meanwhile is looked for again.
        self._changed.clear()
        try:
            is_busy = self._take_turn(turn)
        except StorageError as error:
            self._wait_for_mending(str(error))
        except torch.OutOfMemoryError:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._wait_for_mending(
                "the device has too little memory now: end what else computes on it, or restart the "
                "service with a smaller batch size."
            )
        except torch.AcceleratorError as error:
            logger.exception("The device failed.")
            self._device_failures += 1
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

    def _take_turn(self, turn: _Turn) -> bool:
        """Certify some images of one job, and return whether there was one."""
        found = self._next_job()
        if found is None:
            return False
        turn.begin(*found)
        # In this order: a change after the reading is noticed.
        with self._mutex:
            self._under_way.add(turn)
        try:
            self._serve(turn)
        finally:
            with self._mutex:
                self._under_way.remove(turn)
            # The run is free again.
            self._changed.set()
        return True

    def _serve(self, turn: _Turn) -> None:
        key = turn.key
        try:
            job = self._store.get(key)
            if job is None or job.state.has_ended:
                return
            rows = self._certify_some(turn, job)
            self._store.append(key, rows, drop_superseded=self._drop_superseded)
        except _LetGoError:
            return
        except (StorageError, torch.AcceleratorError):
            raise
        except torch.OutOfMemoryError:
            self._count_lack_of_memory(key)
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

    def _next_job(self) -> tuple[Hashable, str] | None:
        """Return a run without a turn under way, and its job; called by who leads."""
        newest: dict[Hashable, tuple[int, str]] = {}
        unfinished = self._store.unfinished()
        for key, name, server_round in unfinished:
            run: Hashable = ("run", name) if name else ("job", key)
            # Of one round the latest submission.
            if run not in newest or server_round >= newest[run][0]:
                newest[run] = (server_round, key)
        with self._mutex:
            self._forget_all_but({key for key, _, _ in unfinished})
            # A job may belong to several runs.
            busy = {turn.run for turn in self._under_way} | {turn.key for turn in self._under_way}
            free = [run for run, (_, key) in newest.items() if not {run, key} & busy]
            if not free:
                return None
            run = min(free, key=lambda run: self._last_turn.get(run, 0))
            # The latest turn last, so that the first one is the one to forget.
            self._last_turn.pop(run, None)
            self._last_turn[run] = next(self._clock)
            if len(self._last_turn) > _RUNS_REMEMBERED:
                del self._last_turn[next(iter(self._last_turn))]
        return run, newest[run][1]

    def _forget_all_but(self, unfinished: set[str]) -> None:
        remembered: Iterable[dict[str, Any]] = (self._seconds_per_image, self._without_memory)
        for facts in remembered:
            for key in facts.keys() - unfinished:
                del facts[key]

    def _certify_some(self, turn: _Turn, job: Job) -> list[CertifiedRow]:
        if job.device != self.device.type:
            raise CertificationError(
                f"the job was submitted for the device {job.device!r}, but this service computes on "
                f"{self.device.type!r}, whose noise is another: submit it again, as a new job."
            )
        key, terms = turn.key, job.terms
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
                TakingTurns(model, self.turns, before=lambda: self._check_wanted(turn)),
                torch.from_numpy(test_set.images[todo]),
                torch.from_numpy(test_set.labels[todo]),
                todo,
                max_value=test_set.info.max_value,
                procedure=terms.procedure,
                batch_size=self.batch_size,
                device=self.device,
            )
        )
        with self._mutex:
            self._seconds_per_image[key] = (time.perf_counter() - started) / len(rows)
        return rows

    def _images_of_turn(self, key: str) -> int:
        # How fast it is, its first image tells.
        with self._mutex:
            seconds = self._seconds_per_image.get(key)
        return 1 if seconds is None else max(1, int(TURN_SECONDS / seconds))

    def _check_wanted(self, turn: _Turn) -> None:
        """Before every forward pass: a turn may be one image, and take minutes."""
        if self._interrupted:
            raise _LetGoError
        if turn.has_changed:
            turn.has_changed = False
            job = self._store.get(turn.key)
            if job is None or job.state.has_ended:
                raise _LetGoError
        if turn.is_overdue:
            turn.give_up_the_lead()

    def _count(self, key: str, job: Job, rows: list[CertifiedRow]) -> None:
        procedure = job.terms.procedure
        done = job.images_done + len(rows)
        with self._mutex:
            self._device_failures = 0
            self._without_memory.pop(key, None)
            self.images_certified += len(rows)
            self.draws += sum(procedure.n0 + (row.n or procedure.n) for row in rows)
        logger.debug("Job %s: certified images %s.", key, [row.idx for row in rows])
        if done == job.num_images:
            logger.info("Job %s: all %d images are certified.", key, done)

    def _count_lack_of_memory(self, key: str) -> None:
        with self._mutex:
            times = self._without_memory[key] = self._without_memory.get(key, 0) + 1
        if times >= MEMORY_ATTEMPTS:
            self._fail(
                key,
                f"the device had too little memory for it {times} times: restart the service with a "
                "smaller batch size, or end what else computes there, and submit it again.",
            )

    def _fail(self, key: str, problem: str) -> None:
        logger.warning("Job %s failed: %s", key, problem)
        self._store.fail(key, problem)


class _LetGoError(Exception):
    """The job of the turn was cancelled, or the service ends."""
