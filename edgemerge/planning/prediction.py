"""How long a merge takes on a machine of known rates: counts of the plan times seconds of each.

Three things go on at once: cores compute, memory is read and written, storage is read and written. The
slowest of them is the estimate. A merge is no quicker than it, and no slower than computing and storage one
after the other; the errors of the rates come to that.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from edgemerge.methods.table import find_method
from edgemerge.planning.decompositions import decomposing_seconds
from edgemerge.planning.network import foresee_network
from edgemerge.planning.reference import (
    MERGE,
    MULTIPLY,
    OTHER_METHODS,
    START,
    WEIGHTED,
    of_codec,
)
from edgemerge.types import Plan, TensorJob

__all__ = ["Prediction", "Rates", "predict"]


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a machine is, and how large.

    Attributes
    ----------
    name : str
        What people call it.
    cores : int
        That compute.
    memory : int
        Bytes that programs can have.
    decode, encode, merge, python : float
        How many times the seconds of `planning.reference` one core takes, for each kind of work.
    copied : float
        Bytes per second that are copied in memory, by all cores together.
    hashed : float
        Bytes per second of SHA-256, by one core.
    read, written : float or None
        Bytes per second of the storage; None where they could not be measured.
    error : (float, float)
        Factors of the least and the most that can be meant, where a rate is wrong.
    """

    name: str
    cores: int
    memory: int
    decode: float
    encode: float
    merge: float
    python: float
    copied: float
    hashed: float
    read: float | None
    written: float | None
    error: tuple[float, float]

    def as_json(self) -> dict[str, object]:
        """Return all of it."""
        return asdict(self)

    def budget(self, wanted: int | None) -> int:
        """Return the bytes of a merge's budget here: what is wanted, and no more than the machine has."""
        from edgemerge.planning.plan import DEFAULT_MEMORY

        return min(wanted or DEFAULT_MEMORY, self.memory)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a merge.

    Attributes
    ----------
    processor, memory, storage : float
        What each would take alone; the storage is None where its rates are not known, and not counted.
    seconds, least, most : float
        The estimate and its range. The least is with inputs in the page cache, where they have room.
    """

    processor: float
    memory: float
    storage: float | None
    seconds: float
    least: float
    most: float

    def as_json(self) -> dict[str, float | None]:
        """Return the same as numbers."""
        return {
            (key if key == "seconds" else f"{key}_seconds"): value and round(value, 2)
            for key, value in asdict(self).items()
        }


def predict(the_plan: Plan, rates: Rates) -> Prediction:
    """Predict the seconds of a merge with its stages, kernels compiled; a network is not counted."""
    plans = (*the_plan.stages, the_plan)
    shared = sum(_compute(job, rates) for one in plans for job in one.jobs)
    written = sum(one.written_bytes for one in plans)
    alone = START * rates.python + written / rates.hashed
    processor = alone + shared / max(1, min(the_plan.workers, rates.cores))
    memory = sum(_memory_bytes(job) for one in plans for job in one.jobs) / (2 * rates.copied)
    n_read = sum(one.read_bytes for one in plans) - foresee_network(the_plan).n_bytes
    is_known = rates.read is not None and rates.written is not None
    writing = written / (rates.written or math.inf)
    storage = n_read / (rates.read or math.inf) + writing
    may_be_cached = n_read <= rates.memory
    low, high = rates.error
    return Prediction(
        processor=processor,
        memory=memory,
        storage=storage if is_known else None,
        seconds=max(processor, memory, storage),
        least=low * max(processor, memory, writing if may_be_cached else storage),
        most=high * (max(processor, memory) + storage),
    )


def _compute(job: TensorJob, rates: Rates) -> float:
    """Seconds of one core."""
    if job.is_byte_copy:
        return 0.0
    n_read = _times_read(job) * job.out.n_elements
    encoding = of_codec(job.out.dtype, writes=True)
    encoding *= WEIGHTED[job.out.dtype] if job.is_weighted else 1.0
    total = job.out.n_elements * rates.encode * encoding
    for tensor in job.inputs:
        total += n_read * rates.decode * of_codec(tensor.spec.dtype, writes=False)
    each = rates.merge * MERGE.get(job.method, OTHER_METHODS)
    seconds = (total + each * job.out.n_elements * len(job.inputs)) / 1e9
    multiplying = 1e-9 * MULTIPLY * find_method(job.method).multiplies(job)
    return seconds + rates.merge * (decomposing_seconds(job) + multiplying)


def _memory_bytes(job: TensorJob) -> float:
    """Bytes that go through memory; blocks are larger than a board's caches.

    Stored bytes are copied out of the page cache and decoded. Values are written, read by the method, written
    and encoded. What is encoded is copied into the page cache and read for its checksums.
    """
    stored = 3 * job.read_bytes + 5 * job.out.nbytes
    if job.is_byte_copy:
        return stored
    n_values = 2 * _times_read(job) * len(job.inputs) + 2
    return stored + 4 * n_values * job.out.n_elements


def _times_read(job: TensorJob) -> float:
    """How often each input is read, blocks that stay in memory counted once."""
    once = job.out.n_rows * sum(tensor.spec.row_bytes for tensor in job.inputs)
    return job.read_bytes / max(1, once)
