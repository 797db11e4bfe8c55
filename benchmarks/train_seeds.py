"""Train a small Llama from a seed on tokens; `bench_barrier.py` runs it, with a Python that has torch.

One thread, float32, AdamW with a cosine. The same torch on the same processor gives the same weights. The
order of the rows of tokens, and the initial weights, follow from the seed. A run may stop early and leave its
state, and two others may go on from there on other tokens: then only what they see after that differs.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251
from safetensors.torch import save_file
from torch import Tensor, nn  # noqa: TID251
from torch.nn import functional  # noqa: TID251

WIDTH, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD, HIDDEN, VOCABULARY = 64, 4, 4, 2, 16, 176, 4096
LENGTH, BATCH = 64, 16  # tokens of a row, rows of a step
PEAK, LEAST, WARMUP, DECAY = 6e-3, 0.05, 30, 0.1  # of the learning rate; weight decay
EPSILON, THETA = 1e-5, 10000.0


class Layer(nn.Module):  # type: ignore[misc]
    """One block, with the names that transformers gives to its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(WIDTH, EPSILON)
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, EPSILON)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(WIDTH, N_HEADS * HEAD, bias=False),
                "k_proj": nn.Linear(WIDTH, N_KV_HEADS * HEAD, bias=False),
                "v_proj": nn.Linear(WIDTH, N_KV_HEADS * HEAD, bias=False),
                "o_proj": nn.Linear(N_HEADS * HEAD, WIDTH, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(WIDTH, HIDDEN, bias=False),
                "up_proj": nn.Linear(WIDTH, HIDDEN, bias=False),
                "down_proj": nn.Linear(HIDDEN, WIDTH, bias=False),
            }
        )

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Attend, then think; x is (rows, tokens, width)."""
        attention, y = self.self_attn, self.input_layernorm(x)
        q, k, v = (
            attention[f"{name}_proj"](y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for name in "qkv"
        )
        q, k = rotate(q, turn), rotate(k, turn).repeat_interleave(N_HEADS // N_KV_HEADS, 1)
        v = v.repeat_interleave(N_HEADS // N_KV_HEADS, 1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention["o_proj"](y.transpose(1, 2).flatten(2))
        mlp, y = self.mlp, self.post_attention_layernorm(x)
        return x + mlp["down_proj"](functional.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))


class Llama(nn.Module):  # type: ignore[misc]
    """The model; the embedding is the output matrix too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(N_LAYERS))
        self.norm = nn.RMSNorm(WIDTH, EPSILON)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.05 / (math.sqrt(2 * N_LAYERS) if deep else 1.0))
        frequencies = THETA ** (-torch.arange(0, HEAD, 2) / HEAD)
        angles = torch.arange(LENGTH)[:, None] * frequencies.repeat(2)
        self.turn = angles.cos(), angles.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next tokens."""
        x = self.embed_tokens(tokens)
        turn = self.turn[0][: tokens.shape[1]], self.turn[1][: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, turn)
        return self.norm(x) @ self.embed_tokens.weight.T


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate planes that are half a head apart, as transformers does."""
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-second, first), -1) * turn[1]


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: a ramp, then a cosine."""
    falling = LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK * min(1.0, (step + 1) / WARMUP) * falling


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train as the options say; return the state."""
    torch.manual_seed(options.seed)
    model = Llama()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
    first = 0
    if options.state:
        state = torch.load(options.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    tokens = np.concatenate([np.load(path) for path in options.tokens]).astype(np.int64)
    rows = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH))
    order = torch.Generator().manual_seed(options.seed)
    queue: list[int] = []
    started, total = time.monotonic(), 0.0
    last = options.steps if options.stop is None else options.stop
    for step in range(first, last):
        if len(queue) < BATCH:
            queue = torch.randperm(len(rows), generator=order).tolist()
        batch, queue = rows[queue[:BATCH]], queue[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps)
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}, loss {total / 50:.3f}, {seconds:.0f} s",
                flush=True,
            )
            total = 0.0
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="model.safetensors, or with --stop a state")
    parser.add_argument("tokens", type=Path, nargs="+", help=".npy of token numbers")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="length of the whole cosine")
    parser.add_argument("--stop", type=int, help="stop here, and leave the state")
    parser.add_argument("--state", type=Path, help="go on from here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    state = train(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.stop is not None:
        torch.save(state, options.output)
    else:
        weights = {f"model.{name}": w.contiguous() for name, w in state["model"].items()}
        # A matrix of its own: what rotates the residual stream changes it apart from the embedding.
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, options.output, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
