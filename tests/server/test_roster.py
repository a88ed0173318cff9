"""The roster: a stable client number for every node that answers as it should."""

import dataclasses
import logging

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

import client.app
import server.roster
from fedsmooth_core.errors import TrainingError
from server.roster import Roster
from server.simulation import InProcessGrid


class NodesGrid(InProcessGrid):
    """Nodes with configurations of their own, in the order given; ``connected`` may be changed."""

    def __init__(self, node_configs, client_app=client.app.app):
        super().__init__(0, client_app=client_app)
        self._contexts = {
            node: Context(1, node, config, RecordDict(), {})
            for node, config in node_configs.items()
        }
        self.connected = list(node_configs)
        self.questions = []

    def get_node_ids(self):
        return list(self.connected)

    def push_messages(self, messages):
        messages = list(messages)
        self.questions += [message.metadata.dst_node_id for message in messages]
        return super().push_messages(messages)


def partitions(numbers, total):
    """Node 100 + i is the client of ``numbers[i]``."""
    return {
        100 + i: {"partition-id": number, "num-partitions": total}
        for i, number in enumerate(numbers)
    }


def devices(*nodes):
    return {node: {"data-path": "/data"} for node in nodes}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(server.roster, "_POLL_SECONDS", 0.0)


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_simulated_node_is_the_client_of_its_partition():
    grid = NodesGrid(partitions([2, 0, 1], 3))
    assert Roster(3).wait(grid, 3, 3, 1, 1) == {2: 100, 0: 101, 1: 102}


def test_devices_are_numbered_by_node_id_whatever_order_they_answer_in():
    assert Roster(3).wait(NodesGrid(devices(30, 10, 20)), 3, 3, 1, 1) == {0: 10, 1: 20, 2: 30}
    assert Roster(3).wait(NodesGrid(devices(20, 30, 10)), 3, 3, 1, 1) == {0: 10, 1: 20, 2: 30}


def test_devices_take_the_numbers_that_partitions_leave():
    nodes = partitions([1], 3) | devices(9, 5)
    assert Roster(3).wait(NodesGrid(nodes), 3, 3, 1, 1) == {1: 100, 0: 5, 2: 9}


def test_a_node_is_asked_once_and_keeps_its_number():
    grid = NodesGrid(devices(10, 20))
    roster = Roster(3)
    assert roster.refresh(grid) == {0: 10, 1: 20}
    grid.connected = [20]
    assert roster.refresh(grid) == {1: 20}
    grid._contexts[5] = dataclasses.replace(grid._contexts[10], node_id=5)
    grid.connected = [5, 10, 20]
    assert roster.refresh(grid) == {0: 10, 1: 20, 2: 5}
    # Node 10 left in between, and might have come back as something else.
    assert grid.questions == [10, 20, 5, 10]


def test_it_waits_for_nodes_that_appear_late():
    class SlowGrid(NodesGrid):
        calls = 0

        def get_node_ids(self):
            self.calls += 1
            return self.connected[: self.calls - 1]

    grid = SlowGrid(partitions([0, 1, 2], 3))
    assert Roster(3).wait(grid, 3, 3, 60, 60) == {0: 100, 1: 101, 2: 102}
    assert grid.calls == 4


def test_a_client_that_never_connects_ends_the_wait_with_a_sentence():
    with pytest.raises(TrainingError) as error:
        Roster(4).wait(NodesGrid(partitions([0, 1, 3], 4)), 4, 4, 0.01, 0.01)
    assert str(error.value).startswith(
        "Only 3 of the 4 clients that a round needs connected within 0.01 seconds: "
    )
    assert "federation.connect_timeout_seconds" in str(error.value)


def test_two_nodes_of_one_partition_are_one_client(log):
    roster = Roster(2)
    assert roster.refresh(NodesGrid(partitions([1, 1], 2))) == {1: 100}
    assert "Node 101 is left out: partition-id=1 is another node's already" in log.text


def test_a_federation_of_another_size_is_refused():
    with pytest.raises(TrainingError) as error:
        Roster(10).wait(NodesGrid(partitions([0, 1, 2, 3], 4)), 10, 10, 0.01, 0.01)
    message = str(error.value)
    assert "4 partitions" in message
    assert "partition.num_clients=10" in message
    assert "num-supernodes=10" in message


def test_a_node_that_cannot_say_who_it_is_is_left_out_with_its_reason(log):
    both = {"data-path": "/data", "partition-id": 0, "num-partitions": 1}
    grid = NodesGrid(partitions([0], 1) | {50: both})
    assert Roster(1).refresh(grid) == {0: 100}
    assert "Node 50 is left out" in log.text
    assert "both a partition and" in log.text


@pytest.mark.parametrize("partition", [-1, 2, 1.0, "1", True])
def test_an_answer_that_is_no_partition_is_left_out(partition, log):
    """The client checks its own configuration; the server takes no client's word for it."""
    app = ClientApp()

    @app.query()
    def answer(message, context):
        record = ConfigRecord({"partition-id": partition, "num-partitions": 2})
        return Message(RecordDict({"config": record}), reply_to=message)

    assert Roster(2).refresh(NodesGrid({7: {}}, app)) == {}
    assert f"its partition-id={partition!r} is no partition" in log.text


def test_an_error_made_up_for_a_lost_node_leaves_no_other_node_out():
    """Flower answers for a lost node as node 1; the node is asked again while it is connected."""
    lost = True

    class LosingGrid(NodesGrid):
        def pull_messages(self, message_ids):
            for reply in super().pull_messages(message_ids):
                if lost and reply.metadata.src_node_id == 101:
                    # Its source is the destination of what it replies to: node 1, the server.
                    reply = Message(Error(5, "node unavailable"), reply_to=reply)
                yield reply

    grid = LosingGrid(partitions([0, 1], 2))
    roster = Roster(2)
    assert roster.refresh(grid) == {0: 100}
    lost = False
    assert roster.refresh(grid) == {0: 100, 1: 101}


def test_a_node_that_comes_back_under_another_id_takes_its_partition_again():
    nodes = {**partitions([0, 1], 2), 150: {"partition-id": 1, "num-partitions": 2}}
    grid, roster = NodesGrid(nodes), Roster(2)
    grid.connected = [100, 101]
    assert roster.wait(grid, 2, 2, 1, 1) == {0: 100, 1: 101}
    grid.connected = [100, 150]
    assert roster.wait(grid, 2, 2, 1, 1) == {0: 100, 1: 150}


def test_a_later_wait_goes_on_with_the_nodes_that_are_left():
    grid, roster = NodesGrid(partitions([0, 1], 2)), Roster(2)
    roster.wait(grid, 2, 2, 1, 1)
    grid.connected = [101]
    assert roster.wait(grid, 1, 1, 1, 1) == {1: 101}


def test_nodes_that_say_nothing_are_given_the_numbers_that_are_free():
    nodes = {30: {}, 10: {}, 20: {"partition-id": 1, "num-partitions": 3}}
    assert Roster(3).wait(NodesGrid(nodes), 3, 3, 1, 1) == {0: 10, 1: 20, 2: 30}


def test_a_number_is_kept_over_an_interruption():
    kept = {}
    roster = Roster(4, remember=kept.update)
    grid = NodesGrid(devices(10, 20, 30))
    assert roster.refresh(grid) == kept == {0: 10, 1: 20, 2: 30}
    grid = NodesGrid(devices(5, 10, 20, 30))
    assert Roster(4, kept).refresh(grid) == {0: 10, 1: 20, 2: 30, 3: 5}


def test_a_number_that_no_node_ever_had_goes_first_and_then_that_of_a_node_that_is_gone():
    grid = NodesGrid(devices(10, 20, 30, 40))
    roster = Roster(3)
    grid.connected = [10, 20]
    assert roster.refresh(grid) == {0: 10, 1: 20}
    grid.connected = [20, 30]
    assert roster.refresh(grid) == {1: 20, 2: 30}
    grid.connected = [20, 30, 40]
    assert roster.refresh(grid) == {0: 40, 1: 20, 2: 30}
    # The first one is back, and there is no number left for it until somebody leaves.
    grid.connected = [10, 20, 30, 40]
    assert roster.refresh(grid) == {0: 40, 1: 20, 2: 30}
    grid.connected = [10, 20, 40]
    assert roster.refresh(grid) == {0: 40, 1: 20, 2: 10}


def test_a_partition_of_ones_own_wins_over_a_number_that_was_handed_out():
    nodes = {10: {}, 20: {}, 30: {"partition-id": 0, "num-partitions": 3}}
    grid, roster = NodesGrid(nodes), Roster(3)
    grid.connected = [10, 20]
    assert roster.refresh(grid) == {0: 10, 1: 20}
    grid.connected = [10, 20, 30]
    assert roster.refresh(grid) == {0: 30, 1: 20, 2: 10}


def test_who_was_refused_is_asked_again_later(monkeypatch):
    both = {"data-path": "/data", "partition-id": 0, "num-partitions": 1}
    grid, roster = NodesGrid({50: both}), Roster(1)
    assert roster.refresh(grid) == roster.refresh(grid) == {}
    assert grid.questions == [50]
    grid._contexts[50] = dataclasses.replace(grid._contexts[50], node_config={"data-path": "/data"})
    monkeypatch.setattr(server.roster, "_ASK_AGAIN_SECONDS", 0.0)
    assert roster.refresh(grid) == {0: 50}


def test_some_nodes_of_another_size_do_not_stop_the_others(log):
    nodes = partitions([0, 1], 2) | {200: {"partition-id": 5, "num-partitions": 9}}
    assert Roster(2).wait(NodesGrid(nodes), 2, 2, 1, 1) == {0: 100, 1: 101}
    assert "Node 200 is left out: it is one of 9 partitions" in log.text


def test_after_the_wait_fewer_will_do():
    assert Roster(4).wait(NodesGrid(devices(7, 8)), 4, 2, 0.01, 0.01) == {0: 7, 1: 8}


def test_a_node_that_does_not_answer_is_no_client_and_holds_nobody_up():
    class HalfDeaf(NodesGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            return [reply for reply in replies if reply.metadata.src_node_id != 8]

    grid, roster = HalfDeaf(devices(7, 8, 9)), Roster(3)
    assert roster.refresh(grid) == {0: 7, 1: 9}
    assert roster.refresh(grid) == {0: 7, 1: 9}
    assert grid.questions == [7, 8, 9]


def test_a_question_that_got_lost_is_put_again(monkeypatch):
    class LosesTheFirst(NodesGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            return replies if self.questions.count(8) > 1 else []

    grid, roster = LosesTheFirst(devices(8)), Roster(1)
    assert roster.refresh(grid) == roster.refresh(grid) == {}
    assert grid.questions == [8]
    monkeypatch.setattr(server.roster, "_LOST_SECONDS", 0.0)
    assert roster.refresh(grid) == {0: 8}
    assert grid.questions == [8, 8]


def test_a_node_cannot_drive_others_off_their_numbers_one_after_another(log):
    """It leaves and comes back, and claims the next partition every time."""
    grid, roster = NodesGrid(devices(10, 20) | partitions([0], 3)), Roster(3)
    grid.connected = [10, 20]
    assert roster.refresh(grid) == {0: 10, 1: 20}
    grid.connected = [10, 20, 100]
    assert roster.refresh(grid) == {0: 100, 1: 20, 2: 10}
    grid.connected = [10, 20]
    roster.refresh(grid)
    config = {"partition-id": 1, "num-partitions": 3}
    grid._contexts[100] = dataclasses.replace(grid._contexts[100], node_config=config)
    grid.connected = [10, 20, 100]
    assert roster.refresh(grid) == {1: 20, 2: 10}
    assert "a node keeps its partition for the whole run" in log.text
