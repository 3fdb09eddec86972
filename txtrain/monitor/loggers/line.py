"""What a logger does is done behind the training's back, in a thread of its own: a slow one delays nothing, one that fails is said once.

W&B hands its records to a process of its own, and still what happens before that took up to 1.4 s here (wandb.init), 1.1 s (the
first table), and raises once that process is gone. Other loggers write where they are called. So all of them are called from here.
"""

from __future__ import annotations

import collections
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from txtrain.parallel.early_signals import SIGNALS

Event = Callable[[], object]
T = TypeVar("T")
LIMIT = 10_000  # events that wait; beyond them the oldest go
HANGS = 600.0  # seconds that one event may take: a logger that needs longer is dropped
SLOW, WATCHED = 0.5, 60.0  # share of the time in which it works, over at least so many seconds, from which it is called slow


class Line:
    """Does what it is handed, in order.

    Args:
        name: of the logger, for what is said.
        first: done before all else; if it fails, nothing else is done.
        say: told, once each: that something failed, that it is slow, cannot keep up or hangs; at the end, how often.
    """

    def __init__(self, name: str, first: Event, say: Callable[[str], None], limit: int = LIMIT) -> None:
        self.name, self.say = name, say
        self.done = self.dropped = self.failed = 0
        self._first, self._limit = first, limit
        self._waiting: collections.deque[tuple[Event, float]] = collections.deque()
        self._changed = threading.Condition()
        self._ended = self._hangs = self._slow = False
        self._since: tuple[float, float] | None = None  # when the event that is being done began, and how long it may take
        self._begun, self._worked = time.monotonic(), 0.0  # seconds, of the events that are done
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)  # daemon: it may hang where the run has ended
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether the caller is the thread itself."""
        return threading.current_thread() is self._thread

    def put(self, event: Event, patience: float | None = None) -> None:
        """Never waits. patience: seconds that the event may take."""
        with self._changed:
            self._judge()
            if self._ended:
                return
            if len(self._waiting) >= self._limit:
                self._waiting.popleft()
                self.dropped += 1
                if self.dropped == 1:
                    self.say(f"logger {self.name} cannot keep up: more than {self._limit:,} of its entries wait, the oldest are dropped. The training goes on.")
            self._waiting.append((event, HANGS if patience is None else patience))
            self._changed.notify()

    def _judge(self) -> None:
        """Whether it is slow, or hangs: then nothing more is done."""
        now, (began, patience) = time.monotonic(), self._since or (float("inf"), 0.0)
        worked = self._worked + max(0.0, now - began)
        share = worked / max(now - self._begun, WATCHED)
        if share > SLOW and not self._slow:
            self._slow = True
            each = worked / max(1, self.done + self.failed)
            self.say(f"logger {self.name} is slow: it works {share:.0%} of the time, {each:.2g} s for an entry. The training does not wait for it.")
        if now - began > patience and not self._ended:
            self._ended = self._hangs = True
            self.dropped += len(self._waiting)
            self._waiting.clear()
            self.say(f"logger {self.name} has not answered for {now - began:.0f} s: it is dropped. The training goes on.")

    def close(self, last: Event, patience: float) -> bool:
        """Do what waits, then `last`; whether it was over within `patience` seconds. At the end it is said what was not done."""
        self.put(last, patience=float("inf"))
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(0 if self._hangs else patience)
        over = not self._thread.is_alive()
        if not over and not self._hangs:
            self.say(f"logger {self.name} has not finished after {patience:.0f} s, with {len(self._waiting):,} entries waiting: the run ends without it.")
        if self.failed > 1 or self.dropped:
            self.say(f"logger {self.name}: {self.done:,} entries were done, {self.failed:,} failed, {self.dropped:,} were dropped.")
        return over

    # ------------------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the main thread answers them: here they would not wake it
        if not self._do(self._first, HANGS):
            with self._changed:
                self._ended = True
                self._waiting.clear()
            return
        while (event := self._next()) is not None:
            self._do(*event)

    def _next(self) -> tuple[Event, float] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            return self._waiting.popleft() if self._waiting else None

    def _do(self, event: Event, patience: float) -> bool:
        began = time.monotonic()
        self._since = began, patience
        try:
            event()
        except Exception as e:  # the border of the thread: whatever a logger raises is no reason to stop
            self.failed += 1
            if self.failed == 1:
                said = " ".join(str(e).split())
                self.say(f"logger {self.name} failed: {type(e).__name__}: {said[:300]}. The training goes on; further failures of it are not shown.")
            return False
        finally:
            self._since = None
            self._worked += time.monotonic() - began
        self.done += 1
        return True


def within(seconds: float, do: Callable[[], T]) -> T:
    """What is done in a thread, since it may hang.

    Raises:
        TimeoutError: it is not over after so many seconds. And what it raises.
    """
    made: list[T] = []
    raised: list[Exception] = []

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            made.append(do())
        except Exception as e:  # the caller's
            raised.append(e)

    thread = threading.Thread(target=work, name="logger is made", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not made:
        raise TimeoutError(f"no answer for {seconds:.0f} s")
    return made[0]
