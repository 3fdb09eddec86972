"""What a logger does is done behind the training's back, in a thread of its own: a slow one delays nothing, one that fails is said once.

W&B hands its records to a process of its own, and still what happens before that took up to 1.4 s here (wandb.init), 1.1 s (the
first table), and raises once that process is gone. Other loggers write where they are called. So all of them are called from here.
"""

from __future__ import annotations

import collections
import signal
import threading
from collections.abc import Callable

Event = Callable[[], object]
LIMIT = 10_000  # events that wait; beyond them the oldest go
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


class Line:
    """Does what it is handed, in order.

    Args:
        name: of the logger, for what is said.
        first: done before all else; if it fails, nothing else is done.
        say: told, once each: that something failed, that it is too slow.
    """

    def __init__(self, name: str, first: Event, say: Callable[[str], None], limit: int = LIMIT) -> None:
        self.name, self.say = name, say
        self.dropped = self.failed = 0
        self._first, self._limit = first, limit
        self._waiting: collections.deque[Event] = collections.deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)  # daemon: it may hang where the run has ended
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether the caller is the thread itself."""
        return threading.current_thread() is self._thread

    def put(self, event: Event) -> None:
        """Never waits."""
        with self._changed:
            if self._ended:
                return
            if len(self._waiting) >= self._limit:
                self._waiting.popleft()
                self.dropped += 1
                if self.dropped == 1:
                    self.say(f"logger {self.name} cannot keep up: more than {self._limit:,} of its entries wait, the oldest are dropped. The training goes on.")
            self._waiting.append(event)
            self._changed.notify()

    def close(self, last: Event, patience: float) -> bool:
        """Do what waits, then `last`; whether it was over within `patience` seconds."""
        self.put(last)
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(patience)
        if self._thread.is_alive():
            self.say(f"logger {self.name} has not finished after {patience:.0f} s, with {len(self._waiting):,} entries waiting: the run ends without it.")
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the main thread answers them: here they would not wake it
        if not self._do(self._first):
            with self._changed:
                self._ended = True
                self._waiting.clear()
            return
        while (event := self._next()) is not None:
            self._do(event)

    def _next(self) -> Event | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            return self._waiting.popleft() if self._waiting else None

    def _do(self, event: Event) -> bool:
        try:
            event()
        except Exception as e:  # the border of the thread: whatever a logger raises is no reason to stop
            self.failed += 1
            if self.failed == 1:
                said = " ".join(str(e).split())
                self.say(f"logger {self.name} failed: {type(e).__name__}: {said[:300]}. The training goes on; further failures of it are not shown.")
            return False
        return True
