"""The warm worker against a real SuperNode's Runtime API, served by the test, with an app of the test."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from client.worker import forget_own_modules

pytestmark = [
    pytest.mark.skipif(
        not Path("/proc/self").exists(),
        reason="needs Linux's /proc to see which processes a worker has left",
    ),
    pytest.mark.timeout(120),
]

RUN_ID, NEXT_RUN_ID, NODE_ID = 7, 8, 11

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "small"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "test"
fab-include = ["client/*.py"]
[tool.flwr.app.components]
serverapp = "client.app:app"
clientapp = "client.app:app"
[tool.flwr.app.config]
"""

# Named like the project's own package, as the server ships it: this one must be taken.
APP = """
import os
import signal
import sys
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
started_with = sorted(name for name in ("torch", "torch._dynamo") if name in sys.modules)

@app.train()
def train(message, context):
    wish = message.content["config"]["wish"]
    if wish == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if wish == "exit":
        os._exit(3)
    if wish == "raise":
        raise ZeroDivisionError("as wished")
    facts = ConfigRecord({"process": os.getpid(), "file": __file__, "had": started_with})
    return Message(RecordDict({"facts": facts}), reply_to=message)
"""


class Node:
    """What a SuperNode does between its server and a worker, without the server."""

    def __init__(self, folder):
        app = folder / "app"
        (app / "client").mkdir(parents=True)
        (app / "pyproject.toml").write_text(PYPROJECT)
        (app / "client" / "__init__.py").touch()
        (app / "client" / "app.py").write_text(APP)
        content = build_fab_from_disk(app)
        digest = hashlib.sha256(content).hexdigest()
        factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        self.state = factory.state()
        self.state.set_node_id(NODE_ID)
        self.state.store_fab(Fab(digest, content, {}))
        for run_id in (RUN_ID, NEXT_RUN_ID):
            run = Run.create_empty(run_id)
            run.fab_id, run.fab_version, run.fab_hash = "test/small", "1.0.0", digest
            run.series_id = run_id
            self.state.store_run(run)
            context = Context(
                run_id=run_id, node_id=NODE_ID, node_config={}, state=RecordDict(), run_config={}
            )
            self.state.set_run_series_context(run_id, context)
        self._digest = digest
        self._server = uvicorn.Server(
            uvicorn.Config(create_app(state_factory=factory), log_level="warning")
        )
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))
        self._thread.start()

    def ask(self, wish, run_id=RUN_ID, whole=True):
        """Hand a message to whoever works for this node; without its parts, unless it is ``whole``."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
        content = RecordDict({"config": ConfigRecord({"wish": wish})})
        message = Message(content, NODE_ID, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            self.state.object_store.preregister(run_id, get_object_tree(message))
            for object_id, part in get_all_nested_objects(message).items() if whole else ():
                self.state.object_store.put(object_id, part.deflate())
        self.state.store_message(message)
        self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=run_id, fab_hash=self._digest)
        return message.metadata.message_id

    def answer(self, question, seconds=30.0):
        """Wait for the reply to one message."""
        end = time.monotonic() + seconds
        while not (replies := self.state.get_messages_legacy(is_reply=True)):
            assert time.monotonic() < end, "no reply came"
            time.sleep(0.05)
        (reply,) = replies
        assert reply.metadata.reply_to_message_id == question
        if reply.has_error():
            return reply
        store, tree = self.state.object_store, reply.metadata.message_id
        ids = [tree]
        for object_id in ids:
            ids += [child.object_id for child in store.get_object_tree(object_id).children]
        while any(store.get(object_id) == b"" for object_id in ids):
            time.sleep(0.05)
        contents = {object_id: store.get(object_id) for object_id in ids}
        return inflate_object_from_contents(tree, contents)

    def close(self):
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def start_worker(node, tmp_path):
    started = []

    def start(supernode=None):
        log = (tmp_path / "worker.log").open("w")
        environment = os.environ | {
            "FLWR_HOME": str(tmp_path / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "client.worker", node.address]
        worker = subprocess.Popen(
            [*command, "--supernode", str(supernode or os.getpid())],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.wait()
    print((tmp_path / "worker.log").read_text())


def eventually(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children_of(process):
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in path.read_text().split()]


def test_every_message_has_a_process_of_its_own_that_starts_warm_with_the_shipped_app(
    node, start_worker, tmp_path
):
    worker = start_worker()
    facts = [node.answer(node.ask("answer")).content["facts"] for _ in range(2)]
    assert facts[0]["process"] != facts[1]["process"] != worker.pid
    for fact in facts:
        assert fact["file"].startswith(str(tmp_path / "home"))
        assert fact["had"] == ["torch", "torch._dynamo"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wish", "words"),
    [("kill", "ended by SIGKILL (most often: out of memory)"), ("exit", "exit code 3")],
)
def test_a_crash_is_told_at_once_and_the_next_message_is_answered(node, start_worker, wish, words):
    worker = start_worker()
    node.answer(node.ask("answer"))
    started = time.monotonic()
    reply = node.answer(node.ask(wish))
    assert time.monotonic() - started < 20  # Flower alone: more than a minute, or for ever
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert words in reply.error.reason
    assert node.answer(node.ask("answer")).content["facts"]["process"]
    assert worker.poll() is None
    eventually(lambda: children_of(worker.pid) == [])  # no zombies


@pytest.mark.slow
def test_a_process_killed_before_it_took_its_message_is_told_of_too(node, start_worker):
    worker = start_worker()
    node.answer(node.ask("answer"))
    eventually(lambda: children_of(worker.pid) == [])  # or the process that just answered is killed
    get_run = node.state.get_run
    node.state.get_run = lambda run_id: time.sleep(2) or get_run(run_id)  # its first question
    question = node.ask("answer")
    eventually(lambda: children_of(worker.pid))
    os.kill(children_of(worker.pid)[0], signal.SIGKILL)
    assert node.answer(question).error.code == ErrorCode.CLIENT_APP_CRASHED
    node.state.get_run = get_run
    assert node.answer(node.ask("answer")).content["facts"]["process"]


def test_a_message_that_the_supernode_gave_up_holds_up_no_other(node, start_worker):
    """Its server died while the message's tensors were on their way; a new run asks the next thing."""
    worker = start_worker()
    node.ask("answer", whole=False)
    eventually(lambda: children_of(worker.pid))
    assert node.answer(node.ask("answer", NEXT_RUN_ID)).content["facts"]["process"]
    assert node.answer(node.ask("answer", NEXT_RUN_ID)).content["facts"]["process"]
    eventually(lambda: children_of(worker.pid) == [])
    assert worker.poll() is None


@pytest.mark.slow
def test_where_the_supernode_would_wait_without_end_the_worker_ends(node, start_worker):
    worker = start_worker()
    node.answer(node.ask("answer"))
    # The process cannot take the message, and Flower declares the task over without a reply.
    node.state.activate_task = lambda task_id: False
    node.ask("answer")
    assert worker.wait(20) == 1


@pytest.mark.slow
def test_an_exception_is_flowers_own_error_reply(node, start_worker):
    start_worker()
    reply = node.answer(node.ask("raise"))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "as wished" in reply.error.reason
    assert node.answer(node.ask("answer")).content["facts"]["process"]


@pytest.mark.slow
def test_sigterm_ends_a_worker_quietly(node, start_worker):
    worker = start_worker()
    node.answer(node.ask("answer"))
    worker.terminate()
    assert worker.wait(20) == 0


@pytest.mark.slow
def test_a_worker_ends_with_its_supernode(node, start_worker):
    supernode = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = start_worker(supernode.pid)
    node.answer(node.ask("answer"))
    supernode.communicate(b"\n")
    assert worker.wait(20) == 0


# In a process of its own: what is counted must not have been loaded before.
LOADING = """
import torch
calls = []
torch._C._cuda_getDeviceCount = torch.cuda.is_available = lambda: calls.append(1) or 0
torch.cuda._lazy_init = lambda: calls.append(2)
import os
from pathlib import Path
import scipy.special  # its OpenBLAS, like NumPy's, has threads of its own, made for forks
before = len(list(Path("/proc/self/task").iterdir()))
from client.worker import load
load()
print(len(calls), len(list(Path("/proc/self/task").iterdir())) - before, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_loading_asks_nothing_of_cuda_and_starts_no_thread():
    # A driver that was asked before a fork, or a lock that a thread held, is broken after it.
    done = subprocess.run(
        [sys.executable, "-c", LOADING], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "0"]


def test_the_projects_own_modules_are_looked_for_anew(monkeypatch):
    before = dict(sys.modules)
    try:
        import client.worker
        import fedsmooth_core.errors

        assert client.worker
        assert fedsmooth_core.errors
        forget_own_modules()
        assert "client.worker" not in sys.modules
        assert "fedsmooth_core" not in sys.modules
        assert "flwr.clientapp" in sys.modules
    finally:
        sys.modules.clear()
        sys.modules.update(before)
