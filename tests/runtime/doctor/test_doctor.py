"""What fits, what is advised, and the examination as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from edgemerge.budget import FLOOR_BYTES, MIB
from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.runtime.board.device import (
    Memory,
    Swap,
    read_board,
    read_swaps,
    read_temperature,
    read_throttling,
)
from edgemerge.runtime.board.storage import Disk, Storage
from edgemerge.runtime.doctor import diagnosis, fit
from edgemerge.runtime.doctor.advice import advise, merge_budget, warn_of_board, warn_of_llama
from edgemerge.runtime.doctor.build import Accelerator, LlamaBuild, missing_features, read_build
from edgemerge.runtime.doctor.diagnosis import examine
from edgemerge.runtime.thread_counts import ThreadCounts
from tests.runtime.board import boards
from tests.runtime.board.boards import GIB
from tests.support.architecture_models import ARCHITECTURES

BUILD = LlamaBuild(
    "0.3.36", ("NEON", "FP16_VA", "DOTPROD", "OPENMP"), False, (), is_debug=False, has_rpc=False
)
STORAGE = Storage(Path("/models"), Disk("nvme0n1", "NVMe SSD"), 100 * GIB, 4e8, 8e8)


# -- what fits -------------------------------------------------------------------------------------

# Bytes of the files that were published in these types (Hugging Face, GGUF repositories of each model).
PUBLISHED = {
    ("SmolLM2-135M", "Q4_K_M"): 105_454_432,
    ("Llama-3.2-1B", "Q4_K_M"): 807_694_464,
    ("Llama-3.2-3B", "Q4_K_M"): 2_019_377_696,
    ("Llama-3.1-8B", "Q4_K_M"): 4_920_739_232,
    ("Llama-3.1-8B", "Q8_0"): 8_540_775_840,
    ("Qwen2.5-14B", "Q4_K_M"): 8_988_110_272,
}


@pytest.mark.parametrize(("name", "file_type"), PUBLISHED)
def test_weights_of_the_table_are_those_of_published_files(name: str, file_type: str) -> None:
    example = next(example for example in fit.EXAMPLES if example.name == name)
    weights = fit._needs_of_example(example, file_type).weights
    assert weights == pytest.approx(PUBLISHED[name, file_type], rel=0.02)


def test_the_formula() -> None:
    needs = fit.Needs(weights=1000 * MIB, kv_token=1024, n_ff=1000)
    scratch = 512 * (4.5 * 1000 * 4 + 4096 * 2)
    assert needs.at(4096) == 1000 * MIB + 4096 * 1024 + scratch + 64 * MIB


def test_the_longest_context_fits_and_a_step_more_does_not() -> None:
    needs = fit.Needs(weights=100 * MIB, kv_token=23040, n_ff=1536)
    n_ctx = needs.longest_context(400 * MIB, 100_000)
    assert n_ctx % 256 == 0
    assert needs.at(n_ctx) <= 0.9 * 400 * MIB < needs.at(n_ctx + 256)
    assert needs.longest_context(400 * MIB, 1000) == 1000
    assert needs.longest_context(100 * MIB, 1000) == 0


@pytest.mark.parametrize(("n_bytes", "verdict"), [(90, "fits"), (91, "tight"), (101, "no")])
def test_verdicts(n_bytes: int, verdict: str) -> None:
    assert fit.judge(n_bytes, 100) == verdict


def test_the_table_grows_with_memory() -> None:
    for n_bytes, fitting in ((GIB // 4, 0), (GIB, 7), (64 * GIB, 24)):
        fits = fit.fit_examples(n_bytes)
        assert sum(one.verdict == "fits" for one in fits) == fitting
    assert len(fits) == len(fit.EXAMPLES) * len(fit.FILE_TYPES)


@pytest.mark.llama
def test_kv_cache_is_what_llama_cpp_takes(tiny_gguf: Path) -> None:
    from edgemerge.runtime.llama import Model

    found = fit.fit_model(tiny_gguf, GIB)
    with Model(tiny_gguf) as model, model.context(256, n_batch=64) as context:
        assert found.needs.weights == model.n_bytes
        assert found.needs.kv_token * 256 == pytest.approx(context.buffers.kv, abs=10_486)
    assert (found.n_ctx, found.n_ctx_train, found.verdict) == (256, 256, "fits")


def test_a_model_that_does_not_fit(tiny_gguf: Path) -> None:
    assert fit.fit_model(tiny_gguf, MIB).verdict == "no"
    n_bytes = fit.fit_model(tiny_gguf, MIB).needs.at(256)
    tight = fit.fit_model(tiny_gguf, int(n_bytes * 1.05))
    assert (tight.verdict, tight.n_ctx) == ("tight", 0)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match=r"x\.gguf"):
        fit.fit_model(tmp_path / "x.gguf", GIB)


def test_needs_where_layers_differ() -> None:
    """Lists have a value per layer, experts have their own width; the key's length is stated."""
    metadata = {
        "x.block_count": encode_value(3, "u32"),
        "x.embedding_length": encode_value(64, "u32"),
        "x.attention.head_count": encode_value(4, "u32"),
        "x.attention.head_count_kv": encode_value([0, 2, 1], "[u32]"),
        "x.attention.key_length": encode_value(32, "u32"),
        "x.feed_forward_length": encode_value([128, 256, 128], "[u32]"),
        "x.expert_used_count": encode_value(4, "u32"),
        "x.expert_feed_forward_length": encode_value(100, "u32"),
        "x.context_length": encode_value(777, "u32"),
        "x.attention.sliding_window": encode_value(512, "u32"),
    }
    needs, n_ctx_train = fit._read_needs(metadata, "x", 5)
    assert needs == fit.Needs(weights=5, kv_token=2 * 3 * (32 + 16), n_ff=400, n_masks=2)
    assert n_ctx_train == 777


def test_a_crafted_header_has_no_negative_needs() -> None:
    """Fault: `doctor --model` divided by zero."""
    metadata = {
        "x.block_count": encode_value(1, "u32"),
        "x.attention.head_count_kv": encode_value(1, "u32"),
        "x.attention.key_length": encode_value(-512, "i32"),
        "x.attention.value_length": encode_value(0, "i32"),
    }
    needs, n_ctx_train = fit._read_needs(metadata, "x", 5)
    assert needs.kv_token == 0
    assert needs.longest_context(GIB, n_ctx_train) == n_ctx_train


# -- advice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "budget"),
    [(120, None), (128, 128), (300, 128), (1000, 448), (8192, 4096), (60000, 4096)],
)
def test_budget_of_a_merge(available: int, budget: int | None) -> None:
    found = merge_budget(Memory(available * MIB, available * MIB, 0, 0))
    assert found == (None if budget is None else budget * MIB)
    assert found is None or found > FLOOR_BYTES


def test_advice_names_the_largest_of_each_type() -> None:
    memory = Memory(4 * GIB, 3 * GIB, 0, 0)
    largest, slow, threads, slots, prompts, merging = advise(
        memory, fit.fit_examples(3 * GIB), ThreadCounts(1, 4)
    )
    assert largest == (
        "the largest models that fit: Llama-3.2-3B in Q4_K_M (2.45 GiB), "
        "Qwen2.5-1.5B in Q8_0 (1.78 GiB), Llama-3.2-1B in F16 (2.56 GiB)"
    )
    assert "slow" in slow
    assert slots.startswith(
        "serve answers 8 requests at a time (--parallel), each with up to 4096 tokens (--ctx); "
    )
    assert prompts.startswith("serve reads prompts 256 tokens at a time: ")
    assert (threads, merging) == (
        "answers are fastest with 1 thread and prompts with 4 threads, as measured here: "
        "these are the defaults, -t N sets both",
        "merge with --memory 1536MiB at most",
    )


def test_advice_where_nothing_fits() -> None:
    memory = Memory(GIB, 100 * MIB, 0, 0)
    nothing, *_, merging = advise(memory, fit.fit_examples(memory.available), None)
    assert nothing.startswith("no model of the table fits")
    assert merging == "a merge needs about 124 MiB and 100 MiB are free: stop other programs first"


def warnings_of(root: Path, storage: Storage = STORAGE) -> list[str]:
    return list(
        warn_of_board(
            read_board(root),
            read_swaps(root),
            storage,
            read_temperature(root),
            read_throttling(root),
        )
    )


def starts(found: Sequence[str]) -> list[str]:
    return [sentence[:24] for sentence in found]


def test_warnings_of_a_raspberry_pi_5(tmp_path: Path) -> None:
    assert starts(warnings_of(boards.raspberry_pi_5(tmp_path))) == ["swap lies on an SD card,"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("50005", ["the voltage is too low: "]),  # the firmware throttles for the voltage
        ("d000d", ["the voltage is too low: ", "slowed down now (soft te"]),
        ("4", ["slowed down now (throttl"]),
        ("10000", ["the voltage has been too"]),
    ],
)
def test_warnings_of_throttling(tmp_path: Path, word: str, expected: list[str]) -> None:
    found = warnings_of(boards.raspberry_pi_5(tmp_path, word))
    assert starts(found) == [*expected, "swap lies on an SD card,"]


def test_warnings_of_a_raspberry_pi_4(tmp_path: Path) -> None:
    slow = replace(STORAGE, read_rate=40e6)
    assert starts(warnings_of(boards.raspberry_pi_4(tmp_path), slow)) == [
        "the processor is at 84 °",
        "the clock stays at its l",
        "there is no swap: where ",
        "reading /models is slow:",
    ]


def test_warnings_of_a_jetson(tmp_path: Path) -> None:
    root = boards.jetson_orin_nano(tmp_path)
    assert warnings_of(root) == [
        "clock limited to 0.7 of 1.5 GHz: choose a faster power mode "
        "(on a Jetson, sudo nvpmodel -p --verbose lists them)"
    ]
    (sentence,) = warn_of_llama(read_board(root), BUILD)
    assert sentence.startswith("llama.cpp is built without CUDA, which leaves the NVIDIA GPU idle;")
    assert "CMAKE_ARGS='-DGGML_CUDA=ON' pip install" in sentence
    assert list(warn_of_llama(read_board(root), replace(BUILD, can_offload=True))) == []


def test_warnings_of_a_build_for_another_processor(tmp_path: Path) -> None:
    board = read_board(boards.raspberry_pi_5(tmp_path))
    assert list(warn_of_llama(board, BUILD)) == []
    (sentence,) = warn_of_llama(board, replace(BUILD, features=("NEON",), is_debug=True))
    assert "without FP16_VA, DOTPROD, which this processor has, and for debugging" in sentence
    assert "build it again: CMAKE_ARGS='-DGGML_NATIVE=ON' pip install --no-deps " in sentence
    assert sentence.endswith(" llama-cpp-python==0.3.36")  # else pip takes the newest, and of all
    (sentence,) = warn_of_llama(board, replace(BUILD, is_debug=True))
    assert "several times slower; build it again: pip install" in sentence


def test_kernels_missing_from_a_build() -> None:
    assert missing_features(("AVX", "FMA"), ("avx", "avx2", "fma", "avx_vnni")) == ("AVX2",)


# -- the whole -------------------------------------------------------------------------------------


@pytest.mark.llama
def test_what_llama_cpp_says_of_itself() -> None:
    build = read_build()
    assert build.version
    assert "REPACK" in build.features
    assert build.can_offload or build.accelerators == ()


def test_examination_of_this_machine(tmp_path: Path, tiny_gguf: Path) -> None:
    found = examine(tmp_path, tiny_gguf)
    document = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert document["storage"]["folder"] == str(tmp_path)
    assert document["model"]["path"] == str(tiny_gguf)
    assert document["model"]["verdict"] == "fits"
    assert document["kernels"]["total"] >= len(document["kernels"]["cold"])
    assert 1 <= document["threads"]["generate"] <= document["board"]["threads"]
    assert len(document["fits"]) == 24


def test_examination_of_a_raspberry_pi(tmp_path: Path) -> None:
    root = boards.raspberry_pi_5(tmp_path, "50005")
    document = examine(tmp_path, root=root).as_json()
    assert document["board"]["soc"] == "bcm2712"
    assert document["swaps"] == ({"path": "/var/swap", "size": 524272 * 1024, "kind": "SD card"},)
    assert document["throttling"]["active"] is True
    assert document["power"]["watts"] == pytest.approx(boards.PMIC_WATTS)
    assert document["storage"]["disk"]["kind"] == "SD card"
    assert document["merge_budget"] == 3584 * MIB
    assert document["model"] is None


def test_examination_without_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> LlamaBuild:
        raise RuntimeFailure("install it with pip")

    monkeypatch.setattr(diagnosis, "read_build", refuse)
    found = examine(tmp_path)
    assert (found.llama, found.llama_problem) == (None, "install it with pip")


def test_accelerators_and_swap_are_plain_in_json(tmp_path: Path) -> None:
    gpu = Accelerator("CUDA0", "Orin", "GPU", 8 * GIB, 6 * GIB)
    found = examine(tmp_path)
    found = replace(
        found,
        llama=replace(BUILD, can_offload=True, accelerators=(gpu,)),
        swaps=(Swap("/dev/zram0", GIB, "zram"),),
    )
    document = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert document["llama"]["accelerators"][0]["description"] == "Orin"


def test_a_directory_is_judged_and_no_threads_are_measured_with_it(tmp_path: Path) -> None:
    document = examine(tmp_path, ARCHITECTURES / "llama").as_json()
    assert document["model"]["verdict"] == "fits"
