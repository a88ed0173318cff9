"""`fedsmooth reproduce`, killed in the middle of all it does: what comes out is as if it never had been."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from fedsmooth_core.certification.rows import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUNDS = 6
KEPT = 5  # rounds between two checkpoints
FOLDER = "reproduced"
COMMAND = [
    *(
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'fedsmooth'; from server.cli import main; main()",
    ),
    *("reproduce", "fig3", "fig4", "--scale", "cpu", "--seeds", "1", "-o", FOLDER),
    "runtime.device=cpu",
    "runtime.threads=1",
    "dataset=digits",
    "model=small_cnn",
    "partition.num_clients=10",
    "partition.samples_per_client=40",
    f"federation.num_rounds={ROUNDS}",
    "training.local_steps=3",
    "certification.num_images=20",
    "certification.n=200",
]
NUM_TASKS = 6 + 8 + 8
# In each life the process is killed in the middle of one of these, another model's each time; None: while
# it starts.
LIVES = ["training", None, "certification", "attack", "certification", "training", "attack"]


def half_done(root):
    """What a process is in the middle of, or was when it was killed."""
    found = set()
    for model in root.glob("models/*"):
        kept = [
            (model / f"checkpoints/round-{number:04d}.json").is_file() for number in (KEPT, ROUNDS)
        ]
        if kept == [True, False]:
            found.add(("training", model))
    for folder in root.glob("certificates/*/*"):
        rows = folder / "rows.tsv"
        if not (folder / "summary.json").is_file():
            # A header and a row at least.
            if rows.is_file() and rows.read_bytes().count(b"\n") > 1:
                found.add(("certification", folder))
        elif not (folder / "attack-of-figure.json").is_file():
            found.add(("attack", folder))
    return found


def start(folder, cache):
    folder.mkdir(exist_ok=True)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            COMMAND,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"FEDSMOOTH_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        )


def finish(folder, cache):
    """Let it run to its end; return what it says."""
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    process = start(folder, cache)
    try:
        status = process.wait(300)
    finally:
        process.kill()
    assert status == 0, output.read_text()
    return output.read_text()


def live_and_be_killed(folder, cache, work):
    """Kill it in the middle of ``work`` on a model that was not begun; return whether that was hit."""
    root = folder / FOLDER
    before = half_done(root)
    process = start(folder, cache)
    begun = set()
    try:
        if work is None:
            time.sleep(1)
        while work is not None and not begun:
            assert process.poll() is None, (folder / "output.txt").read_text()
            begun = {one for one in half_done(root) - before if one[0] == work}
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    # It may have been quicker than the look at its files.
    return work is None or bool(begun & half_done(root))


def results(folder, name):
    """A figure's results, but for seconds and the checkout, which may change in between."""
    content = json.loads((folder / FOLDER / "results" / "cpu" / f"{name}.json").read_bytes())
    for one in content["series"]:
        for model in one["models"]:
            # Rows say how long each image took.
            for key in ("train_seconds", "certify_seconds", "rows_sha256", "git_revisions"):
                del model[key]
    return content


def log_of(folder):
    return [json.loads(line) for line in (folder / FOLDER / "tasks.jsonl").read_text().splitlines()]


def files(folder, pattern):
    root = folder / FOLDER
    return {path.relative_to(root): path for path in sorted(root.glob(pattern))}


def test_killed_at_all_kinds_of_work_it_ends_with_the_same_results(tmp_path):
    cache, calm, killed = tmp_path / "cache", tmp_path / "calm", tmp_path / "killed"
    assert f"{NUM_TASKS} tasks left" in finish(calm, cache)

    hits = [live_and_be_killed(killed, cache, work) for work in LIVES]
    assert {work for work, is_hit in zip(LIVES, hits, strict=True) if is_hit} == set(LIVES), hits
    output = finish(killed, cache)

    # No task came to its end twice; of one that did, a process may have been killed before it said so.
    tasks = [line["task"] for line in log_of(killed)]
    assert len(tasks) == len(set(tasks))
    assert NUM_TASKS - len(LIVES) <= len(tasks) <= NUM_TASKS
    # The last process did what was left.
    (left,) = re.findall(r"^(\d+) tasks? left", output, re.MULTILINE)
    assert len(re.findall(r"\d+ tasks? left, about", output)) == int(left) + 1
    assert 0 < int(left) < NUM_TASKS - 4

    for name in ("fig3", "fig4"):
        assert results(killed, name) == results(calm, name)
        assert all(len(one["models"]) == 1 for one in results(calm, name)["series"])
        for ending in ("png", "svg"):
            assert (killed / FOLDER / "results" / "cpu" / f"{name}.{ending}").is_file()
    weights = f"models/*/checkpoints/round-{ROUNDS:04d}.safetensors"
    # Checkpoints that were for an interruption are gone.
    assert (
        files(killed, weights).keys() == files(killed, "models/*/checkpoints/*.safetensors").keys()
    )
    pairs = zip(files(killed, weights).items(), files(calm, weights).items(), strict=True)
    for (path, ours), (same_path, theirs) in pairs:
        assert path == same_path
        assert ours.read_bytes() == theirs.read_bytes()
    pattern = "certificates/*/*/rows.tsv"
    assert len(files(killed, pattern)) == 8
    for path, ours in files(killed, pattern).items():
        assert len(read_rows(ours)) == len(read_rows(calm / FOLDER / path)) == 20

    output = finish(killed, cache)
    assert "Nothing is left to train or certify." in output
    assert len(log_of(killed)) == len(tasks)
    # What holds is said each time.
    assert output.count("The certificates pass the sanity checks") == 2
    assert output.count("Larger sigma is lower but wider") == 2
    page = (killed / FOLDER / "results.md").read_text()
    assert page.count("### Figure") == 2
