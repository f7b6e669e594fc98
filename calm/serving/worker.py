"""The thread in which all models run: texts wait, get a slot, grow by a chunk a step, and leave.

A `Lane` is one model with its slots and its queue. Between two steps of a lane texts that nobody
waits for leave, and waiting ones take the free slots. Nothing else touches a model.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence

from calm.decoding.chunk import ChunkRecord
from calm.decoding.slots import SlotBatch
from calm.errors import UserError
from calm.serving.errors import APIError, bad_request
from calm.serving.texts import WrittenText

__all__ = ["Lane", "Worker"]

logger = logging.getLogger(__name__)

STOPPING = "the server is shutting down"


class Lane:
    """A model's slots, and the texts that wait for one.

    Args:
        slots: of the model.
        num_slots: how many.
        max_waiting: texts that may wait beside those in slots.
    """

    def __init__(self, slots: SlotBatch, *, num_slots: int, max_waiting: int) -> None:
        self.slots, self.max_texts = slots, num_slots + max_waiting
        self.waiting: deque[WrittenText] = deque()
        self.active: dict[int, WrittenText] = {}

    @property
    def num_texts(self) -> int:
        """Texts in slots and in the queue."""
        return len(self.waiting) + len(self.active)

    def check_size(self, count: int) -> None:
        """`APIError` for a request of so many texts that there is never room for them."""
        if count > self.max_texts:
            raise bad_request(
                "n",
                f"the request asks for {count} texts; this server takes at most {self.max_texts} "
                "at a time",
            )

    def drop_cancelled(self) -> None:
        """Forget waiting texts that nobody waits for; no text may be queued meanwhile."""
        if any(text.is_cancelled for text in self.waiting):
            self.waiting = deque(text for text in self.waiting if not text.is_cancelled)

    def advance(self) -> None:
        """Free the slots of cancelled texts, fill free ones, and draw a chunk of every text."""
        for slot, text in list(self.active.items()):
            if text.is_cancelled:
                self._free(slot)
        while self.waiting and (free := self.slots.free_slot) is not None:
            text = self.waiting.popleft()
            if not text.is_cancelled:
                self._begin(free, text)
        if self.active:
            for slot, record in self.slots.step().items():
                self._add(slot, record)

    def abandon(self, error: Exception) -> None:
        """End every text with an error, and free all slots."""
        slots = list(self.active)
        self.dismiss(error)
        for slot in slots:
            self.slots.free(slot)

    def dismiss(self, error: Exception) -> None:
        """End every text with an error; slots, which may be broken, are not touched."""
        while self.active:
            self.active.popitem()[1].send(error)
        while self.waiting:
            self.waiting.popleft().send(error)

    def _begin(self, slot: int, text: WrittenText) -> None:
        self.active[slot] = text
        self._add(slot, self.slots.begin(slot, text.prompt, text.predictor, text.seed))

    def _add(self, slot: int, record: ChunkRecord) -> None:
        try:
            if self.active[slot].add(record):
                self._free(slot)
        except UserError as error:  # of this text alone: its numbers are not finite
            self._fail(slot, error)

    def _fail(self, slot: int, error: Exception) -> None:
        self.active[slot].send(error)
        self._free(slot)

    def _free(self, slot: int) -> None:
        self.slots.free(slot)
        del self.active[slot]


class Worker:
    """One thread that advances all lanes in turn.

    Args:
        lanes: at least one.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = list(lanes)
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="calm-worker", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether texts are written."""
        return self._thread.is_alive() and not self._is_stopping

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that runs, and every text with an error; waits for that."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, lane: Lane, texts: Sequence[WrittenText]) -> None:
        """Queue texts: all of them or none.

        Raises:
            APIError: they have no room in the queue now (429), or the server is shutting down
                (503).
        """
        with self._wake:
            if not self.is_alive:
                raise APIError(503, STOPPING)
            if lane.num_texts + len(texts) > lane.max_texts:
                raise APIError(
                    429,
                    f"{lane.num_texts} texts are being written or wait, and there is room for "
                    f"{lane.max_texts}; try again later",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": "1"},
                )
            lane.waiting.extend(texts)
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._advance_lanes()
        finally:  # also where a device has failed and slots cannot even be freed
            with self._wake:
                self._is_stopping = True
            for lane in self.lanes:
                lane.dismiss(APIError(503, STOPPING))

    def _advance_lanes(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._is_stopping or any(lane.num_texts for lane in self.lanes)
                )
                if self._is_stopping:
                    return
                for lane in self.lanes:
                    lane.drop_cancelled()
            for lane in self.lanes:
                try:
                    lane.advance()
                except Exception:
                    logger.exception("a decode step failed; its texts end with an error")
                    lane.abandon(APIError(500, "a decode step failed; the server's log says more"))
