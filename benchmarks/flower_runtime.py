"""Rounds in Flower's own Simulation Runtime (`flwr run`, Ray) beside `fedsmooth simulate`.

Both run this project's ServerApp and ClientApp on the same clients: AlexNet, the paper's plan, one
thread a core. A round lasts from one line of metrics.jsonl to the next, so the first round, which holds
the start, is not timed. The two take turns, run by run.

    python benchmarks/flower_runtime.py [--quick] [--device cpu] [-o FILE]

Left out where Flower, Ray or Pillow is not installed.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import torch
import workload
from harness import REPOSITORY, Headline, Section, Size, Timing, main

_MARK = "FEDSMOOTH_BENCHMARK_FOLDER"
_SAMPLES = 500
_PATIENCE = 240.0
"""Seconds without a new round after which a run has failed."""
RAY = "Flower's Simulation Runtime"
SYSTEMS: dict[str, list[str]] = {
    RAY: [],
    "fedsmooth simulate": [],
    "fedsmooth simulate, bfloat16": ["runtime.precision=bfloat16"],
}
"""What takes turns, and the settings that only it has. A simulated node of Flower's has no facts of its
own: there the ClientApp computes in float32, by the engine that suits one client."""


@dataclass
class _Rounds:
    seconds: list[float] = field(default_factory=list)
    of_clients: list[float] = field(default_factory=list)
    """Seconds that a client spent in training, the mean of each round."""


def _write_images(folder: Path, count: int) -> None:
    """Write a folder of images that both systems load: train/CLASS/*.png and a few in test/."""
    from PIL import Image

    for split, number in (("train", count), ("test", 2 * workload.NUM_CLASSES)):
        dataset = workload.random_images(number, split)
        for index, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
            # By turns, so that no class is empty however few there are.
            kind = index % workload.NUM_CLASSES if split == "test" else int(label)
            path = folder / split / f"class{kind}"
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path / f"{index:05d}.png")


def _overrides(
    folder: Path, run_dir: Path, nodes: int, clients: int, steps: int, rounds: int, device: str
) -> list[str]:
    settings = {
        "run_dir": run_dir,
        "dataset": "imagefolder",
        "dataset.root": folder / "images",
        "model": "alexnet",
        "partition": "iid",
        "partition.num_clients": nodes,
        "partition.samples_per_client": _SAMPLES,
        "federation.num_rounds": rounds + 1,
        "federation.cohort_fraction": clients / nodes,
        "federation.checkpoint_every": 1000,
        "training.local_steps": steps,
        "evaluation.every": 0,
        "certification.at_end": "false",
        "runtime.device": device,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def _scripts() -> Path:
    """Return where Flower's commands are: not always beside this Python."""
    files = distribution("flwr").files or []
    return Path(next(file for file in files if file.name == "flwr").locate()).resolve().parent


def _environment(folder: Path) -> dict[str, str]:
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = ":local:"\n'
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return os.environ | {
        _MARK: str(folder),
        "PATH": f"{_scripts()}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FEDSMOOTH_CACHE": str(folder.parent / "decoded"),
    }


@contextlib.contextmanager
def _ended_at_exit(folder: Path) -> Iterator[None]:
    """End all processes that were started with this folder's mark: Flower and Ray detach theirs."""
    try:
        yield
    finally:
        for kind, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            end = time.monotonic() + patience
            while (left := _marked(folder)) and time.monotonic() < end:
                for process in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, kind)
                time.sleep(0.2)


def _marked(folder: Path) -> list[int]:
    mark = f"{_MARK}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone by now, or somebody else's
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if mark in (process / "environ").read_bytes().split(b"\0") and state != "Z":
                found.append(int(process.name))
    return found


def _follow(run_dir: Path, rounds: int, process: subprocess.Popen[bytes], log: Path) -> _Rounds:
    """Wait for the rounds, and note when each line of metrics.jsonl appears."""
    lines, done = run_dir / "metrics.jsonl", list[float]()
    end = time.monotonic() + _PATIENCE
    while len(done) < rounds + 1:
        count = lines.read_bytes().count(b"\n") if lines.exists() else 0
        if count > len(done):
            done += [time.monotonic()] * (count - len(done))
            end = time.monotonic() + _PATIENCE
        if time.monotonic() > end or (process.poll() is not None and count < rounds + 1):
            raise RuntimeError(f"A run ended early or hangs:\n{log.read_text()[-2000:]}")
        time.sleep(0.01)
    result = _Rounds([later - earlier for earlier, later in itertools.pairwise(done)])
    for line in lines.read_text().splitlines()[1:]:
        record = json.loads(line)
        if record["refused"]:
            raise RuntimeError(f"A client failed: {record['refused'][0]['reason']}")
        result.of_clients.append(record["metrics"]["train-seconds"])
    return result


def _run(
    system: str, folder: Path, overrides: list[str], nodes: int, rounds: int, device: torch.device
) -> _Rounds:
    folder.mkdir()
    environment = _environment(folder)
    log = folder / "log.txt"
    if system == RAY:
        settings = folder / "run.toml"
        settings.write_text(f"overrides = {json.dumps(' '.join(overrides))}\n")
        cores = os.cpu_count() or 1
        resources = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={cores}"
        if device.type == "cuda":
            # As many clients at a time on the one accelerator as there are cores.
            resources += f" client-resources-num-gpus={1 / cores:.4f} init-args-num-gpus=1"
        command = [str(_scripts() / "flwr"), "run", str(REPOSITORY), "bench", "--stream"]
        command += ["--run-config", str(settings), "--federation-config", resources]
        environment["OMP_NUM_THREADS"] = "1"  # of each of Ray's workers: one a core
    else:
        main = "from server.cli import main; main()"
        command = [sys.executable, "-c", main, "simulate", *overrides]
    run_dir = folder / "run"
    with _ended_at_exit(folder), log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT
        )
        return _follow(run_dir, rounds, process, log)


def _missing() -> str:
    for module, package in (("flwr", "flwr"), ("ray", "flwr[simulation]"), ("PIL", "pillow")):
        if find_spec(module) is None:
            return f"It needs {package}, which is not installed here."
    try:
        distribution("fed-smoothadv")
    except PackageNotFoundError:
        return "This project is not installed here."
    return "" if Path("/proc/self/environ").exists() else "It needs Linux's /proc."


def run(size: Size, device: torch.device) -> Section:
    """Time rounds of both, in turns."""
    nodes, clients, steps, rounds, repeats = 2, 2, 1, 1, 1
    if size is Size.FULL:
        nodes, clients, steps, rounds, repeats = 1000, 10, 10, 2, 2
    if size is Size.FULL and device.type == "cuda":
        clients, steps, repeats = 100, 20, 1
    columns = {
        "what": "What",
        "median_seconds": "Seconds a round, median",
        "least_seconds": "least",
        "most_seconds": "most",
        "client_seconds": "Training a client, s",
        "ratio": f"Times as fast as {RAY}",
        "runs": "Rounds",
    }
    title = f"Rounds in {RAY} and in ours: AlexNet, the same ServerApp and ClientApp"
    if why := _missing():
        return Section(title, columns, [], left_out={RAY: why})
    found = {system: _Rounds() for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name).resolve()
        _write_images(top / "images", max(10 * _SAMPLES, nodes))
        for number, (_, system) in enumerate(itertools.product(range(repeats), SYSTEMS)):
            folder = top / f"run{number}"
            overrides = _overrides(top, folder / "run", nodes, clients, steps, rounds, device.type)
            result = _run(system, folder, overrides + SYSTEMS[system], nodes, rounds, device)
            found[system].seconds.extend(result.seconds)
            found[system].of_clients.extend(result.of_clients)
    timings = {system: Timing(tuple(result.seconds)) for system, result in found.items()}
    rows = []
    for system, timing in timings.items():
        ratio = str(timing.times_faster_than(timings[RAY]))
        middle = Timing(tuple(found[system].of_clients)).median
        rows.append({"what": system, **timing.record(), "client_seconds": middle, "ratio": ratio})
    target = ">= 20x" if device.type == "cuda" else ">= 1.5x"
    return Section(
        title=title,
        columns=columns,
        rows=rows,
        notes=[
            f"{clients} of {nodes} clients a round, E = {steps}, m = 2, T = 2, B = 30; {repeats} runs of "
            f"each in turns, the first round of a run not timed; {os.cpu_count()} cores."
        ],
        headlines=[
            Headline(f"{row['what']}, against {RAY}", row["ratio"], target) for row in rows[1:]
        ],
    )


if __name__ == "__main__":
    main(__doc__ or "", run)
