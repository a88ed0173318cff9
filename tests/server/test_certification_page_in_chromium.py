"""The page in a real browser: what it makes of the templates, and what it asks for."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from certified_jobs import add_job, rows
from chromium import Chromium, executable
from PIL import Image

from fedsmooth_core.certification.analysis import Rows
from server.certification.page import app
from server.certification.store import JobStore

pytestmark = pytest.mark.skipif(executable() is None, reason="needs Chromium: install it.")

HOSTILE = "<img src=http://127.0.0.2/ onerror=owned=1><script>owned=1</script>"


@contextmanager
def served(store: JobStore) -> Iterator[str]:
    """Serve the page on a free port of the loopback; the value is its address."""
    server = uvicorn.Server(uvicorn.Config(app(store), port=0, ws="none", log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobStore]:
    with JobStore(tmp_path_factory.mktemp("jobs")) as opened:
        for number in (5, 10, 15):
            add_job(opened, "one", number, rows(40, seed=number))
        add_job(opened, "two", 5, rows(40, seed=1))
        add_job(opened, "%2e", 1, rows(40, seed=2), class_names=(HOSTILE, *"123456789"))
        add_job(opened, "one", 20, rows(40)[:10], num_images=40)
        failed = add_job(opened, HOSTILE, 3)
        opened.fail(failed.key, f"it failed {HOSTILE}.")
        yield opened


@pytest.fixture(scope="module")
def site(store: JobStore) -> Iterator[str]:
    with served(store) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def key_of(store: JobStore, run: str) -> str:
    return store.jobs(run)[0].key


@pytest.mark.parametrize("width", [1280, 400])
def test_every_page_is_whole_and_asks_nobody_else(
    store: JobStore, site: str, browser: Chromium, width: int
) -> None:
    paths = [
        "/",
        "/?state=failed",
        f"/jobs/{key_of(store, 'two')}",
        f"/jobs/{key_of(store, '%2e')}",
        f"/jobs/{key_of(store, HOSTILE)}",
        "/runs",
        "/runs/one",
        "/compare?run=one&run=two",
    ]
    for path in paths:
        browser.open(site + path, width)
        assert browser.requests, path
        assert all(address.startswith(f"{site}/") for address in browser.requests), path
        assert browser.evaluate("document.images.length + document.scripts.length") == 0
        assert browser.evaluate("typeof owned") == "undefined"
        # The style sheet is in force, and nothing is wider than the window.
        assert browser.evaluate("getComputedStyle(document.body).maxWidth") == "1152px"
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, path
        assert browser.complaints == [], path


def test_the_list_names_every_job(store: JobStore, site: str, browser: Chromium) -> None:
    browser.open(f"{site}/")
    seen = browser.evaluate("document.querySelector('main').innerText")
    for name in ("one, round 5", "one, round 20", "two, round 5", f"{HOSTILE}, round 3"):
        assert name in seen
    bars = "[...document.querySelectorAll('progress')].map(bar => bar.value / bar.max)"
    assert browser.evaluate(bars) == [0, 0.25, 1, 1, 1, 1, 1]


def test_a_curve_has_a_step_for_each_radius(store: JobStore, site: str, browser: Chromium) -> None:
    browser.open(f"{site}/jobs/{key_of(store, 'two')}")
    certified = Rows.of(rows(40, seed=1))
    steps = len(set(certified.radius[certified.correct == 1]))
    counts = "[...document.querySelectorAll('polyline')].map(line => line.points.numberOfItems)"
    assert browser.evaluate(counts) == [1 + 2 * (steps + 1)]
    stroke = "getComputedStyle(document.querySelector('polyline')).stroke"
    assert browser.evaluate(stroke) == "rgb(0, 114, 178)"
    browser.prefer("dark")
    try:
        assert browser.evaluate(stroke) == "rgb(86, 180, 233)"
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, background.removeprefix("rgb(").rstrip(")").split(","))) < 150
    finally:
        browser.prefer("light")


def test_lines_over_rounds_have_a_point_for_each_model(
    store: JobStore, site: str, browser: Chromium
) -> None:
    browser.open(f"{site}/runs/one")
    lines = "[...document.querySelector('figure').querySelectorAll('polyline')]"
    counts = f"{lines}.map(line => line.points.numberOfItems)"
    assert browser.evaluate(counts) == [3, 3, 3, 3]
    legend = browser.evaluate("document.querySelector('figure').innerText")
    for radius in ("radius 0", "radius 0.25", "radius 0.5", "radius 0.75", "95 % interval"):
        assert radius in legend
    dashes = f"{lines}.map(line => getComputedStyle(line).strokeDasharray)"
    assert len(set(browser.evaluate(dashes))) == 4  # told apart in grey, too


def test_ticked_runs_are_compared(store: JobStore, site: str, browser: Chromium) -> None:
    browser.open(f"{site}/runs")
    address = browser.evaluate("""
        for (const box of document.querySelectorAll('input[type=checkbox]'))
            box.checked = ['one', 'two', '%2e'].includes(box.value);
        const form = document.querySelector('form');
        form.action + '?' + new URLSearchParams(new FormData(form))
    """)
    browser.open(address)
    seen = browser.evaluate("document.querySelector('table').innerText")
    for name in ("one, round 15", "two, round 5", "%2e, round 1"):
        assert name in seen
    browser.open(browser.evaluate("document.querySelector('th a').href"))
    assert browser.evaluate("document.querySelectorAll('figure').length") == 1


def test_a_run_is_reached_by_its_link_whatever_its_name(site: str, browser: Chromium) -> None:
    for name in ("%2e", HOSTILE):
        browser.open(f"{site}/runs")
        links = "[...document.querySelectorAll('td a')]"
        browser.open(browser.evaluate(f"{links}.find(one => one.innerText == {name!r}).href"))
        assert browser.evaluate("document.querySelector('h1').innerText") == name


def test_the_picture_is_not_blank(store: JobStore, site: str, browser: Chromium) -> None:
    browser.open(f"{site}/runs/one")
    picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    assert picture.size == (1280, 900)
    colours = picture.getcolors(maxcolors=2**20)
    assert colours is not None
    counts = {colour: count for count, colour in colours}
    assert len(counts) > 100
    # The first and the second line of the figure, in their colours.
    assert counts.get((0x00, 0x72, 0xB2), 0) > 50
    assert counts.get((0xD5, 0x5E, 0x00), 0) > 50
