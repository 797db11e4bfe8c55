"""A strategy for Flower that merges the clients' LoRA adapters by edgemerge's methods, inside a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from edgemerge.types import Float32
from tools.flower.aggregation import aggregate, find_fault

__all__ = ["MergedLora", "from_record", "to_record"]


class MergedLora(FedAvg):  # type: ignore[misc]  # flwr is not there where types are checked
    """FedAvg, but for how adapters become one.

    Parameters
    ----------
    config : mapping
        From `tools.flower.aggregation.peft_config`.
    how : str
        As of `edgemerge combine`: svd, ties_svd, dare_ties_svd …
    density : float, optional
        Part of the elements that ties and dare keep.
    memory : int, optional
        Budget in bytes for the server's process, with all that it has in memory; 512 MiB by default.
    others
        As of FedAvg.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        how: str = "svd",
        density: float | None = None,
        memory: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self._config, self._how, self._density, self._memory = config, how, density, memory
        self._sent: dict[str, Float32] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the adapter, and remember what it looks like."""
        self._sent = from_record(arrays)
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what came back; an adapter that cannot be merged is left out with a warning."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        contents, updates, counts = [], [], []
        for message in valid:
            update = from_record(message.content[self.arrayrecord_key])
            metrics = next(iter(message.content.metric_records.values()))
            count = metrics[self.weighted_by_key]
            if (fault := find_fault(update, self._sent, count)) is None:
                contents.append(message.content)
                updates.append(update)
                counts.append(int(count))
            else:
                log(WARNING, "client %s %s", message.metadata.src_node_id, fault)
        if not updates:
            return None, None
        merged = aggregate(
            updates,
            counts,
            self._sent,
            self._config,
            how=self._how,
            density=self._density,
            seed=server_round,
            memory=self._memory,
        )
        return to_record(merged), self.train_metrics_aggr_fn(contents, self.weighted_by_key)


def from_record(record: ArrayRecord) -> dict[str, Float32]:
    """Return the arrays of a message by name."""
    return {name: array.numpy() for name, array in record.items()}


def to_record(arrays: Mapping[str, Float32]) -> ArrayRecord:
    """Make a record of arrays."""
    return ArrayRecord(OrderedDict((name, Array(values)) for name, values in arrays.items()))
