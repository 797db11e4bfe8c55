"""Speed of a model as llama-bench measures it, and the times of single tokens that it leaves out.

As in llama.cpp's tools/llama-bench: a fresh context per test, one run to warm up, an empty cache before each
repetition, random tokens after the beginning-of-text token, logits for the last token of a prompt and for
each generated one. No token is drawn, as an answer's would be. So a rate here can be compared with one of
llama-bench.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgemerge.runtime.board.device import PowerMeter
from edgemerge.runtime.library import Buffers
from edgemerge.runtime.llama import Context, Model

__all__ = ["N_BATCH", "N_UBATCH", "Speed", "SpeedTest", "measure_speed"]

N_BATCH, N_UBATCH = 2048, 512  # tokens; llama-bench's defaults

# A 95th percentile of three times says nothing: prompts are repeated for their times alone, as long as that
# is quick. A slow board keeps to the repetitions that were asked for.
_PROMPTS, _PROMPT_SECONDS = 20, 3.0

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """What is timed: reading a prompt, or generating, after `depth` tokens. One of the two is 0."""

    n_prompt: int
    n_gen: int
    depth: int
    n_threads: int

    @property
    def name(self) -> str:
        """What llama-bench calls it: pp512, tg128 @ d1024."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def n_tokens(self) -> int:
        """Tokens of one repetition."""
        return self.n_prompt + self.n_gen


@dataclass(frozen=True, slots=True)
class Speed:
    """Times of one test.

    Attributes
    ----------
    test : SpeedTest
        What was timed.
    started : str
        When, in UTC (ISO 8601).
    samples_ns : tuple of int
        Nanoseconds of each repetition.
    latencies_ns : tuple of int
        Nanoseconds from a prompt to the logits of its first token, once per prompt; or of each generated
        token of all repetitions.
    cpu_ns : int
        Processor time of all threads over the repetitions.
    joules : float or None
        Energy of the board over the repetitions; None where it reports none.
    """

    test: SpeedTest
    started: str
    samples_ns: tuple[int, ...]
    latencies_ns: tuple[int, ...]
    cpu_ns: int
    joules: float | None

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [1e9 * self.test.n_tokens / sample for sample in self.samples_ns]

    @property
    def mean(self) -> float:
        """Tokens per second, the mean over the repetitions."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of tokens per second; 0 for a single repetition."""
        return _deviation(self.rates)

    @property
    def mean_ns(self) -> float:
        """Nanoseconds of a repetition, the mean."""
        return statistics.fmean(self.samples_ns)

    @property
    def deviation_ns(self) -> float:
        """Sample standard deviation of the nanoseconds; 0 for a single repetition."""
        return _deviation(self.samples_ns)

    @property
    def joules_per_token(self) -> float | None:
        """Energy of the whole board per token; None where it reports none."""
        if self.joules is None:
            return None
        return self.joules / (self.test.n_tokens * len(self.samples_ns))

    def latency(self, percent: float) -> float:
        """Percentile of the latencies in seconds, linear between the two nearest."""
        return float(np.percentile(self.latencies_ns, percent)) / 1e9


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measure_speed(
    model: Model,
    test: SpeedTest,
    repetitions: int,
    *,
    meter: PowerMeter | None = None,
    on_end: Callable[[Buffers], None] | None = None,
) -> Speed:
    """Time a test.

    Parameters
    ----------
    model : Model
        A loaded model; its number of threads is set to the test's.
    test : SpeedTest
        What to time.
    repetitions : int
        How often, at least once; the run that warms up comes on top.
    meter : PowerMeter, optional
        Energy is read from it.
    on_end : callable, optional
        Called with the context's buffers, while it still holds them.

    Raises
    ------
    RuntimeFailure
        llama.cpp cannot make the context, or fails on the tokens.
    """
    model.use_threads(test.n_threads)
    started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with model.context(test.n_tokens + test.depth, n_batch=N_BATCH, n_ubatch=N_UBATCH) as context:
        runs = _Runs(model, context, test, meter)
        runs.warm_up()
        for _ in range(repetitions):
            runs.repeat()
        timed = Speed(
            test,
            started,
            tuple(runs.samples_ns),
            tuple(runs.latencies_ns),
            runs.cpu_ns,
            None if meter is None else runs.joules,
        )
        if on_end is not None:
            on_end(context.buffers)
        if test.n_gen:
            return timed
        return _with_more_prompts(timed, runs)


class _Runs:
    """Repetitions of one test in one context, and what they took."""

    def __init__(
        self, model: Model, context: Context, test: SpeedTest, meter: PowerMeter | None
    ) -> None:
        self.model = model
        self.context = context
        self.test = test
        self.meter = meter
        self.batch = context.batch(N_BATCH)
        self.n_past = 0
        self.random = np.random.default_rng(0)
        self.samples_ns: list[int] = []
        self.latencies_ns: list[int] = []
        self.cpu_ns = 0
        self.joules = 0.0

    def warm_up(self) -> None:
        """Run once without timing: the whole prompt, or one token."""
        if self.test.n_prompt:
            self._read(self._draw(self.test.n_prompt))
        else:
            self._generate(self._draw(1))

    def repeat(self) -> None:
        """Time one repetition; what goes before it, the tokens and the depth, is not timed."""
        self.context.clear()
        self.n_past = 0
        if self.test.depth:
            self._read(self._draw(self.test.depth))
        tokens = self._draw(self.test.n_tokens)
        joules = self.meter.joules() if self.meter else 0.0
        cpu = time.process_time_ns()
        start = time.perf_counter_ns()
        latencies = [] if self.test.n_prompt else self._generate(tokens)
        if self.test.n_prompt:
            self._read(tokens)
        sample = time.perf_counter_ns() - start
        self.cpu_ns += time.process_time_ns() - cpu
        self.joules += self.meter.joules() - joules if self.meter else 0.0
        self.samples_ns.append(sample)
        self.latencies_ns += latencies or [sample]

    def _draw(self, n: int) -> Tokens:
        tokens = self.random.integers(self.model.n_vocab, size=n, dtype=np.int32)
        tokens[: len(self.model.bos)] = self.model.bos
        return tokens

    def _read(self, tokens: Tokens) -> None:
        for start in range(0, len(tokens), N_BATCH):
            self._decode(tokens[start : start + N_BATCH])
        self.context.synchronize()

    def _generate(self, tokens: Tokens) -> list[int]:
        """Run tokens one by one; nanoseconds of each."""
        times = [time.perf_counter_ns()]
        for i in range(len(tokens)):
            self._decode(tokens[i : i + 1])
            self.context.synchronize()
            times.append(time.perf_counter_ns())
        return [after - before for before, after in pairwise(times)]

    def _decode(self, tokens: Tokens) -> None:
        """Run tokens after those in the cache, with logits for the last one."""
        self.batch.clear()
        start = self.batch.add_all(tokens, self.n_past, 0, output=False)
        self.batch.want(start + len(tokens) - 1)
        self.context.run(self.batch)
        self.n_past += len(tokens)


def _with_more_prompts(timed: Speed, runs: _Runs) -> Speed:
    """Time more prompts for their latencies, where that is quick; the rate stays as it is."""
    limit = time.monotonic() + _PROMPT_SECONDS
    slowest = max(timed.samples_ns) / 1e9
    while len(runs.latencies_ns) < _PROMPTS and time.monotonic() + slowest < limit:
        runs.repeat()
    return replace(timed, latencies_ns=tuple(runs.latencies_ns))
