"""The ClientApp asked directly, without a server or a SuperNode between."""

from flwr.app import Context, Message, MessageType, RecordDict

import client.app

SIMULATED = {"partition-id": 2, "num-partitions": 4, "device": "cpu"}


def asked(content, node_config=SIMULATED, kind=MessageType.TRAIN, message_id="1"):
    """The message and the context that an app is called with."""
    message = Message(content, 5, kind)
    message.metadata.__dict__["_message_id"] = message_id
    return message, Context(1, 5, node_config, RecordDict(), {})


def answer(content, node_config=SIMULATED, kind=MessageType.TRAIN):
    return client.app.app(*asked(content, node_config, kind))


def sentence(reply):
    """The one sentence of an error reply."""
    assert reply.has_error()
    assert not reply.has_content()
    reason = reply.error.reason
    assert "\n" not in reason
    assert "Traceback" not in reason
    assert reason[-1] in ".?"
    return reason
