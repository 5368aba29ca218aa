"""What a test writes down in each pass: SMART puts every list that a hook can reach back after a pass, but not this."""

import queue
from typing import Any


class Notes:
    """Values in the order in which they came."""

    def __init__(self) -> None:
        self._values: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def add(self, value: Any) -> None:
        """Write one down; gives None, so that a forward hook may return it."""
        self._values.put(value)

    def taken(self) -> list[Any]:
        """All since the last time."""
        return [self._values.get() for _ in range(self._values.qsize())]
