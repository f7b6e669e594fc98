"""The worker's thread when clients leave while they wait, and when a device fails."""

from types import SimpleNamespace

import pytest
from serving_cases import until

from calm.serving.errors import APIError
from calm.serving.worker import Lane, Worker


def waiting_text():
    """A text that keeps what it was sent."""
    sent = []
    return SimpleNamespace(
        is_cancelled=False, send=sent.append, sent=sent, prompt=None, predictor=None, seed=None
    )


class FullSlots:
    """Slots that never become free."""

    free_slot = None


class BrokenSlots:
    """Slots of a device that has failed: whatever is asked of it raises."""

    free_slot = 0

    def begin(self, *arguments):
        raise RuntimeError("the device is lost")

    def free(self, slot):
        raise RuntimeError("the device is lost")


def test_texts_that_left_the_queue_make_room_for_others():
    lane = Lane(FullSlots(), num_slots=0, max_waiting=1)
    worker, gone, other = Worker([lane]), waiting_text(), waiting_text()
    worker.start()
    worker.submit(lane, [gone])
    with pytest.raises(APIError, match="1 texts are being written or wait"):
        worker.submit(lane, [other])
    gone.is_cancelled = True
    until(lambda: not lane.waiting)
    worker.submit(lane, [other])
    worker.stop()
    assert gone.sent == [] and [error.status_code for error in other.sent] == [503]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lost_device_leaves_no_text_without_an_answer():
    broken = Lane(BrokenSlots(), num_slots=1, max_waiting=1)
    other = Lane(FullSlots(), num_slots=0, max_waiting=1)
    texts = [waiting_text() for _ in range(3)]
    broken.waiting.extend(texts[:2])
    other.waiting.append(texts[2])
    worker = Worker([broken, other])
    worker.start()
    until(lambda: all(text.sent for text in texts))
    assert [[error.status_code for error in text.sent] for text in texts] == [[500], [500], [503]]
    assert not worker.is_alive
    with pytest.raises(APIError):
        worker.submit(other, [waiting_text()])
    worker.stop()
