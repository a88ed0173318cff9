"""The web application: which address shows what. It only reads.

Names of runs, classes and problems come from strangers. The templates escape everything, and the
content security policy lets a browser run nothing and load nothing from elsewhere.
"""

import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedsmooth_core.certification.row_format import HEADER, HEADER_WITH_N, format_row
from server.certification.jobs import Job, JobState
from server.certification.page import views
from server.certification.page.figures import MAX_SERIES
from server.certification.page.templates import TEMPLATES
from server.certification.queries import Queries
from server.certification.store import JobStore, StorageError, UnreadableJobError

REFRESH_SECONDS = 10
"""How often a page with unfinished jobs loads itself again."""

JOBS_A_PAGE = 50
RUNS_A_PAGE = 500
MODELS_OF_A_RUN = 1000
"""Of a run with more jobs, the latest are shown."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_FOLDER = Path(__file__).parent

logger = logging.getLogger(__name__)


def app(store: JobStore) -> Starlette:
    """Return the page on a store, as an ASGI application that can be mounted anywhere.

    ``/`` lists jobs (``?run=``, ``?state=``, ``?page=``), ``/jobs/KEY`` shows one and
    ``/jobs/KEY/rows.tsv`` is its rows in the published format; ``/runs`` lists runs, ``/runs/RUN``
    shows one over its rounds, and ``/compare?run=A&run=B`` puts several side by side. Only GET and
    HEAD are answered.
    """
    site = _Site(Queries(store))
    return Starlette(
        routes=[
            Route("/", site.jobs),
            Route("/jobs/{key}", site.job),
            Route("/jobs/{key}/rows.tsv", site.rows),
            Route("/runs", site.runs),
            Route("/runs/{run:path}", site.run),
            Route("/compare", site.compare),
            Route("/style.css", _file("style.css", "text/css")),
            Route("/icon.svg", _file("icon.svg", "image/svg+xml")),
        ],
        exception_handlers={
            HTTPException: _refused,
            StorageError: _unreadable,
            UnreadableJobError: _unreadable_job,
            Exception: _failed,
        },
        middleware=[Middleware(_Headers)],
    )


class _Site:
    """One method for each address. They are not coroutines: Starlette runs them in threads."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._store = queries.store

    def jobs(self, request: Request) -> Response:
        run = request.query_params.get("run", "")
        state, states = _states(request.query_params.get("state", ""))
        number = _page_number(request.query_params.get("page", "1"))
        found = self._store.jobs(run, states, limit=number * JOBS_A_PAGE + 1)
        shown = found[(number - 1) * JOBS_A_PAGE : number * JOBS_A_PAGE]
        counts = self._store.counts()
        return _page(
            request,
            "jobs.html",
            refresh=any(not job.state.has_ended for job in shown),
            run=run,
            state=state,
            number=number,
            has_older=len(found) > number * JOBS_A_PAGE,
            counts=views.state_counts(counts),
            jobs=[self._line(job, run) for job in shown],
        )

    def job(self, request: Request) -> Response:
        job = self._job(request)
        rows = self._queries.rows(job.key)
        return _page(
            request,
            "job.html",
            refresh=not job.state.has_ended,
            line=self._line(job, ""),
            figure=views.job_figure(job, rows) if len(rows) else None,
        )

    def rows(self, request: Request) -> Response:
        job = self._job(request)
        rows = sorted(self._store.rows(job.key), key=lambda row: row.idx)
        says_n = any(row.n is not None for row in rows)
        lines = [HEADER_WITH_N if says_n else HEADER, *(format_row(row) for row in rows)]
        return Response(
            "".join(f"{line}\n" for line in lines),
            media_type="text/tab-separated-values",
            headers={"Content-Disposition": f'attachment; filename="rows-{job.key[:12]}.tsv"'},
        )

    def runs(self, request: Request) -> Response:
        runs = self._queries.runs(RUNS_A_PAGE + 1)
        return _page(
            request,
            "runs.html",
            refresh=False,
            runs=runs[:RUNS_A_PAGE],
            has_older=len(runs) > RUNS_A_PAGE,
            most=MAX_SERIES,
        )

    def run(self, request: Request) -> Response:
        name = request.path_params["run"]
        self._check_run(name)
        jobs = self._store.jobs(name, limit=MODELS_OF_A_RUN + 1)
        shown = jobs[:MODELS_OF_A_RUN]
        lines = [self._line(job, name) for job in shown]
        return _page(
            request,
            "run.html",
            refresh=any(not job.state.has_ended for job in shown),
            run=name,
            has_older=len(jobs) > MODELS_OF_A_RUN,
            most=MODELS_OF_A_RUN,
            series=views.series_of_run(lines, self._queries.rows),
        )

    def compare(self, request: Request) -> Response:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if len(names) > MAX_SERIES:
            raise HTTPException(
                400, f"{len(names)} runs are too many for one figure: choose at most {MAX_SERIES}."
            )
        for name in names:
            self._check_run(name)
        found = [(name, self._queries.last_certified(name)) for name in names]
        lines = [self._line(job, name) for name, job in found if job is not None]
        return _page(
            request,
            "compare.html",
            refresh=False,
            waiting=[name for name, job in found if job is None],
            comparison=views.comparison(lines, self._queries.rows) if lines else None,
        )

    def _line(self, job: Job, run: str) -> views.JobLine:
        return views.JobLine(job, self._queries.summary(job), run)

    def _job(self, request: Request) -> Job:
        job = self._store.get(request.path_params["key"])
        if job is None:
            raise HTTPException(404, "No job has this key: it may have been mistyped or cut off.")
        return job

    def _check_run(self, name: str) -> None:
        if not self._queries.has_run(name):
            raise HTTPException(404, f"No model was submitted for a run called “{name}”.")


def _states(name: str) -> tuple[str, tuple[JobState, ...]]:
    if name == "":
        return "", ()
    if name == views.UNFINISHED:
        return name, (JobState.QUEUED, JobState.RUNNING)
    try:
        return name, (JobState(name),)
    except ValueError:
        allowed = ", ".join(JobState)
        raise HTTPException(
            400, f"“{name}” is no state of a job: it is one of {views.UNFINISHED}, {allowed}."
        ) from None


def _page_number(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise HTTPException(400, "A page has a number: 1, 2, and so on.")
    return int(text)


def _page(
    request: Request, template: str, *, refresh: bool, status: int = 200, **values: Any
) -> HTMLResponse:
    text = TEMPLATES.get_template(template).render(
        root=request.scope.get("root_path", ""),
        path=request.url.path,
        refresh=REFRESH_SECONDS if refresh else None,
        **values,
    )
    return HTMLResponse(text, status)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentences = {
        404: "There is no such page.",
        405: "This page can only be read: it answers GET and HEAD.",
    }
    # Starlette's own refusals bring no sentence but the name of the status.
    is_ours = error.detail not in ("Not Found", "Method Not Allowed")
    response = _page(
        request,
        "refused.html",
        refresh=False,
        status=error.status_code,
        sentence=error.detail if is_ours else sentences[error.status_code],
    )
    response.headers.update(error.headers or {})
    return response


def _unreadable(request: Request, error: Exception) -> Response:
    logger.warning("The page cannot be shown: %s", error)
    sentence = "The jobs cannot be read now: the service's log says why."
    return _page(request, "refused.html", refresh=True, status=503, sentence=sentence)


def _unreadable_job(request: Request, error: Exception) -> Response:
    logger.warning("The page cannot be shown: %s", error)
    sentence = "This job cannot be read: the service's log says why."
    return _page(request, "refused.html", refresh=False, status=500, sentence=sentence)


def _failed(request: Request, error: Exception) -> Response:
    # Starlette raises the error again, for the server to log.
    sentence = "This page could not be made: the service's log says why."
    response = _page(request, "refused.html", refresh=False, status=500, sentence=sentence)
    # This one is made outside of the middleware.
    response.headers.update(_HEADERS)
    return response


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (_FOLDER / name).read_bytes()

    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return endpoint


class _Headers:
    """Puts the headers that protect a browser on every response."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._inner(scope, receive, with_headers)
