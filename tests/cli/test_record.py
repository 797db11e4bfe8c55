"""`edgemerge record`: what an auditor is told, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from tests.support.bits import flip_bit
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(tmp_path / "base.gguf")
    shutil.copy("base.gguf", "cardio.gguf")
    options = ("--base", "base.gguf", "cardio.gguf=0.5", "-P", "density=0.5", "-o", "ward.gguf")
    assert run("merge", "-m", "ties", *options).exit_code == 0


def run(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), [*map(str, arguments)])


def words(page: Path) -> str:
    return " ".join(re.sub("<[^>]*>", " ", page.read_text()).split())


def write_results(sha256: str, **more: Any) -> None:
    model = {"path": "ward.gguf", "files": [{"bytes": 1, "sha256": sha256}]}
    score = {"model": "ward.gguf", "task": "medqa", "n": 100, "acc": 0.5, "acc_stderr": 0.05}
    Path("results.json").write_text(json.dumps({"models": [model], "results": [score], **more}))


def test_it_says_what_of_what_and_how() -> None:
    result = run("record", "ward.gguf", "-o", "record.html")
    assert (result.exit_code, result.stdout) == (0, "record.html  record of ward.gguf\n")
    text = words(Path("record.html"))
    assert "architecture llama, 2 layers" in text
    assert re.search(r"base.gguf base [0-9a-f]{8} cardio.gguf model [0-9a-f]{8}", text)
    assert "ties: density 0.5, normalize on (default), rescale off (default)" in text
    assert "cardio.gguf: weight 0.5" in text
    assert "All 21 tensors are as they were written." in text
    assert re.search(r"written 20\d\d-\d\d-\d\dT", text)


def test_a_directory_has_the_type_of_its_tensors() -> None:
    given = ("-m", "linear", "base.gguf", "cardio.gguf", "-o", "ward/", "--type", "BF16")
    assert run("merge", *given).exit_code == 0
    assert run("record", "ward", "-o", "record.html").exit_code == 0
    assert "type BF16 size" in words(Path("record.html"))


def test_scores_are_those_of_this_very_file() -> None:
    first = json.loads(run("record", "ward.gguf", "-o", "a.html", "--json").stdout)
    sha256 = next(row[1] for row in first["sections"][0]["rows"] if row[0].startswith("sha256"))
    write_results(sha256)
    assert run("record", "ward.gguf", "--eval", "results.json", "-o", "b.html").exit_code == 0
    text = words(Path("b.html"))
    assert "This very file was asked, by its SHA-256." in text
    assert "medqa ward.gguf 100 50.0 % 40.2 to 59.8 %" in text
    write_results(sha256, loras=[{"path": "disease.gguf", "scale": 1.0}])
    assert run("record", "ward.gguf", "--eval", "results.json", "-o", "d.html").exit_code == 0
    assert "This file was asked with adapters, so the scores are not its own." in words(
        Path("d.html")
    )
    write_results("0" * 64)
    assert run("record", "ward.gguf", "--eval", "results.json", "-o", "c.html").exit_code == 0
    assert "None of the models that were asked is this file" in words(Path("c.html"))


def test_bytes_after_the_last_tensor_are_said() -> None:
    with Path("ward.gguf").open("ab") as file:
        file.write(b"more")
    assert run("record", "ward.gguf", "-o", "record.html").exit_code == 1
    text = words(Path("record.html"))
    assert "All 21 tensors are as they were written." in text
    assert "4 bytes after the last tensor were written by no merge." in text


def test_a_signature_that_does_not_hold_is_on_the_page_and_an_error() -> None:
    pytest.importorskip("cryptography")
    assert run("keygen", "key").exit_code == 0
    given = ("record", "ward.gguf", "--key", "key.pub.pem", "--force", "-o", "record.html")
    result = run(*given)
    assert result.exit_code == 1
    assert "edgemerge: ward.gguf: has no signature" in result.stderr
    assert "The signature does not hold: ward.gguf: has no signature" in words(Path("record.html"))
    assert run("sign", "ward.gguf", "--key", "key.pem").exit_code == 0
    assert run(*given).exit_code == 0
    assert "Every byte is signed by the key" in words(Path("record.html"))
    flip_bit(Path("ward.gguf"), 8 * 200)  # metadata, which no checksum covers
    result = run(*given)
    assert (result.exit_code, result.stdout) == (1, "record.html  record of ward.gguf\n")
    assert "is not what was signed" in result.stderr
    assert "The signature does not hold" in words(Path("record.html"))


def test_a_directory_has_no_signature_to_check() -> None:
    pytest.importorskip("cryptography")
    assert run("keygen", "key").exit_code == 0
    assert run("merge", "-m", "linear", "base.gguf", "cardio.gguf", "-o", "ward/").exit_code == 0
    for command in (
        ("record", "ward/", "-o", "record.html", "--key", "key.pub.pem"),
        ("verify", "ward/", "--key", "key.pub.pem"),
        ("sign", "ward/", "--key", "key.pem"),
    ):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "ward: is a folder, and only files such as a GGUF are signed" in result.stderr
    assert not Path("record.html").exists()


def test_a_damaged_file_has_a_record_that_says_so() -> None:
    flip_bit(Path("ward.gguf"), 8 * Path("ward.gguf").stat().st_size - 100)
    result = run("record", "ward.gguf", "-o", "record.html")
    assert result.exit_code == 1
    assert "1 of 21 tensors changed since the merge" in result.stderr
    assert "1 of 21 tensors changed since the merge." in words(Path("record.html"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--eval", "ward.gguf"), "ward.gguf: not UTF-8 text"),
        (("--eval", "list.json"), "list.json: is not what edgemerge eval -o writes; give that"),
        (
            ("--bench", "text.json"),
            "text.json: is not JSON; give what edgemerge bench --json wrote",
        ),
        (("--key", "absent.pem"), "absent.pem: there is no such file"),
    ],
)
def test_what_is_no_result_is_refused(options: tuple[str, ...], sentence: str) -> None:
    Path("list.json").write_text("[]")
    Path("text.json").write_text("speed")
    result = run("record", "ward.gguf", *options, "-o", "record.html")
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert not Path("record.html").exists()


@pytest.mark.parametrize(
    ("option", "document"),
    [
        ("--eval", {"results": [], "models": None}),
        ("--eval", {"results": [], "models": [{"files": None}, 1]}),
        ("--eval", {"results": [], "models": [{"files": [{"sha256": []}, None]}]}),
        ("--eval", {"results": [{"acc": 10**400}, {"acc": 0.5, "acc_stderr": 10**400}, None]}),
        ("--bench", {"models": [{"tests": None}, None]}),
        ("--bench", {"models": [{"tests": [{"avg_ts": 10**400}], "peak_rss_bytes": 10**400}]}),
    ],
)
def test_odd_results_are_left_out(option: str, document: dict[str, Any]) -> None:
    """Fault: they gave a traceback after the model had been read twice."""
    Path("odd.json").write_text(json.dumps(document))
    result = run("record", "ward.gguf", option, "odd.json", "-o", "record.html")
    assert (result.exit_code, result.stderr) == (0, "")
    said = {
        "--eval": "None of the models that were asked is this file, by its SHA-256.",
        "--bench": "No model that was measured has the name ward.gguf.",
    }
    assert said[option] in words(Path("record.html"))


def test_a_strangers_text_is_no_markup() -> None:
    Path("results.json").write_text(
        json.dumps({"results": [{"task": "<script>x</script>", "model": "&", "acc": 1.0}]})
    )
    assert run("record", "ward.gguf", "--eval", "results.json", "-o", "r.html").exit_code == 0
    assert "<script>" not in Path("r.html").read_text()
