"""A warm worker: answers each message of a SuperNode in a process forked from one that is loaded.

Flower's own ``flower-superexec`` starts a fresh interpreter for every message, which then imports
PyTorch. This process takes its place (``flower-supernode --isolation process``): it imports what a
message needs once, opens no accelerator and starts no thread, and forks. A message's process is still
new and alone: what it breaks is not broken for the next, and it imports the project's own modules
from the app that the server shipped.
"""

import argparse
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from logging import ERROR, INFO, WARNING
from multiprocessing.connection import Connection
from types import FrameType

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import message_pb2, node_pb2, runtime_pb2
from flwr.supercore import log
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp as flower

_OWN_PACKAGES = ("client", "server", "fedsmooth_core")
_POLL_SECONDS = 0.2  # the SuperNode itself asks its server every 3 s
_PATIENCE_SECONDS = 5.0  # for a process that was asked to end


def load() -> None:
    """Import what a ClientApp will need, so that a fork of this process has it."""
    for module in ("client.app", "client.certification"):
        importlib.import_module(module)
    import torch

    # The first optimizer of a process imports PyTorch's compiler and sympy: 1.5 s.
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # What is there now stays: a child that never scans it never copies its pages.
    gc.collect()
    gc.freeze()


class Worker:
    """Takes one message after another from a SuperNode's Runtime API, and has it answered.

    Args:
        address: HOST:PORT of the Runtime API, on this machine.
        supernode: process id of the SuperNode.
    """

    def __init__(self, address: str, supernode: int) -> None:
        self._address = address
        self._supernode = supernode
        self._parent = os.getppid()
        self._client = self._connect(RuntimeVersionHttpInterceptor(component_name="SuperExec"))

    def run(self) -> None:
        """Answer messages until the SuperNode or the process that started this one is gone.

        Raises:
            SystemExit: when a message was left in a state that only a new SuperNode gets out of.
        """
        task, token = 0, ""
        while self._wanted():
            if not token:
                task, token = self._acquire()
            if token:
                log(INFO, "Message taken (task %d)", task)
                task, token = self._answer(task, token)
            else:
                time.sleep(_POLL_SECONDS)

    def _wanted(self) -> bool:
        if os.getppid() != self._parent:
            # Nobody would start this worker anew, and a SuperNode without one takes messages and
            # never answers.
            os.kill(self._supernode, signal.SIGTERM)
            return False
        try:
            os.kill(self._supernode, 0)
        except ProcessLookupError:
            return False
        return True

    def _acquire(self) -> tuple[int, str]:
        """Return a waiting task and its token, or an empty token."""
        request = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        try:
            response = self._client.AcquireTask(request)
        except httpx.TransportError:  # the SuperNode is starting, or ending
            return 0, ""
        return response.task.task_id, response.token

    def _answer(self, task: int, token: str) -> tuple[int, str]:
        """Have one message answered; return the next one if that came meanwhile, or an empty token."""
        fork = multiprocessing.get_context("fork")
        notes, telling = fork.Pipe(duplex=False)
        child = fork.Process(target=answer_message, args=(self._address, token, telling))
        child.start()
        telling.close()
        given_up, newer = False, (0, "")
        try:
            while child.exitcode is None and self._wanted() and not given_up:
                child.join(_POLL_SECONDS)
                # A SuperNode takes one message after another: when it offers the next before this one's
                # tensors are there, it lost its server over them, and they never come.
                if not newer[1] and child.exitcode is None and not notes.poll():
                    newer = self._acquire()
                    given_up = bool(newer[1]) and not notes.poll()
        finally:
            _end(child)
        heard = _read_all(notes)
        if given_up:
            log(INFO, "A message that the SuperNode gave up is left (task %d)", task)
            return newer
        if len(heard) == _ANSWERED or not self._wanted():
            return newer
        log(WARNING, "A message's process ended without an answer (exit code %s).", child.exitcode)
        try:
            if len(heard) > _TAKEN:
                raise RuntimeError("half an answer is left behind")
            self._refuse(task, token, heard[0] if heard else b"", _how_it_ended(child.exitcode))
        except (httpx.HTTPError, RuntimeError) as error:
            # The SuperNode believes the task done and waits for its answer without end.
            sys.exit(f"The SuperNode has to be started anew: {error}.")
        return newer

    def _refuse(self, task: int, token: str, taken: bytes, reason: str) -> None:
        """Tell the server now; Flower by itself would notice after a minute, or not at all."""
        client = self._connect(RuntimeTokenHttpInterceptor(token))
        proto = message_pb2.Message.FromString(taken)
        if not taken:
            pulled = client.PullMessages(runtime_pb2.PullAppMessagesRequest())
            if not pulled.messages_list:
                return  # it was being taken: Flower gives the error reply itself, after a minute
            proto = pulled.messages_list[0]
        message = message_from_proto(proto)
        run, node = message.metadata.run_id, message.metadata.dst_node_id
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, run, node
        if not taken:
            client.ConfirmMessageReceived(
                message_pb2.ConfirmMessageReceivedRequest(
                    node=node_pb2.Node(node_id=node),
                    run_id=run,
                    message_object_id=message.metadata.message_id,
                )
            )
        reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=message)
        context = Context(
            run_id=run, node_id=node, node_config={}, state=RecordDict(), run_config={}
        )
        flower.push_message(client, reply, context)
        flower.push_task_output(client, None, SubStatus.FAILED, reason)

    def _connect(
        self, *interceptors: RuntimeVersionHttpInterceptor | RuntimeTokenHttpInterceptor
    ) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            self._address, insecure=True, root_certificates=None, interceptors=interceptors
        )


# What a message's process tells, in this order: the message it took, that it begins to answer, that
# it has answered.
_TAKEN, _ANSWERED = 1, 3


def answer_message(address: str, token: str, telling: Connection) -> None:
    """Answer one message as ``flwr-clientapp`` would; runs in a process of its own.

    Args:
        address: HOST:PORT of the SuperNode's Runtime API.
        token: names the message.
        telling: hears how far the answer got.

    Raises:
        SystemExit: at the end, as Flower does.
    """
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_DFL)
    forget_own_modules()
    pull, push = flower.pull_task_input, flower.push_message

    def pull_and_tell(client: RuntimeHttpClient) -> object:
        received = pull(client)
        question = message_to_proto(remove_content_from_message(received[0]))
        telling.send_bytes(question.SerializeToString())
        return received

    def push_and_tell(client: RuntimeHttpClient, message: Message, context: Context) -> None:
        telling.send_bytes(b"")
        push(client, message, context)
        telling.send_bytes(b"")

    flower.pull_task_input = pull_and_tell  # type: ignore[assignment]
    flower.push_message = push_and_tell
    # A SuperNode offers a message before it has all of its tensors. Flower looks again after a second,
    # for it counts on the second or two that a fresh process takes.
    flower.pull_and_inflate_object_from_tree = functools.partial(  # type: ignore[attr-defined]
        pull_and_inflate_object_from_tree, initial_backoff=0.1, backoff_cap=1.0
    )
    flower.run_clientapp(address, token, insecure=True, parent_pid=os.getppid())


def forget_own_modules() -> None:
    """Make the next import of the project's packages look for them anew, first in Flower's app."""
    for name in list(sys.modules):
        if name.split(".")[0] in _OWN_PACKAGES:
            del sys.modules[name]


def _read_all(notes: Connection) -> list[bytes]:
    heard = []
    try:
        while notes.poll():
            heard.append(notes.recv_bytes())
    except EOFError:
        pass
    finally:
        notes.close()
    return heard


def _end(child: multiprocessing.process.BaseProcess) -> None:
    """Make sure that it is over, and leave no zombie."""
    if child.exitcode is None:
        child.terminate()
        child.join(_PATIENCE_SECONDS)
    if child.exitcode is None:
        child.kill()
    child.join()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        advice = " (most often: out of memory)" if -code == signal.SIGKILL else ""
        return f"the process that answered on this device was ended by {name}{advice}"
    return f"the process that answered on this device ended without an answer (exit code {code})"


def _stop(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a worker: ``python -m client.worker HOST:PORT --supernode PID``."""
    parser = argparse.ArgumentParser(prog="python -m client.worker", description=main.__doc__)
    parser.add_argument("address", help="of the SuperNode's Runtime API")
    parser.add_argument("--supernode", type=int, required=True, help="its process id")
    options = parser.parse_args(arguments)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _stop)
    worker = Worker(options.address, options.supernode)
    code: int | str | None = 0
    try:
        load()
        worker.run()
    except SystemExit as end:
        code = end.code
    if isinstance(code, str):
        log(ERROR, code)
    sys.stdout.flush()
    # Without tearing the interpreter down: libraries take frozen objects for leaks, and say so.
    os._exit(code if isinstance(code, int) else bool(code))


if __name__ == "__main__":
    main()
