"""A connection to a Dask scheduler, which hands out calls and gets over what is lost.

At most a few calls for each thread of the cluster are under way: their results wait in the workers' memory
until they are taken. A worker that ends loses its calls, which Dask gives to others. A scheduler that ends
loses all. They are handed out again when it is back.
"""

from __future__ import annotations

import queue
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

from edgemerge.cluster.address import count_local, prepare_dask
from edgemerge.cluster.processes import local_worker
from edgemerge.errors import ClusterError, EdgemergeError, Stopped

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["Again", "Call", "Connection", "Shared", "open_cluster"]

A = TypeVar("A")
R = TypeVar("R")

POLL_SECONDS = 0.1
LOOK_SECONDS = 1.0  # between looks at who is there
CONNECT_SECONDS = 10.0
TELL_SECONDS = 2.0
PATIENCE = 60.0  # seconds without a scheduler, or without a worker
PER_THREAD = 2  # calls under way: one that is done, one that waits
MAX_TRIES = 5  # of one call


class Again(Exception):
    """A result was lost on its way: the call is to be made again."""


@dataclass(frozen=True, slots=True)
class Call(Generic[A]):
    """One call of a function on some worker, or on a certain one, without which there is no call."""

    argument: A
    label: str  # on Dask's dashboard
    worker: str | None = None


class Shared:
    """A value that every worker gets once, however many calls take it.

    The scheduler keeps it, so that a worker that comes later gets it too.
    """

    def __init__(self, value: object) -> None:
        self._value = value
        self._client: Client | None = None
        self._future: Future[Any] | None = None

    def future(self, client: Client) -> Future[Any]:
        """Return what stands for the value in calls of a client."""
        if self._future is None or self._client is not client:
            self._client = client
            key = f"share-{uuid4()}"
            self._future = client.submit(_pass_on, self._value, key=key, pure=False)
        return self._future


class Connection:
    """A client of a scheduler.

    Parameters
    ----------
    address : str
        What `--cluster` was given.
    connect : callable
        Makes a client; raises OSError where no scheduler answers.
    n_expected : int
        Workers that will come.
    children : sequence of Popen
        The workers' processes, where they are started here; nobody starts them again.

    Raises
    ------
    ClusterError
        No scheduler answers.
    """

    def __init__(
        self,
        address: str,
        connect: Callable[[], Client],
        n_expected: int = 1,
        children: Sequence[subprocess.Popen[bytes]] = (),
    ) -> None:
        self.address, self._n_expected, self._children = address, n_expected, children
        self._connect = connect
        self._threads: dict[str, int] = {}
        self._looked = self._seen = 0.0
        try:
            self._client = connect()
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {address} ({_reason(error)}); start one with dask scheduler, "
                "or check the address"
            ) from error

    def close(self) -> None:
        """Leave the cluster; what is under way there ends."""
        with suppress(Exception):
            self._client.close(timeout=2)

    def workers(self) -> dict[str, int]:
        """Return the threads of each worker by its address; waits for those that will come, but not long.

        Raises
        ------
        ClusterError
            None comes.
        """
        started = self._seen = time.monotonic()
        while not self._look() or len(self._threads) < self._n_expected:
            if self._threads and time.monotonic() - started > PATIENCE:
                self._n_expected = len(
                    self._threads
                )  # the others ended, and nobody starts them again
            time.sleep(POLL_SECONDS)
        return dict(self._threads)

    def tell(
        self, function: Callable[..., None], *arguments: object, worker: str | None = None
    ) -> None:
        """Call a quick function on a worker, or on all, if they are there; waits only a little."""

        def call() -> None:
            with suppress(Exception):
                workers = None if worker is None else [worker]
                self._client.run(function, *arguments, workers=workers, on_error="ignore")

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(TELL_SECONDS)

    def ask(self, function: Callable[..., R], *arguments: object, worker: str) -> R:
        """Call a quick function on a worker at once, beside its tasks.

        Raises
        ------
        Again
            The worker is gone, or has not what is asked for.
        """
        try:
            answers = self._client.run(function, *arguments, workers=[worker])
            return answers[worker]  # type: ignore[no-any-return]
        except Exception as error:
            raise Again from error

    def run(
        self,
        function: Callable[[Any, A], R],
        shared: Shared,
        calls: Sequence[Call[A]],
        on_result: Callable[[A, R], None],
        report: Callable[[], None],
    ) -> None:
        """Call a function for each of some arguments, in this order, on all workers.

        Parameters
        ----------
        function : callable
            Of a module that workers have. Takes the shared value and an argument.
        shared : Shared
            The value.
        calls : sequence of Call
            With the arguments.
        on_result : callable
            Called in this thread with each argument and its result; may raise `Again`.
        report : callable
            Called now and then; may raise to stop.

        Raises
        ------
        EdgemergeError
            The first that a call raised, or that there is no cluster any more.
        """
        waiting, tries = deque(enumerate(calls)), Counter[int]()
        running: dict[str, tuple[int, Call[A], Future[Any]]] = {}
        finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._seen = time.monotonic()
        try:
            while waiting or running:
                if self._client.status != "running":
                    waiting.extendleft((n, call) for n, call, _ in reversed(running.values()))
                    running, finished = {}, queue.SimpleQueue()
                    self._reconnect(report)
                self._look()
                window = PER_THREAD * max(1, sum(self._threads.values()))
                while waiting and len(running) < window:
                    number, call = waiting.popleft()
                    future = self._submit(function, shared, call)
                    running[future.key] = number, call, future
                    future.add_done_callback(finished.put)
                for key, (_, call, future) in list(running.items()):
                    if call.worker is not None and call.worker not in self._threads:
                        del running[key]
                        future.cancel()
                report()
                with suppress(queue.Empty):
                    future = finished.get(timeout=POLL_SECONDS)
                    if future.key not in running:
                        continue  # of a worker that left
                    number, call, _ = running.pop(future.key)
                    tries[number] += 1
                    try:
                        on_result(call.argument, _take(future))
                    except Again as lost:
                        if tries[number] == MAX_TRIES:
                            raise ClusterError(
                                f"{call.label} was lost {MAX_TRIES} times: its workers end, perhaps for "
                                "lack of memory; give them less --memory, or fewer --threads"
                            ) from lost
                        waiting.appendleft((number, call))
        finally:
            with suppress(Exception):
                self._client.cancel([future for _, _, future in running.values()], force=True)

    def _submit(self, function: Callable[[Any, A], R], shared: Shared, call: Call[A]) -> Future[R]:
        pinned: dict[str, Any] = {"workers": [call.worker]} if call.worker else {}
        return self._client.submit(
            _call,
            function,
            shared.future(self._client),
            call.argument,
            key=f"{call.label}-{uuid4()}",
            pure=False,
            **pinned,
        )

    def _look(self) -> bool:
        """Find out who is there, unless that was done just now. Return whether anyone is.

        Raises
        ------
        ClusterError
            There was no worker for long, or all that were started here have ended.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return bool(self._threads)
        if self._children and all(child.poll() is not None for child in self._children):
            raise ClusterError(
                f"all processes of {self.address} ended, perhaps for lack of memory; give a smaller "
                "--memory, or fewer processes"
            )
        with suppress(
            OSError, ValueError
        ):  # the scheduler is gone, which its client will notice too
            self._threads = {key: int(n) for key, n in self._client.nthreads().items()}
        self._looked = time.monotonic()
        if self._threads:
            self._seen = self._looked
        elif self._looked - self._seen > PATIENCE:
            raise ClusterError(
                f"no worker is at {self.address}; start some with edgemerge worker {self.address}"
            )
        return bool(self._threads)

    def _reconnect(self, report: Callable[[], None]) -> None:
        """Wait until a scheduler is there again."""
        self.close()
        started = time.monotonic()
        while True:
            report()
            try:
                self._client = self._connect()
            except OSError as error:
                if time.monotonic() - started > PATIENCE:
                    raise ClusterError(
                        f"the scheduler at {self.address} is gone ({_reason(error)}); start it and its "
                        "workers again"
                    ) from error
                time.sleep(POLL_SECONDS)
            else:
                self._looked, self._seen = 0.0, time.monotonic()
                return


def _pass_on(value: A) -> A:
    return value


def _call(function: Callable[[Any, A], R], shared: Any, argument: A) -> R:
    """Call a function on the worker that runs this; where memory lacks, name the worker."""
    try:
        return function(shared, argument)
    except MemoryError as error:
        from distributed import get_worker

        raise ClusterError(
            f"the worker at {get_worker().address} has too little memory; give it less --memory, or fewer "
            "--threads"
        ) from error


def _take(future: Future[Any]) -> Any:
    """Return the result of a call that has ended.

    Raises
    ------
    Again
        Its worker was lost, or the scheduler.
    EdgemergeError
        What it raised, or in place of any other error one that tells of it.
    """
    from concurrent.futures import CancelledError

    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except EdgemergeError:
        raise
    except (CancelledError, KilledWorker, Stopped, OSError) as error:
        raise Again from error
    except Exception as error:
        raise ClusterError(
            f"a worker failed ({type(error).__name__}: {_reason(error)}); the scheduler and all workers "
            "need the same edgemerge"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def open_cluster(address: str, *, memory: int, threads: int) -> Iterator[Connection]:
    """Connect to a cluster, or start one of processes on this machine.

    Parameters
    ----------
    address : str
        From `read_cluster`.
    memory : int
        Budget of each process that is started here, in bytes.
    threads : int
        Threads of all of them together, at least one of each.

    Raises
    ------
    ClusterError
        There is no scheduler, or Dask is missing.
    """
    prepare_dask()
    from distributed import Client, LocalCluster
    from distributed.security import Security

    n_local = count_local(address)
    with ExitStack() as stack:
        where: Any = address
        security, children = None, list[subprocess.Popen[bytes]]()
        if n_local is not None:
            security = Security.temporary()  # this machine may have other users
            where = stack.enter_context(
                LocalCluster(
                    n_workers=0,
                    security=security,
                    protocol="tls://",
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                )
            )
            words = ["--threads", str(max(1, threads // n_local)), "--memory", str(memory)]
            children = [
                stack.enter_context(local_worker(where.scheduler_address, words, security))
                for _ in range(n_local)
            ]

        def connect() -> Client:
            return Client(where, timeout=CONNECT_SECONDS, set_as_default=False, security=security)

        connection = Connection(address, connect, n_local or 1, children)
        stack.callback(connection.close)
        if n_local is not None:
            connection.workers()
        yield connection
