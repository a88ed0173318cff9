"""The page of the certification service: what it shows, and what it must never do."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pytest
from certified_jobs import add_job, rows
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from fedsmooth_core.certification.analysis import Rows, certified_accuracy, summary
from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.row_format import CertifiedRow, parse_rows
from server.certification.page import app, site
from server.certification.page import figures as page_figures
from server.certification.page.figures import certified_curve, radius_figure
from server.certification.queries import MAX_RADII, Queries, grid
from server.certification.store import JobStore

HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path / "jobs") as opened:
        yield opened


@pytest.fixture
def client(store: JobStore) -> TestClient:
    return TestClient(app(store), raise_server_exceptions=False)


def text(page: str) -> str:
    """What a reader sees of a page, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).replace("\u202f", " ").split())


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def with_interval(one: dict[str, Any]) -> str:
    """A radius with its certified accuracy and interval, as the tables say it."""
    low, high = (f"{100 * end:.1f}" for end in one["confidence_interval_95"])
    return f"{one['radius']:g} {percent(one['accuracy'])} {low}\N{EN DASH}{high}"


def polylines(page: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'<polyline [^>]*points="([^"]*)"', page)
    ]


def test_an_empty_service_says_what_to_do(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "fedsmooth certify CHECKPOINT --service ADDRESS" in page.text
    assert "refresh" not in page.text
    assert "service.address=ADDRESS" in client.get("/runs").text
    assert "tick the runs to compare" in client.get("/compare").text


def test_the_list_shows_progress_and_certified_accuracy(
    store: JobStore, client: TestClient
) -> None:
    certified = rows(50)
    add_job(store, "one", 3, certified, sigma=0.5, n=2000)
    add_job(store, "two", 7, certified[:20], num_images=50)
    add_job(store, "three", 1)
    page = client.get("/").text
    seen = text(page)
    assert seen.index("three, round 1") < seen.index("two, round 7") < seen.index("one, round 3")
    for state in ("done", "running", "queued"):
        assert f'class="state {state}"' in page
    assert "20 of 50" in seen
    assert "15 s left" in seen  # 30 images at half a second
    assert "n = 2 000" in seen
    for one in summary(Rows.of(certified), [0, 0.25, 0.5])["certified_accuracy"]:
        assert with_interval(one) in seen
    assert '<meta http-equiv="refresh"' in page


def test_the_list_can_be_narrowed(store: JobStore, client: TestClient) -> None:
    add_job(store, "one", 1, rows(5))
    add_job(store, "two", 2)
    store.cancel(add_job(store, "two", 3).key)

    def names(query: str) -> list[str]:
        return re.findall(r"(?:one|two), round \d", text(client.get(f"/{query}").text))

    assert names("?run=two") == ["two, round 3", "two, round 2"]
    assert names("?state=unfinished") == ["two, round 2"]
    assert names("?state=cancelled&run=two") == ["two, round 3"]
    assert names("?state=failed") == []
    assert "No job is like this" in client.get("/?state=failed").text
    assert '<meta http-equiv="refresh"' not in client.get("/?state=done").text


@pytest.mark.parametrize("query", ["state=red", "page=0", "page=x", "page=-1", "page=99999999999"])
def test_a_wrong_query_is_refused(client: TestClient, query: str) -> None:
    answer = client.get(f"/?{query}")
    assert answer.status_code == 400
    assert "<h1>Not shown</h1>" in answer.text


def test_a_long_list_has_pages_and_reads_the_rows_of_one(
    store: JobStore, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "JOBS_A_PAGE", 4)
    for number in range(10):
        add_job(store, "long", number, rows(2))
    read: list[str] = []
    original = store.rows

    def counted(key: str, after: int = 0) -> list[CertifiedRow]:
        read.append(key)
        return original(key, after)

    monkeypatch.setattr(store, "rows", counted)
    pages = [client.get("/").text]
    assert len(read) == 4
    client.get("/")
    assert len(read) == 4  # worked out once
    while older := re.search(r'rel="next" href="([^"]*)"', pages[-1]):
        pages.append(client.get(html.unescape(older[1])).text)
    shown = [int(number) for page in pages for number in re.findall(r"long, round (\d+)", page)]
    assert shown == list(range(9, -1, -1))
    assert 'rel="prev"' in pages[-1]


def test_figures_follow_a_running_job(store: JobStore) -> None:
    certified = rows(30)
    job = add_job(store, "one", 1, certified[:10], num_images=30)
    queries = Queries(store)
    assert queries.summary(job)["num_images"] == 10
    store.append(job.key, certified[10:])
    after = store.get(job.key)
    assert after is not None
    radii = grid(job.terms.procedure)
    assert queries.summary(after) == summary(Rows.of(certified), radii)


def test_a_job_has_its_curve_its_table_and_its_terms(store: JobStore, client: TestClient) -> None:
    certified = rows(40)
    job = add_job(store, "one", 12, certified, sigma=0.5, n=5000, alpha=0.01, seed=77)
    page = client.get(f"/jobs/{job.key}").text
    seen = text(page)
    figures = summary(Rows.of(certified), [0, 0.25, 0.5, 0.75, 1.0])
    for one in figures["certified_accuracy"]:
        assert with_interval(one) in seen
    assert f"Average certified radius {figures['average_certified_radius']:.4f}" in seen
    assert f"Abstained {percent(figures['abstention_rate'])}" in seen
    for value in ("n = 5 000", "0.01 an image", "Seed of the noise 77", "40 images of digits"):
        assert value in seen
    assert job.key in seen
    assert job.weights in seen
    assert "refresh" not in page
    [line] = polylines(page)
    correct = {row.radius for row in certified if row.correct}
    assert len(line) == 1 + 2 * (len(correct) + 1)


def test_a_failed_job_says_why(store: JobStore, client: TestClient) -> None:
    job = add_job(store, "one", 1)
    store.fail(job.key, f"the scores are not finite {HOSTILE}.")
    page = client.get(f"/jobs/{job.key}").text
    assert f"the scores are not finite {HOSTILE}." in html.unescape(page)
    assert "No image is certified yet" in page


@pytest.mark.parametrize("n", [None, 300])
def test_rows_come_in_the_published_format(
    store: JobStore, client: TestClient, n: int | None
) -> None:
    certified = rows(30, n=n)
    method = "fixed" if n is None else "sequential"
    job = add_job(store, "one", 1, certified, method=method)
    answer = client.get(f"/jobs/{job.key}/rows.tsv")
    assert answer.headers["content-type"].startswith("text/tab-separated-values")
    assert "attachment" in answer.headers["content-disposition"]
    read = parse_rows(answer.content, Path("rows.tsv"))
    wanted = Rows.of(sorted(certified, key=lambda row: row.idx))
    for name in ("idx", "label", "predict", "radius", "correct", "time", "n"):
        np.testing.assert_array_equal(getattr(read, name), getattr(wanted, name))
    if n is not None:
        assert "Draws an image, on average 300" in text(client.get(f"/jobs/{job.key}").text)


def test_a_run_is_shown_over_its_rounds(store: JobStore, client: TestClient) -> None:
    for number in (10, 20, 30):
        add_job(store, "one", number, rows(30, seed=number))
    add_job(store, "one", 40, rows(40)[:5], num_images=30)
    add_job(store, "one", 30, rows(30), sigma=0.5)
    page = client.get("/runs/one").text
    # Two groups of terms, each with lines over rounds and a last curve.
    assert page.count("<svg viewBox") == 4
    assert page.count("<section>") == 2
    assert page.count("Certified accuracy over the rounds") == 4
    of_group = page.split("<section>")[2]
    lines = polylines(of_group)
    accuracy = [certified_accuracy(Rows.of(rows(30, seed=number)), 0.0) for number in (10, 20, 30)]
    assert len(lines[0]) == 3  # the running one is not among them
    height = page_figures._BOTTOM - page_figures._TOP
    drawn = [(page_figures._BOTTOM - y) / height for _, y in lines[0]]
    assert drawn == pytest.approx(accuracy, abs=0.001)
    assert "5 of 30" in text(of_group)
    assert '<meta http-equiv="refresh"' in page
    listed = text(client.get("/runs").text)
    assert "one 40 4 of 5 1" in listed


def test_a_round_certified_twice_counts_once(store: JobStore, client: TestClient) -> None:
    add_job(store, "one", 1, rows(10, seed=1), weights="a" * 64)
    later = add_job(store, "one", 1, rows(10, seed=2), weights="b" * 64)
    page = client.get("/runs/one").text
    assert re.findall(r'href="/jobs/(\w+)"', page) == [later.key]
    assert all(len(line) == 1 for line in polylines(page)[:-1])


def test_runs_are_compared_by_their_last_certified_models(
    store: JobStore, client: TestClient
) -> None:
    add_job(store, "one", 1, rows(20, seed=1))
    add_job(store, "one", 2, rows(20, seed=2))
    add_job(store, "one", 3, rows(20)[:5], num_images=20)
    add_job(store, "two", 9, rows(20, seed=3))
    add_job(store, "three", 4)
    page = client.get("/compare?run=one&run=two&run=three&run=one").text
    assert len(polylines(page)) == 2
    seen = text(page)
    assert "one, round 2" in seen
    assert "two, round 9" in seen
    assert "No model of three is certified yet" in seen
    assert "do not compare the models alone" not in seen
    assert percent(certified_accuracy(Rows.of(rows(20, seed=3)), 0.25)) in seen


def test_a_comparison_of_unlike_certificates_warns(store: JobStore, client: TestClient) -> None:
    add_job(store, "one", 1, rows(20))
    add_job(store, "noisier", 1, rows(20), sigma=0.5)
    add_job(store, "other", 1, rows(30))
    assert "in different ways" in client.get("/compare?run=one&run=noisier").text
    assert "on different images" in client.get("/compare?run=one&run=other").text


def test_too_many_runs_are_refused(store: JobStore, client: TestClient) -> None:
    query = "&".join(f"run={number}" for number in range(8))
    answer = client.get(f"/compare?{query}")
    assert answer.status_code == 400
    assert "choose at most 7" in answer.text


@pytest.mark.parametrize(
    "name",
    [HOSTILE, "a/b", "a?b=c#d", "100 %", "ünï", "a b+c", "javascript:alert(1)", "/x/"],
)
def test_any_name_of_a_run_is_text_and_has_its_page(
    store: JobStore, client: TestClient, name: str
) -> None:
    certified = rows(20)
    job = add_job(store, name, 1, certified, class_names=(HOSTILE, *"123456789"))
    pages = {}
    for listing in ("/", "/runs"):
        pages[listing] = client.get(listing).text
    for link in re.findall(r'href="([^"]*)"', pages["/runs"]):
        target = urljoin("http://testserver/runs", html.unescape(link))
        assert target.startswith("http://testserver/")
        answer = client.get(target)
        assert answer.status_code == 200
        pages[target] = answer.text
    assert any(f"<h1>{html.escape(name)[:5]}" in page for page in pages.values())
    pages["job"] = client.get(f"/jobs/{job.key}").text
    pages["compare"] = client.get("/compare", params={"run": name}).text
    pages["filtered"] = client.get("/", params={"run": name}).text
    pages["missing"] = client.get("/compare", params={"run": f"no {name}"}).text
    for page in pages.values():
        assert "<script" not in page
    assert name in html.unescape(pages["job"])
    assert HOSTILE in html.unescape(pages["job"])
    assert f"{name}, round 1" in html.unescape(pages["compare"])


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (f"/jobs/{'0' * 64}", "No job has this key"),
        (f"/jobs/{'0' * 64}/rows.tsv", "No job has this key"),
        ("/jobs/%00", "No job has this key"),
        ("/runs/none", "No model was submitted for a run called “none”"),
        ("/runs/", "No model was submitted for a run called “”"),
        ("/compare?run=none", "No model was submitted for a run called “none”"),
        ("/elsewhere", "There is no such page"),
        ("/jobs", "There is no such page"),
        ("/../site.py", "There is no such page"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(
    client: TestClient, path: str, sentence: str
) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert sentence in answer.text
    assert "<h1>Not shown</h1>" in answer.text


PATHS = ["/", "/runs", "/compare", "/style.css", "/icon.svg", "/none", "/?page=0"]


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_protects_the_browser(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert "script-src" not in policy
    assert not any("unsafe" in value or "*" in value for value in policy.values())
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_the_page_only_reads(store: JobStore, client: TestClient, method: str) -> None:
    job = add_job(store, "one", 1)
    for path in ("/", f"/jobs/{job.key}", "/runs/one", "/compare"):
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert "GET" in answer.headers["allow"]
    assert store.get(job.key) == job


def test_heads_are_answered(store: JobStore, client: TestClient) -> None:
    job = add_job(store, "one", 1, rows(3))
    for path in ("/", f"/jobs/{job.key}", "/runs", "/runs/one", f"/jobs/{job.key}/rows.tsv"):
        assert client.head(path).status_code == 200


def test_a_store_that_cannot_be_read_is_said_without_details(
    store: JobStore, client: TestClient
) -> None:
    store.close()
    answer = client.get("/")
    assert answer.status_code == 503
    assert "cannot be read now" in answer.text
    assert str(store.directory) not in answer.text
    assert answer.headers["content-security-policy"]


def test_a_mistake_of_ours_shows_no_trace(
    client: TestClient, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "jobs", lambda *a, **b: 1 / 0)
    answer = client.get("/")
    assert answer.status_code == 500
    assert "could not be made" in answer.text
    assert "ZeroDivision" not in answer.text
    assert answer.headers["content-security-policy"]


def test_the_page_can_be_mounted_below_another(store: JobStore) -> None:
    job = add_job(store, "one", 1, rows(3))
    client = TestClient(Starlette(routes=[Mount("/page", app(store))]))
    page = client.get("/page/").text
    links = re.findall(r'href="([^"]*)"', page)
    assert f"/page/jobs/{job.key}" in links
    for link in links:
        assert client.get(html.unescape(link)).status_code == 200


@pytest.mark.parametrize(
    "procedure",
    [
        {"alpha": 1 - 2**-53, "n": 10**9},
        {"radius_step": 5e-324},
        {"radius_step": 1e6},
        {"sigma": 1e6},
        {"sigma": 1e-300},
        {"n": 1},
    ],
)
def test_absurd_terms_break_no_page(
    store: JobStore, client: TestClient, procedure: dict[str, float]
) -> None:
    assert 1 <= len(grid(Procedure(**procedure))) <= MAX_RADII
    certified = [*rows(9), CertifiedRow(9, 1, 1, float("inf"), 1, 0.1)]
    job = add_job(store, "absurd", 2**32 - 1, certified, **procedure)
    for path in ("/", f"/jobs/{job.key}", "/runs", "/runs/absurd", "/compare?run=absurd"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "nan" not in "".join(re.findall(r'points="[^"]*"', answer.text))


def test_a_grid_is_the_published_one_and_never_too_fine() -> None:
    assert grid(Procedure(sigma=0.25, n=100_000)) == [0, 0.25, 0.5, 0.75]
    assert grid(Procedure(sigma=0.25, n=100_000, radius_step=0.1))[3] == 0.3
    fine = grid(Procedure(sigma=0.25, n=100_000, radius_step=0.001))
    assert len(fine) <= MAX_RADII
    steps = np.diff(fine)
    np.testing.assert_allclose(steps, steps[0])
    assert fine[-1] > 0.9


@given(
    st.lists(
        st.tuples(st.floats(0, 4, allow_subnormal=False), st.booleans()), min_size=1, max_size=80
    ),
    st.integers(0, 2**32),
)
def test_a_drawn_curve_is_certified_accuracy(made: list[tuple[float, bool]], seed: int) -> None:
    of = Rows.of(
        CertifiedRow(i, 0, 0 if correct else 1, radius, int(correct), 0.0)
        for i, (radius, correct) in enumerate(made)
    )
    curve = certified_curve("one", of)
    figure = radius_figure("name", "title", "description", [curve])
    points = [tuple(map(float, point.split(","))) for point in figure.lines[0].points.split()]
    span = curve.x[-1]
    # Away from the steps, by more than the drawing rounds.
    margin = 0.11 * span / (figure.right - figure.left)
    steps = np.array(curve.x)
    for radius in np.random.default_rng(seed).uniform(0, span, 20):
        if np.abs(steps - radius).min() < margin:
            continue
        x = figure.left + (figure.right - figure.left) * radius / span
        right = next(i for i, point in enumerate(points) if point[0] >= x)
        share = (figure.bottom - points[right][1]) / (figure.bottom - figure.top)
        assert points[right - 1][1] == points[right][1]  # steps are level between their ends
        assert share == pytest.approx(certified_accuracy(of, radius), abs=0.0003)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_rounds_are_marked_at_whole_numbers(one: int, other: int) -> None:
    first, last = sorted((one, other))
    ticks = page_figures._ticks(first, last, (first - 1, last + 1), whole=True)
    assert 1 <= len(ticks) <= 9
    assert all(float(tick.text).is_integer() for tick in ticks)
    places = [tick.at for tick in ticks]
    assert places == sorted(places)


def test_a_figure_can_be_heard(store: JobStore, client: TestClient) -> None:
    add_job(store, HOSTILE, 4, rows(10))
    page = client.get("/compare", params={"run": HOSTILE}).text
    assert 'role="img"' in page
    [(title, description)] = re.findall(r'aria-labelledby="(\S+) (\S+)"', page)
    assert f'<title id="{title}">' in page
    [said] = re.findall(rf'<desc id="{description}">([^<]*)</desc>', page)
    assert f"{HOSTILE}, round 4" in html.unescape(said)
    assert percent(certified_accuracy(Rows.of(rows(10)), 0.0)) in text(said)


def test_a_job_that_cannot_be_read_leaves_the_pages_of_others(
    store: JobStore, client: TestClient
) -> None:
    bad, good = add_job(store, "a", 1, rows(10)), add_job(store, "a", 2, rows(10))
    with store._writing() as connection:
        connection.execute("UPDATE jobs SET state = 'paused' WHERE key = ?", (bad.key,))
    for path in ("/", "/runs", "/runs/a", f"/jobs/{good.key}", "/compare?run=a"):
        assert client.get(path).status_code == 200
    assert good.key in client.get("/").text
    assert bad.key not in client.get("/").text
    answer = client.get(f"/jobs/{bad.key}")
    assert answer.status_code == 500
    assert "This job cannot be read" in answer.text
