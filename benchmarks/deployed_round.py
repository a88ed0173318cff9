"""What a round of a deployment costs beyond training, beside bare Flower apps that do nothing.

Four systems take turns on this machine, each a SuperLink and its clients as real processes on
loopback, each sending the same model of 10 MB both ways:

    bare        a Flower app that returns what it got, without PyTorch; stock SuperNodes
    bare+torch  the same, and its client imports PyTorch
    ours        this project's app with one local step; stock SuperNodes
    ours+join   the same with `fedsmooth join` (a warm worker) in place of the SuperNodes

    python benchmarks/deployed_round.py [--quick] [-o FILE]

Prints a table and writes JSON. Not part of any test: times depend on the machine and its load.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SYSTEMS = ("bare", "bare+torch", "ours", "ours+join")
YARDSTICK = "bare+torch"
IMAGE_SIZE = 32  # what AlexNet here takes; with ten classes its weights are 9.9 MB
START_SECONDS = 180.0

_PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "bare-app"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
fab-include = ["bare/*.py"]
[tool.flwr.app.components]
serverapp = "bare.server:app"
clientapp = "bare.client:app"
[tool.flwr.app.config]
model = ""
lines = ""
rounds = 1
clients = 1
"""

_CLIENT = """
{imports}
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    metrics = MetricRecord({{"num-examples": 1}})
    content = RecordDict({{"arrays": message.content["arrays"], "metrics": metrics}})
    return Message(content, reply_to=message)
"""

_SERVER = """
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    with np.load(config["model"]) as model:
        arrays = ArrayRecord({name: Array(model[name]) for name in model.files})
    clients = config["clients"]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)

    def round_done(number, _):
        if number:
            with Path(config["lines"]).open("a") as file:
                file.write("{}\\n")

    strategy.start(
        grid=grid, initial_arrays=arrays, num_rounds=config["rounds"], evaluate_fn=round_done
    )
"""

# What a node prints as a message passes through it, and the phase that ends there: idle is its wait
# for the other clients, the server and its own next look; the others are the message's way.
_MARKS = {
    "Receiving: train message": "idle",
    "Received successfully": "receive",
    "Sending: train message": "answer",
    "Sent successfully": "send",
}
_PHASES = "median_seconds_by_phase"
_STARTED = ("Start `flwr-clientapp` process", "Message taken")


@dataclass
class Rounds:
    """One run of one system: seconds of each round after the first, and seconds of phases."""

    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    load_before: float = 0.0


class Node:
    """A client's processes, and when they printed what."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.lines: list[tuple[float, str]] = []
        self.process = process
        self._log = log
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self._log.open("w") as log:
            for line in self.process.stdout:
                self.lines.append((time.monotonic(), line))
                log.write(line)
                log.flush()

    def phases(self) -> Iterator[tuple[str, float]]:
        """Yield seconds of each phase of each message after the first."""
        last, messages = None, 0
        for when, line in list(self.lines):
            if any(mark in line for mark in _STARTED):
                if last is not None and messages > 1:
                    yield "until a process starts", when - last
                continue
            phase = next((phase for mark, phase in _MARKS.items() if mark in line), None)
            if phase is None:
                continue
            messages += phase == "idle"
            if last is not None and messages > 1 and (phase, messages) != ("idle", 2):
                yield phase, when - last
            last = when


class Deployment:
    """A SuperLink and its clients in a folder of their own, ended with the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self.nodes: list[Node] = []
        self._processes: list[subprocess.Popen[str]] = []
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n"
        )
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FEDSMOOTH_CACHE": str(folder.parent / "decoded"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def __enter__(self) -> "Deployment":
        self.start(
            "superlink",
            f"flower-superlink --insecure --host=127.0.0.1 --port={self.port} "
            "--disable-runtime-dependency-installation".split(),
        )
        health = f"http://127.0.0.1:{self.port}/health"
        _wait(lambda: _answers(health), "The SuperLink does not start")
        return self

    def __exit__(self, *_: object) -> None:
        for kind, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)  # each leads a session of its own
            end = time.monotonic() + patience
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, end - time.monotonic()))
        for straggler in self._detached():
            with contextlib.suppress(ProcessLookupError):
                os.kill(straggler, signal.SIGKILL)

    def _detached(self) -> list[int]:
        """Return the processes that Flower took out of its session: a ServerApp waits for its SuperLink."""
        mark, found = f"FLWR_HOME={self.folder}/".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone by now, or somebody else's
                if mark in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def start(self, name: str, command: list[str]) -> Node:
        """Start a process that ends with this deployment."""
        own = self.folder / name
        own.mkdir()
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=self.environment | {"FLWR_HOME": str(own)},
            cwd=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return Node(process, self.folder / f"{name}.log")

    def join(self, number: int, total: int, warm: bool) -> None:
        """Start one client."""
        facts = f'partition-id={number} num-partitions={total} device="cpu"'
        address, port = f"127.0.0.1:{self.port}", str(_free_port())
        if warm:
            command = ["fedsmooth", "join", "--server", address, "--insecure", "--port", port]
        else:
            command = ["flower-supernode", "--insecure", "--superlink", address]
            command += ["--host", "127.0.0.1", "--port", port]
        self.nodes.append(self.start(f"node{number}", [*command, "--node-config", facts]))

    def run(self, app: Path, run_config: str, lines: Path, rounds: int) -> list[float]:
        """Run the app and return when each of the rounds was over, on the monotonic clock."""
        with (self.folder / "flwr.log").open("w") as log:
            subprocess.run(
                [str(BIN / "flwr"), "run", str(app), "bench", "--run-config", run_config],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
                timeout=120,
            )
        done: list[float] = []
        end = time.monotonic() + START_SECONDS
        while len(done) < rounds:
            count = lines.read_bytes().count(b"\n") if lines.exists() else 0
            if count > len(done):
                done += [time.monotonic()] * (count - len(done))
                end = time.monotonic() + START_SECONDS
            if time.monotonic() > end:
                raise RuntimeError(f"No round for {START_SECONDS:.0f} s: see {self.folder}.")
            time.sleep(0.02)
        return done


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def _wait(ready: Callable[[], bool], problem: str) -> None:
    end = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(problem)
        time.sleep(0.2)


def prepare(folder: Path) -> float:
    """Write the bare apps, the images and the model; return the model's size in MB."""
    for name, imports in (("bare", ""), ("bare+torch", "import torch")):
        package = folder / name / "bare"
        package.mkdir(parents=True)
        (package.parent / "pyproject.toml").write_text(_PYPROJECT)
        (package / "__init__.py").write_text("")
        (package / "client.py").write_text(_CLIENT.format(imports=imports))
        (package / "server.py").write_text(_SERVER)
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 2)):
        for label in range(10):
            images = folder / "images" / split / f"class{label}"
            images.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{number:03d}.png")

    import torch

    from fedsmooth_core.models import ModelSpec, build_model

    spec = ModelSpec("alexnet", "he", 10, 3, IMAGE_SIZE, IMAGE_SIZE)
    state = build_model(spec, [0.5] * 3, [0.2] * 3, torch.Generator()).state_dict()
    np.savez(folder / "model.npz", **{name: value.numpy() for name, value in state.items()})
    return float(sum(value.nbytes for value in state.values())) / 1e6


def run_system(system: str, folder: Path, number: int, rounds: int, clients: int) -> Rounds:
    """Deploy a system, time its rounds, end it."""
    own = folder / f"{number:02d}-{system}"
    own.mkdir()
    result = Rounds(load_before=os.getloadavg()[0])
    if system.startswith("bare"):
        app, lines = folder / system, own / "rounds.jsonl"
        run_config = (
            f'model="{folder / "model.npz"}" lines="{lines}" rounds={rounds + 1} clients={clients}'
        )
    else:
        app, lines = REPOSITORY, own / "run" / "metrics.jsonl"
        overrides = {
            "run_dir": own / "run",
            "dataset": "imagefolder",
            "dataset.root": folder / "images",
            "model": "alexnet",
            "partition": "iid",
            "partition.num_clients": clients,
            "federation.num_rounds": rounds + 1,
            "federation.cohort_fraction": 1.0,
            "training.local_steps": 1,
            "training.batch_size": 4,
            "attack.attack_steps": 0,
            "evaluation.every": 0,
            "certification.at_end": "false",
            "runtime.device": "cpu",
            "runtime.threads": 1,
        }
        words = " ".join(f"{key}={value}" for key, value in overrides.items())
        run_config = f'overrides="{words}"'
    with Deployment(own) as deployment:
        for client in range(clients):
            deployment.join(client, clients, warm=system == "ours+join")
        done = deployment.run(app, run_config, lines, rounds)
    result.seconds = [later - earlier for earlier, later in itertools.pairwise(done)]
    for node in deployment.nodes:
        for phase, seconds in node.phases():
            result.phases[phase].append(seconds)
    for line in lines.read_text().splitlines()[1:]:
        record = json.loads(line)
        for name, seconds in record.get("metrics", {}).items():
            if name.endswith("-seconds"):
                result.phases[f"ClientApp: {name.removesuffix('-seconds')}"].append(seconds)
        for name, seconds in record.get("seconds", {}).items():
            result.phases[f"server: {name}"].append(seconds)
    return result


def facts() -> dict[str, object]:
    """Describe the machine and the software."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))

    def git(*words: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "flwr": version("flwr"),
        "git": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
    }


def summarize(runs: dict[str, list[Rounds]]) -> dict[str, dict[str, Any]]:
    """Pool the runs of each system."""
    table: dict[str, dict[str, Any]] = {}
    for system, results in runs.items():
        seconds = sorted(second for result in results for second in result.seconds)
        phases: dict[str, list[float]] = defaultdict(list)
        for result in results:
            for phase, values in result.phases.items():
                phases[phase] += values
        table[system] = {
            "runs": len(results),
            "rounds": len(seconds),
            "median_seconds": round(statistics.median(seconds), 2),
            "min_seconds": round(seconds[0], 2),
            "max_seconds": round(seconds[-1], 2),
            "median_of_each_run": [round(statistics.median(r.seconds), 2) for r in results],
            "load_before_each_run": [round(result.load_before, 2) for result in results],
            _PHASES: {
                phase: round(statistics.median(values), 3) for phase, values in phases.items()
            },
        }
    for row in table.values():
        if YARDSTICK in table:
            yardstick = table[YARDSTICK]["median_seconds"]
            row[f"ratio_to_{YARDSTICK}"] = round(row["median_seconds"] / yardstick, 2)
    return table


def round_table(table: dict[str, dict[str, Any]]) -> str:
    """Render seconds a round as Markdown."""
    ratio = f"ratio_to_{YARDSTICK}"
    lines = [
        f"| System | Seconds a round, median | Least to most | Ratio to `{YARDSTICK}` | Rounds |"
    ]
    lines += ["|---|---|---|---|---|"]
    for system, row in table.items():
        spread = f"{row['min_seconds']} to {row['max_seconds']}"
        numbers = f"{row['median_seconds']} | {spread} | {row.get(ratio, '')} | {row['rounds']}"
        lines += [f"| `{system}` | {numbers} |"]
    return "\n".join(lines)


def phase_table(table: dict[str, dict[str, Any]]) -> str:
    """Render seconds by phase as Markdown."""
    phases = list(dict.fromkeys(phase for row in table.values() for phase in row[_PHASES]))
    lines = [f"| Phase | {' | '.join(f'`{system}`' for system in table)} |"]
    lines += ["|---" * (len(table) + 1) + "|"]
    for phase in phases:
        cells = (row[_PHASES].get(phase) for row in table.values())
        lines += [f"| {phase} | {' | '.join('' if c is None else f'{c:.2f}' for c in cells)} |"]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("deployed_round.json"))
    parser.add_argument("--rounds", type=int, default=8, help="of each run; the first is not timed")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system, taking turns")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--keep", type=Path, help="an empty folder to leave all logs in")
    parser.add_argument("--quick", action="store_true", help="three rounds, one run, two clients")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats, options.clients = 3, 1, 2
    runs: dict[str, list[Rounds]] = {system: [] for system in options.systems}
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        folder = folder.resolve()
        megabytes = prepare(folder)
        number = 0
        for repeat in range(options.repeats):
            for system in options.systems:
                number += 1
                result = run_system(system, folder, number, options.rounds, options.clients)
                runs[system].append(result)
                shown = " ".join(f"{second:.1f}" for second in result.seconds)
                print(f"[{repeat + 1}/{options.repeats}] {system}: {shown}", flush=True)
    table = summarize(runs)
    report = {
        "what": "seconds a round of a deployment on loopback, from one round's end to the next's",
        "clients": options.clients,
        "model_mb": round(megabytes, 1),
        "machine": facts(),
        "systems": table,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{phase_table(table)}\n\n{round_table(table)}\n")
    print(f"{options.clients} clients, {megabytes:.1f} MB each way; written to {options.output}")


if __name__ == "__main__":
    main()
