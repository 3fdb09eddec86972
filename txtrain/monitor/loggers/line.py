"""Calls a logger from a thread of its own: a slow one delays nothing, and a failure is reported once.

W&B hands its records to another process, but what it does before took up to 1.4 s here (wandb.init) and 1.1 s (the
first table), and raises once that process is gone. Other loggers write where they are called. So all have a thread.
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
LIMIT = 10_000  # events that may wait; beyond that the oldest are dropped
HANGS = 600.0  # seconds that one event may take before the logger is dropped
SLOW, WATCHED = 0.5, 60.0  # share of the time that it works, over at least so many seconds, above which it is slow


class Line:
    """Executes events in order.

    Args:
        name: of the logger, for messages.
        first: the first event; if it fails, no other is executed.
        say: prints, once each, that an event failed, that the logger is slow, cannot keep up or hangs; then counts.
    """

    def __init__(self, name: str, first: Event, say: Callable[[str], None], limit: int = LIMIT) -> None:
        self.name, self.say = name, say
        self.done = self.dropped = self.failed = 0
        self._first, self._limit = first, limit
        self._waiting: collections.deque[tuple[Event, float]] = collections.deque()
        self._changed = threading.Condition()
        self._ended = self._hangs = self._slow = False
        self._since: tuple[float, float] | None = None  # of the current event: when it began, how long it may take
        self._begun, self._worked = time.monotonic(), 0.0  # seconds, of finished events
        # A daemon: it may hang when the run has ended.
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether the caller is the thread itself."""
        return threading.current_thread() is self._thread

    def put(self, event: Event, patience: float | None = None) -> None:
        """Queue an event; never waits. patience: seconds that it may take."""
        with self._changed:
            self._judge()
            if self._ended:
                return
            if len(self._waiting) >= self._limit:
                self._waiting.popleft()
                self.dropped += 1
                if self.dropped == 1:
                    self.say(
                        f"logger {self.name} cannot keep up: more than {self._limit:,} of its entries wait, "
                        "the oldest are dropped. The training goes on."
                    )
            self._waiting.append((event, HANGS if patience is None else patience))
            self._changed.notify()

    def _judge(self) -> None:
        """Report if the logger is slow; drop it if it hangs."""
        now, (began, patience) = time.monotonic(), self._since or (float("inf"), 0.0)
        worked = self._worked + max(0.0, now - began)
        share = worked / max(now - self._begun, WATCHED)
        if share > SLOW and not self._slow:
            self._slow = True
            each = worked / max(1, self.done + self.failed)
            self.say(
                f"logger {self.name} is slow: it works {share:.0%} of the time, {each:.2g} s for an entry. "
                "The training does not wait for it."
            )
        if now - began > patience and not self._ended:
            self._ended = self._hangs = True
            self.dropped += len(self._waiting)
            self._waiting.clear()
            self.say(
                f"logger {self.name} has not answered for {now - began:.0f} s: it is dropped. The training goes on."
            )

    def close(self, last: Event, patience: float) -> bool:
        """Execute what waits, then `last`. Returns whether `patience` seconds were enough; reports what is lost."""
        self.put(last, patience=float("inf"))
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(0 if self._hangs else patience)
        over = not self._thread.is_alive()
        if not over and not self._hangs:
            self.say(
                f"logger {self.name} has not finished after {patience:.0f} s, "
                f"with {len(self._waiting):,} entries waiting: the run ends without it."
            )
        if self.failed > 1 or self.dropped:
            self.say(
                f"logger {self.name}: {self.done:,} entries were done, {self.failed:,} failed, "
                f"{self.dropped:,} were dropped."
            )
        return over

    # ------------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they must wake the main thread, which handles them
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
        except Exception as e:  # no error of a logger stops its thread
            self.failed += 1
            if self.failed == 1:
                said = " ".join(str(e).split())
                self.say(
                    f"logger {self.name} failed: {type(e).__name__}: {said[:300]}. "
                    "The training goes on; further failures of it are not shown."
                )
            return False
        finally:
            self._since = None
            self._worked += time.monotonic() - began
        self.done += 1
        return True


def within(seconds: float, do: Callable[[], T]) -> T:
    """The result of `do`, called in a thread since it may hang.

    Raises:
        TimeoutError: it takes longer than `seconds`. Also what `do` raises.
    """
    made: list[T] = []
    raised: list[Exception] = []

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            made.append(do())
        except Exception as e:  # raised in the caller
            raised.append(e)

    thread = threading.Thread(target=work, name="logger is made", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not made:
        raise TimeoutError(f"no answer for {seconds:.0f} s")
    return made[0]
