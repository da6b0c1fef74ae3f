"""Stopping a training run by a signal: it ends after a step, with a checkpoint."""

import os
import signal
import threading

import jax


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
      exit_status: 128 and the signal's number, as shells count: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, told: str, exit_status: int = 128 + signal.SIGTERM):
        super().__init__(told)
        self.exit_status = exit_status


class StopOnSignal:
    """SIGTERM and a first Ctrl-C ask for a checkpoint and a clean stop.

    Of several processes SIGTERM belongs to jax's preemption service, which tells the others; a
    Ctrl-C becomes one.

    Attributes:
      asked_by: number of the signal that this process was given; SIGTERM where another one was.
    """

    def __init__(self, stop: threading.Event):
        self._stop, self._old, self._interrupted = stop, {}, False
        self.asked_by: int = signal.SIGTERM

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted, self.asked_by = True, int(number)
        # Nothing is printed here: the signal may have come in the middle of another print.
        if jax.process_count() == 1:
            self._stop.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_):
        for number, old in self._old.items():
            signal.signal(number, old)
