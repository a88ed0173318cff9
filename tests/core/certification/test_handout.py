import threading

from fedsmooth_core.certification.handout import Handout, in_order


def test_each_position_is_handed_out_once_and_in_order():
    handout = Handout(7)
    assert handout.take(3, wait=True) == [0, 1, 2]
    assert handout.take(0, wait=False) == []
    assert handout.take(9, wait=False) == [3, 4, 5, 6]
    assert handout.take(1, wait=True) == []


def test_no_more_than_the_bound_are_handed_out_ahead():
    handout = Handout(5, most_ahead=2)
    assert handout.take(4, wait=True) == [0, 1]
    assert handout.take(4, wait=False) == []
    handout.advance()
    assert handout.take(4, wait=False) == [2]


def test_nobody_is_given_more_than_a_share_of_what_is_left():
    """Two images of many draws fill one group of passes, yet two workers take one each."""
    handout = Handout(7, num_takers=2)
    assert [handout.take(16, wait=True) for _ in range(4)] == [[0, 1, 2, 3], [4, 5], [6], []]
    assert Handout(2, num_takers=2).take(16, wait=True) == [0]


def test_who_waits_goes_on_when_rows_were_taken_and_ends_when_it_closes():
    handout, taken = Handout(5, most_ahead=1), []

    def work():
        while positions := handout.take(4, wait=True):
            taken.append(positions)

    thread = threading.Thread(target=work)
    thread.start()
    handout.advance()
    handout.advance()
    handout.close()
    thread.join(10)
    assert not thread.is_alive()
    flat = [position for positions in taken for position in positions]
    assert flat == list(range(len(flat)))


def test_rows_come_by_position_each_as_soon_as_it_can():
    given = []

    def rows():
        for position in (1, 0, 3, 4, 2):
            given.append(position)
            yield position, f"row {position}"

    ordered = in_order(rows())
    assert next(ordered) == "row 0"
    assert given == [1, 0]
    assert list(ordered) == ["row 1", "row 2", "row 3", "row 4"]
