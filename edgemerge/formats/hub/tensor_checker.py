"""One stored tensor against config.json: its type and its shape, each refused with a remedy."""

from __future__ import annotations

from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.hub.config import HubConfig
from edgemerge.formats.hub.files import CONFIG
from edgemerge.formats.hub.safetensors import StoredTensor

__all__ = ["DTYPES", "TensorChecker"]

DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors -> ggml


class TensorChecker:
    """Checks the tensors of one directory.

    Parameters
    ----------
    config : HubConfig
        What config.json makes them.
    """

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def unknown(self, shard: Path, stored_name: str) -> FormatError:
        """Make the error for a tensor that no such model has."""
        return FormatError(
            f"llama.cpp's {self._config.family.architecture} with {self._config.n_layers} layers has "
            f"no such tensor, so {CONFIG} and weights do not belong together; get both from one model",
            path=shard,
            tensor=stored_name,
        )

    def packed(self, shard: Path, stored_name: str, what: str) -> FormatError:
        """Make the error for a weight that another tool has packed."""
        tool = self._config.quantised or "some tool"
        remedy = "give the original fp16 or bf16 model, or a GGUF"
        if tool == "mlx":
            remedy = "unpack it with mlx_lm.convert --dequantize, or give the original model"
        return FormatError(
            f"is {what}, quantised by {tool!r}, which is not read from here; {remedy}",
            path=shard,
            tensor=stored_name,
        )

    def check(
        self,
        shard: Path,
        stored_name: str,
        tensor: StoredTensor,
        stem: str,
        expected: tuple[int, ...] = (),
    ) -> None:
        """Check a tensor's type and shape: `expected`, or what its GGUF name without `blk.N.` makes it."""
        if tensor.dtype not in DTYPES:
            if self._config.quantised:
                raise self.packed(shard, stored_name, f"of type {tensor.dtype}")
            raise FormatError(
                f"its type {tensor.dtype} is not one of {', '.join(DTYPES)}; give the original "
                "fp16, bf16 or fp32 model",
                path=shard,
                tensor=stored_name,
            )
        expected = expected or self._config.expected_shape(stem)
        if tensor.shape != expected:
            remedy = "the two files belong to different models, get the directory again"
            if stem == "token_embd.weight" and tensor.shape[1:] == expected[1:]:
                remedy = f"if the model got or lost tokens, write vocab_size {tensor.shape[0]} in {CONFIG}"
            raise FormatError(
                f"its shape is {list(tensor.shape)} but {CONFIG} makes it {list(expected)}; {remedy}",
                path=shard,
                tensor=stored_name,
            )
