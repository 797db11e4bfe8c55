from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.worker import Worker


def fail() -> None:
    raise RuntimeFailure("no such model")


def test_work_is_done_on_another_thread() -> None:
    with Worker() as worker:
        threads = {worker.do(threading.get_ident) for _ in range(3)}
        assert len(threads) == 1
        assert threads != {threading.get_ident()}
        assert worker.do(divmod, 7, 2) == (3, 1)
        with pytest.raises(RuntimeFailure, match="no such model"):
            worker.do(fail)


def test_ctrl_c_within_the_call_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is on its way when the signal comes, and nobody holds its future."""
    done: list[int] = []

    def work() -> None:
        while not worker.is_stopped:
            time.sleep(0.01)
        done.append(True)

    with Worker() as worker:
        submit = worker._thread.submit

        def interrupt(*given: Any) -> None:
            monkeypatch.undo()
            submit(*given)
            raise KeyboardInterrupt

        monkeypatch.setattr(worker._thread, "submit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.do(work)
        assert done == [True]


def test_ctrl_c_waits_for_the_end_of_the_work_however_often_it_comes() -> None:
    done: list[int] = []

    def work() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        while not worker.is_stopped:
            time.sleep(0.01)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(0.05)
        done.append(True)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with Worker() as worker:
            with pytest.raises(KeyboardInterrupt):
                worker.do(work)
            assert done == [True]
            assert worker.do(divmod, 7, 2) == (3, 1)
            assert not worker.is_stopped
    finally:
        signal.signal(signal.SIGALRM, before)
