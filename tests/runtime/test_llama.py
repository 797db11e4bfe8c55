from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.runtime.llama import Lora, Model
from tests.support.tiny_gguf import CONTEXT, N_EMBD, N_LAYERS, write_tiny_gguf

pytestmark = pytest.mark.llama

RANK = 4


def write_lora(
    path: Path, *, architecture: str = "llama", n_embd: int = N_EMBD, name: str = "blk.0.attn_q"
) -> Path:
    """An adapter for q of the first layer, as convert_lora_to_gguf writes it."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for suffix, shape in (("a", (RANK, n_embd)), ("b", (n_embd, RANK))):
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3)
        writer.add_tensor(f"{name}.weight.lora_{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_lora(model: Path, lora: Path, out: Path, scale: float) -> Path:
    """The model with the adapter added to its weight: W + scale * alpha / rank * B A."""
    low = {tensor.name: tensor.data for tensor in gguf.GGUFReader(lora).tensors}
    write_tiny_gguf(out)
    change = low["blk.0.attn_q.weight.lora_b"] @ low["blk.0.attn_q.weight.lora_a"]
    for tensor in gguf.GGUFReader(out, "r+").tensors:
        if tensor.name == "blk.0.attn_q.weight":
            tensor.data[:] += np.float32(scale) * change
            tensor.data.flush()
    return out


def last_logits(model: Model, text: str = "the answer") -> np.ndarray:
    tokens = model.bos + model.tokenize(text)
    wanted = [False] * (len(tokens) - 1) + [True]
    with model.context(64, n_batch=64, exact=True) as context:
        return context.decode(tokens, wanted)[0].copy()


def test_a_model_tells_what_it_is(tiny_gguf: Path) -> None:
    with Model(tiny_gguf) as model:
        assert model.description.startswith("llama")
        assert model.metadata["general.name"] == "tiny"
        assert (model.n_layers, model.n_embd, model.n_ctx_train) == (N_LAYERS, N_EMBD, CONTEXT)
        tensors = gguf.GGUFReader(tiny_gguf).tensors
        assert model.n_params == sum(int(tensor.n_elements) for tensor in tensors)
        assert model.n_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
        assert model.chat_template is None
        assert [model.token_text(token) for token in (1, 2, -1)] == ["<s>", "</s>", ""]
        assert model.piece(2) == b""
        assert model.piece(2, special=True) == b"</s>"


def test_a_long_value_of_the_metadata_is_whole(tmp_path: Path) -> None:
    writer_path = write_tiny_gguf(tmp_path / "plain.gguf")
    reader = gguf.GGUFReader(writer_path)
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    template = "{{ messages[0]['content'] }}" + "é" * 1000
    out = tmp_path / "templated.gguf"
    writer = gguf.GGUFWriter(out, "llama")
    details = MetadataDetails(gguf.GGUFValueType.STRING, template)
    copy_with_new_metadata(reader, writer, {"tokenizer.chat_template": details}, [])
    with Model(out) as model:
        assert model.chat_template == template
        assert model.metadata["tokenizer.chat_template"] == template


def test_buffers_are_what_the_shapes_say(tiny_gguf: Path) -> None:
    with Model(tiny_gguf) as model, model.context(256, n_batch=64) as context:
        assert context.n_ctx == 256
        # k and v, two heads of 16, float16
        assert context.buffers.kv == pytest.approx(2 * N_LAYERS * 256 * 32 * 2, abs=2**14)
        assert context.buffers.weights == pytest.approx(model.n_bytes, rel=0.05)
        assert context.buffers.compute > 0
        assert context.buffers.output == pytest.approx(4 * model.n_vocab, abs=2**14)


def test_a_context_forgets_its_end_and_computes_it_again(tiny_gguf: Path) -> None:
    with Model(tiny_gguf) as model, model.context(64, n_batch=64, exact=True) as context:
        tokens = model.bos + model.tokenize("the answer of the")
        n = len(tokens)
        wanted = [False] * (n - 1) + [True]
        before = context.decode(tokens, wanted).copy()
        context.truncate(n - 2)
        after = context.decode(tokens[-2:], [False, True], position=n - 2)
        np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_lora_adds_to_the_weights(tiny_gguf: Path, tmp_path: Path, scale: float) -> None:
    lora = write_lora(tmp_path / "lora.gguf")
    merged = add_lora(tiny_gguf, lora, tmp_path / "merged.gguf", scale)
    with Model(merged) as model:
        expected = last_logits(model)
    with Model(tiny_gguf, loras=[Lora(lora, scale)]) as model:
        adapted = last_logits(model)
    with Model(tiny_gguf) as model:
        plain = last_logits(model)
    np.testing.assert_allclose(adapted, expected, atol=1e-3)
    assert np.abs(adapted - plain).max() > 0.05


def test_two_loras_add_up(tiny_gguf: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf")
    with Model(tiny_gguf, loras=[Lora(lora, 0.75), Lora(lora, 0.25)]) as model:
        twice = last_logits(model)
    with Model(tiny_gguf, loras=[Lora(lora)]) as model:
        once = last_logits(model)
    np.testing.assert_allclose(twice, once, atol=1e-4)


def test_a_lora_of_another_model_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    for lora in (
        write_lora(tmp_path / "wide.gguf", n_embd=2 * N_EMBD),
        write_lora(tmp_path / "qwen.gguf", architecture="qwen2"),
        tiny_gguf,
    ):
        with pytest.raises(RuntimeFailure, match=f"{lora.name}: llama.cpp cannot add this LoRA"):
            Model(tiny_gguf, loras=[Lora(lora)])
    with pytest.raises(RuntimeFailure, match=r"absent\.gguf: there is no such file"):
        Model(tiny_gguf, loras=[Lora(tmp_path / "absent.gguf")])


def test_a_lora_at_which_llama_cpp_would_end_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    """The head of a tied model is its embedding, whose factors have another order."""
    tied = tmp_path / "tied.gguf"
    tied.write_bytes(tiny_gguf.read_bytes().replace(b"\0output.weight", b"\0outpot.weight"))
    lora = write_lora(tmp_path / "lora.gguf", name="token_embd")
    with pytest.raises(FormatError, match=r"which is the head of tied\.gguf too"):
        Model(tied, loras=[Lora(lora)])
