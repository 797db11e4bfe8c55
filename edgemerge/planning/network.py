"""What a plan reads of models on other machines, and what of it more than once."""

from __future__ import annotations

from dataclasses import dataclass

from edgemerge.remote.stand_ins import is_remote
from edgemerge.types import Plan, TensorJob

__all__ = ["Network", "foresee_network"]


@dataclass(frozen=True, slots=True)
class Network:
    """Bytes of tensors that come over the network, at most; headers were read for the plan."""

    n_models: int  # that are on other machines
    n_bytes: int  # with every pass
    once_bytes: int  # with every tensor once, as where a spill file keeps it
    spill_bytes: int  # of what is read more than once


def foresee_network(the_plan: Plan) -> Network:
    """Add up what a plan and its stages read of models at addresses."""
    parts = [foresee_network(stage) for stage in the_plan.stages]
    mixture = the_plan.recipe.mixture
    if mixture is not None:  # whose tensors are of all its models
        n_models = sum(map(is_remote, mixture.models()))
        remote = set(range(len(the_plan.models))) if n_models else set()
    else:
        remote = {i for i, path in enumerate(the_plan.models) if is_remote(path)}
        n_models = len(remote)
    once = sum(_remote_bytes(job, remote) * job.out.n_rows for job in the_plan.jobs)
    aligned = the_plan.alignment_bytes if remote else 0
    total = sum(_remote_bytes(job, remote) * _rows_read(job) for job in the_plan.jobs)
    spilled = sum(
        _remote_bytes(job, remote) * job.out.n_rows
        for job in the_plan.jobs
        if _rows_read(job) > job.out.n_rows
    )
    return Network(
        n_models + sum(part.n_models for part in parts),
        total + aligned + sum(part.n_bytes for part in parts),
        once + sum(part.once_bytes for part in parts),
        spilled + aligned + sum(part.spill_bytes for part in parts),
    )


def _remote_bytes(job: TensorJob, remote: set[int]) -> int:
    """Bytes of one row of a tensor in all models that are on other machines."""
    return sum(tensor.spec.row_bytes for tensor in job.inputs if tensor.model in remote)


def _rows_read(job: TensorJob) -> int:
    """Rows that are read of each input, all passes together; see `TensorJob.read_bytes`."""
    return job.read_bytes // max(1, sum(tensor.spec.row_bytes for tensor in job.inputs))
