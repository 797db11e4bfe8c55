"""Four clients learn one small LoRA adapter in Flower's simulation, on NumPy alone.

    python -m tools.flower.simulation [--how ties_svd] [--rounds 5] [--clients 4]

Each client sees other inputs of the same two linear layers: what it learns of the rest is noise. `--how
fedavg` is Flower's own mean of all A and all B.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from edgemerge.types import Float32
from tools.flower.aggregation import Arrays, peft_config
from tools.flower.strategy import MergedLora, from_record, to_record

RANK, N_IN, N_OUT = 4, 32, 24
MODULES = ("q_proj", "v_proj")
STEPS, RATE = 40, 0.02
MEMORY = 2 << 30  # the simulation's own process is large: Ray, gRPC


def names(module: str) -> tuple[str, str]:
    """Return PEFT's names of A and B."""
    stem = f"base_model.model.model.layers.0.self_attn.{module}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def start_arrays() -> dict[str, Float32]:
    """Return a fresh adapter: A is noise and B is zero, as PEFT begins."""
    rng = np.random.default_rng(0)
    arrays = {}
    for module in MODULES:
        a, b = names(module)
        arrays[a] = rng.normal(0, 0.2, (RANK, N_IN)).astype(np.float32)
        arrays[b] = np.zeros((N_OUT, RANK), np.float32)
    return arrays


def wanted(module: str) -> Float32:
    """Return the change that is to be learnt, (N_OUT, N_IN), of rank 3."""
    rng = np.random.default_rng([7, MODULES.index(module)])
    left, right = rng.normal(0, 0.6, (N_OUT, 3)), rng.normal(0, 0.6, (3, N_IN))
    return (left @ right).astype(np.float32)


def examples(module: str, client: int | None, n: int) -> tuple[Float32, Float32]:
    """Return inputs (n, N_IN) and outputs (n, N_OUT); a client's inputs lie in half of the directions."""
    seed = 1000 if client is None else client
    rng = np.random.default_rng([seed, MODULES.index(module)])
    x = rng.normal(0, 1, (n, N_IN))
    if client is not None:
        x[:, rng.permutation(N_IN)[: N_IN // 2]] *= 0.1
    y = x @ wanted(module).T + rng.normal(0, 0.3, (n, N_OUT))
    return x.astype(np.float32), y.astype(np.float32)


def train_locally(arrays: Arrays, client: int) -> tuple[dict[str, Float32], int]:
    """Descend the squared error on a client's examples; return the arrays and the number of examples."""
    result, n = dict(arrays), 60 + 40 * client
    for module in MODULES:
        x, y = examples(module, client, n)
        a, b = (result[name].copy() for name in names(module))
        for _ in range(STEPS):
            gradient = ((x @ (b @ a).T - y).T @ x / n).astype(np.float32)
            a, b = descend(a, b.T @ gradient), descend(b, gradient @ a.T)
        result |= dict(zip(names(module), (a, b), strict=True))
    return result, n


def descend(values: Float32, gradient: Float32) -> Float32:
    return (values - RATE * gradient).astype(np.float32)


def error(arrays: Arrays) -> float:
    """Return the mean squared error on inputs of all directions; 0.09 of it is noise."""
    total = 0.0
    for module in MODULES:
        x, y = examples(module, None, 2000)
        a, b = (arrays[name] for name in names(module))
        total += float(np.mean((x @ (b @ a).T - y) ** 2))
    return total / len(MODULES)


client_app = ClientApp()


@client_app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train on this client's examples."""
    arrays = from_record(message.content["arrays"])
    result, n = train_locally(arrays, int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": n, "train_loss": error(result)})
    content = RecordDict({"arrays": to_record(result), "metrics": metrics})
    return Message(content=content, reply_to=message)


def make_server(how: str, rounds: int, tell: Callable[[int, float], None]) -> ServerApp:
    """Make the server's part; `tell` is called with each round and its error."""
    app = ServerApp()
    common = {"fraction_evaluate": 0.0, "min_train_nodes": 2, "min_available_nodes": 2}

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        config = peft_config(RANK, RANK, MODULES)
        density = None if how == "svd" else 0.7
        strategy = (
            FedAvg(**common)
            if how == "fedavg"
            else MergedLora(config, how=how, density=density, memory=MEMORY, **common)
        )

        def evaluate(number: int, record: object) -> MetricRecord:
            found = error(from_record(record))
            tell(number, found)
            return MetricRecord({"error": found})

        strategy.start(
            grid=grid,
            initial_arrays=to_record(start_arrays()),
            num_rounds=rounds,
            train_config=ConfigRecord({}),
            evaluate_fn=evaluate,
        )

    return app


def simulate(how: str, rounds: int, clients: int) -> list[float]:
    """Run Flower's simulation and return the error before the first round and after each."""
    errors: list[float] = []
    run_simulation(
        server_app=make_server(how, rounds, lambda _, found: errors.append(found)),
        client_app=client_app,
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--how", default="svd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    given = parser.parse_args()
    errors = simulate(given.how, given.rounds, given.clients)
    print(f"{given.how}: error {', '.join(f'{one:.3f}' for one in errors)}")


if __name__ == "__main__":
    main()
