"""The ClientApp asked directly, without a server or a SuperNode between."""

from flwr.app import Context, Message, MessageType, RecordDict

import client.app

SIMULATED = {"partition-id": 2, "num-partitions": 4, "device": "cpu"}


def answer(content, node_config=SIMULATED, kind=MessageType.TRAIN):
    message = Message(content, 5, kind)
    message.metadata.__dict__["_message_id"] = "1"
    return client.app.app(message, Context(1, 5, node_config, RecordDict(), {}))


def sentence(reply):
    """The one sentence of an error reply."""
    assert reply.has_error()
    assert not reply.has_content()
    reason = reply.error.reason
    assert "\n" not in reason
    assert "Traceback" not in reason
    assert reason[-1] in ".?"
    return reason
