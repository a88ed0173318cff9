"""A ClientApp for tests: the project's own, but some clients misbehave in some rounds.

A test puts it into a copy of the project, whose bundle then reaches the SuperNodes as any other.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import client.app

NUM_CLIENTS = 13
DEADLINE_SECONDS = 45.0

MISDEEDS = {
    1: {
        2: "silence",
        3: "late",
        4: "exit",
        5: "killed",
        6: "exception",
        7: "nan",
        8: "infinite",
        9: "shape",
        10: "dtype",
        11: "missing tensor",
        12: "extra tensor",
    },
    2: {
        4: "no number",
        6: "negative",
        7: "zero",
        8: "absurd",
        9: "text",
        10: "metric missing",
        11: "metric more",
        12: "garbage",
    },
    3: {12: "list of numbers"},
}
"""{round: {client: what it does instead of answering well}}."""

app = ClientApp()
app.query()(client.app.describe)


@app.train()
def train(message: Message, context: object) -> Message:
    """Train as the project's client does, and spoil the reply."""
    reply = client.app.train(message, context)
    config = message.content["config"]
    misdeed = MISDEEDS.get(config["server-round"], {}).get(config["partition-id"])
    if misdeed is None:
        return reply
    match misdeed:
        case "silence":
            time.sleep(3600)
        case "late":
            wait_for_the_end_of_a_round()
        case "exit":
            os._exit(1)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exception":
            raise ValueError("this client cannot go on")
        case _:
            return Message(spoiled(reply.content, misdeed), reply_to=message)
    return reply


def wait_for_the_end_of_a_round() -> None:
    """The test's run directory lies in the folder that its processes are found by."""
    metrics = Path(os.environ["FEDSMOOTH_TEST_FOLDER"]) / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.1)


def spoiled(content: RecordDict, misdeed: str) -> RecordDict:
    """Return a good reply with one thing wrong."""
    arrays, metrics = content["arrays"], content["metrics"]
    name = max(arrays, key=lambda name: arrays[name].numpy().size)
    weights = arrays[name].numpy().copy()
    match misdeed:
        case "nan":
            weights.flat[0] = np.nan
            arrays[name] = Array(weights)
        case "infinite":
            weights.flat[-1] = np.inf
            arrays[name] = Array(weights)
        case "shape":
            arrays[name] = Array(weights[:1])
        case "dtype":
            arrays[name] = Array(weights.astype(np.float64))
        case "garbage":
            arrays[name] = Array(arrays[name].dtype, arrays[name].shape, "numpy.ndarray", b"junk")
        case "missing tensor":
            del arrays[name]
        case "extra tensor":
            arrays["backdoor"] = Array(weights)
        case "negative":
            metrics["num-examples"] = -100
        case "zero":
            metrics["num-examples"] = 0
        case "absurd":
            metrics["num-examples"] = 10**12
        case "no number":
            metrics["num-examples"] = float("nan")
        case "list of numbers":
            metrics["num-examples"] = [100, 100]
        case "text":  # a MetricRecord takes no text
            text = ConfigRecord({name: str(value) for name, value in metrics.items()})
            return RecordDict({"arrays": arrays, "metrics": text})
        case "metric missing":
            del metrics["train-loss"]
        case "metric more":
            return RecordDict({"arrays": arrays, "metrics": MetricRecord({**metrics, "best": 1.0})})
        case _:
            raise AssertionError(misdeed)
    return content
