"""`edgemerge align`: what it prints, draws and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from edgemerge.cli.align import _plan
from edgemerge.errors import BudgetError
from edgemerge.formats.adapters.adapted import AdaptedSource
from tests.merging.test_comparison import respell
from tests.support.fake_source import AdaptedFake, FakeSource
from tests.support.fake_source import tensor as described
from tests.support.tiny_gguf import write_tiny_gguf

Run = Callable[..., Result]
MIB = 1 << 20
MODELS = ("base", "expert-a", "expert-b-permuted")


@pytest.fixture
def run(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run in a folder with the real models under their names."""
    for name in MODELS:
        (tmp_path / name).symlink_to(models_dir / name)
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> Result:
        return CliRunner().invoke(make_app(), ["align", *arguments], prog_name="edgemerge")

    return run_command


def succeed(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def fail(result: Result) -> str:
    """One sentence on stderr and nothing else anywhere."""
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("edgemerge: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("edgemerge: ").rstrip("\n")


def document(run: Run, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed(run(*arguments, "--json")))
    return found


def made() -> set[str]:
    return {path.name for path in Path().iterdir()} - set(MODELS)


# -- what it says ------------------------------------------------------------------------------------


def test_reordered_heads_are_listed_by_group(run: Run) -> None:
    text = succeed(run("base", "expert-b-permuted"))
    assert re.sub(r"\d\.\d{4}", "#", text) == (
        "heads are in another order in 4 of 4 layers: merge with --align hard\n"
        "A is base, B is expert-b-permuted; costs with heads in place and matched: "
        "0 equal, 1 unrelated\n"
        "layer  in place  matched  gap  confidence  by        B's group[heads], in A's order\n"
        "    0  #    #   0         1.000  sinkhorn  3[7 6] 0[0 1] 1[3 2] 2[5 4]\n"
        "    1  #    #   0         1.000  sinkhorn  3[6 7] 2[5 4] 1[3 2] 0[1 0]\n"
        "    2  #    #   0         1.000  sinkhorn  1[2 3] 2[5 4] 3[7 6] 0[1 0]\n"
        "    3  #    #   0         1.000  sinkhorn  1[3 2] 3[6 7] 0[1 0] 2[5 4]\n"
    )
    assert made() == set()


def test_fine_tunes_of_one_base_are_in_place(run: Run) -> None:
    lines = succeed(run("base", "expert-a")).splitlines()
    assert lines[3].split()[:3] + lines[3].split()[-1:] == ["0", "to", "3", "place"]
    assert len(lines) == 4
    assert lines[0] == "expert-a's heads are where base's are: alignment changes nothing"


def test_json_is_one_object_with_whole_permutations(run: Run, models_dir: Path) -> None:
    found = document(run, "base", "expert-b-permuted", "--threads", "2", "--seed", "3")
    assert (found.pop("seconds") > 0, found.pop("peak_rss_bytes") > 0) == (True, True)
    stated = json.loads((models_dir / "expert-b-permuted" / "head_permutation.json").read_text())
    for i, (layer, truth) in enumerate(zip(found.pop("layers"), stated["layers"], strict=True)):
        assert layer.pop("heads") == np.argsort(truth["q_perm"]).tolist()
        assert layer.pop("kv_groups") == np.argsort(truth["kv_perm"]).tolist()
        assert layer.pop("cost") < 0.1 < 0.9 < layer.pop("identity_cost")
        assert layer.pop("confidence") > 0.99
        assert layer.pop("gap") >= 0.0
        assert layer.pop("iterations") > 0
        assert layer == {
            "layer": i,
            "converged": True,
            "exact": False,
            "guarded": False,
            "is_identity": False,
        }
    assert found == {
        "reference": "base",
        "model": "expert-b-permuted",
        "verdict": "reordered",
        "summary": "heads are in another order in 4 of 4 layers: merge with --align hard",
        "seed": 3,
        "workers": 2,
        "budget_bytes": 512 * MIB,
        "plot": None,
        "notes": [],
    }


def changed(name: str, change: Callable[[str, np.ndarray[Any, Any]], Any]) -> str:
    """Copy the base with every tensor that `change` returns something for replaced."""
    shutil.copytree(Path("base").resolve(), name)
    path = f"{name}/model.safetensors"
    tensors = load_file(path)
    for key, tensor in tensors.items():
        new = change(key, tensor)
        tensors[key] = tensor if new is None else new
    save_file(tensors, path, {"format": "pt"})
    return name


def test_strangers_are_told_apart_from_kin(run: Run) -> None:
    rng = np.random.default_rng(0)

    def redraw(key: str, tensor: np.ndarray[Any, Any]) -> Any:
        if "self_attn" in key:
            return (0.05 * rng.standard_normal(tensor.shape)).astype(tensor.dtype)
        return None

    stranger = changed("stranger", redraw)
    found = document(run, "base", stranger)
    assert found["verdict"] == "unrelated"
    assert all(layer["is_identity"] for layer in found["layers"])
    assert re.fullmatch(
        r"heads have little in common \(cost (0\.9|1\.0)\d of 1\): no order of them helps a merge",
        found["summary"],
    )
    lines = succeed(run("base", stranger)).splitlines()
    kept = [line for line in lines if line.endswith("in place (reordering gains too little)")]
    guarded = sum(layer["guarded"] for layer in found["layers"])
    assert guarded > 0
    assert 1 <= len(kept) <= guarded  # neighbours stand in one row


def test_skipped_layers_say_why(run: Run) -> None:
    shutil.copytree(Path("base").resolve(), "short")
    config = json.loads(Path("short/config.json").read_text())
    config["num_hidden_layers"] = 2
    Path("short/config.json").write_text(json.dumps(config))
    tensors = load_file("short/model.safetensors")
    kept = {k: t for k, t in tensors.items() if "layers.2." not in k and "layers.3." not in k}
    save_file(kept, "short/model.safetensors", {"format": "pt"})
    reason = "only one of the models has the layer"
    for pair in (("base", "short"), ("short", "base")):
        found = document(run, *pair)
        assert found["layers"][2:] == [{"layer": i, "skipped": reason} for i in (2, 3)]
        assert found["verdict"] == "in_place"
    lines = succeed(run("base", "short", "--plot", "x.png")).splitlines()
    rows = [(line.split()[:3], line.endswith(f"  skipped: {reason}")) for line in lines[3:5]]
    assert rows == [(["0", "to", "1"], False), (["2", "to", "3"], True)]


def test_full_tells_of_values_and_neurons_too(run: Run) -> None:
    found = document(run, "base", "expert-b-permuted", "--full")
    for layer, neurons in zip(found["layers"], found["neurons"], strict=True):
        assert layer["values"]["is_identity"]  # only permuted
        assert layer["values"]["cost"] <= layer["values"]["identity_cost"] < 0.1
        assert (neurons["is_identity"], len(neurons["order"])) == (True, 512)
    lines = succeed(run("base", "expert-b-permuted", "--full")).splitlines()
    assert " ".join(lines[7].split()) == "layer values in place rotated neurons in place matched"
    assert [len(line.split()) for line in lines[8:]] == [5] * 4
    plain = document(run, "base", "expert-b-permuted")
    assert "neurons" not in plain
    assert "values" not in plain["layers"][0]


def test_tokens_that_differ_are_a_note(run: Run) -> None:
    """Fault: models with other tokens were refused, and heads do not depend on tokens."""
    for name in ("x.gguf", "y.gguf"):
        write_tiny_gguf(Path(name))
    respell(Path("y.gguf"), 20)
    note = "the tokenizers of x.gguf and y.gguf have little in common"
    assert document(run, "x.gguf", "y.gguf")["notes"] == [note]
    assert succeed(run("x.gguf", "y.gguf")).endswith(f"\nnote: {note}\n")


def test_models_of_the_same_name_are_told_apart(run: Run) -> None:
    Path("x").mkdir()
    Path("x/base").symlink_to(Path("base").resolve())
    text = succeed(run("base", "x/base"))
    assert text.startswith("x/base's heads are where base's are: alignment changes nothing\n")


def test_what_is_long_is_shortened_and_said_so() -> None:
    from edgemerge.cli.align_tables import _permutation
    from tests.reports.test_plots import make_plan

    order = np.random.default_rng(0).permutation(64).tolist()
    text, shortened = _permutation(make_plan(order, 64))
    assert (len(text) <= 60, text[-4:], shortened) == (True, " ...", True)
    assert _permutation(make_plan([1, 0, 2, 3], 4)) == ("1 0 2 3", False)
    assert _permutation(make_plan([1, 0, 2, 3], 1)) == ("0[1 0 2 3]", False)


# -- the picture ---------------------------------------------------------------------------------------


def test_the_picture_is_made_whole(run: Run) -> None:
    text = succeed(run("base", "expert-b-permuted", "--plot", "heads.png"))
    assert text.endswith("\ndrawn in heads.png\n")
    assert text.startswith("heads are in another order")
    height, width, _ = imread("heads.png").shape
    assert width > 2 * height > 800
    assert made() == {"heads.png"}
    before = Path("heads.png").read_bytes()
    message = "heads.png: exists already; choose another name or give --force"
    assert fail(run("base", "expert-a", "--plot", "heads.png")) == message
    assert Path("heads.png").read_bytes() == before
    found = document(run, "base", "expert-a", "--plot", "heads.png", "--force")
    assert found["plot"] == "heads.png"
    assert Path("heads.png").read_bytes() != before


def test_a_picture_that_cannot_be_is_refused_before_the_work(run: Run) -> None:
    message = "no/x.png: the folder no does not exist; make it first"
    assert fail(run("base", "nowhere", "--plot", "no/x.png")) == message
    result = run("base", "expert-a", "--plot", "heads.svg")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--plot heads.svg must end in .png" in " ".join(result.stderr.split())
    assert made() == set()


def test_without_matplotlib_only_the_picture_is_missed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = "drawing needs matplotlib: install it with pip install 'edgemerge[plot]'"
    assert fail(run("base", "expert-a", "--plot", "x.png")) == message
    succeed(run("base", "expert-a"))


# -- what it refuses -------------------------------------------------------------------------------------


def test_the_smallest_budget_is_named_and_works(run: Run) -> None:
    for extra in ((), ("--plot", "x.png", "--force")):
        message = fail(run("base", "expert-a", "--memory", "64MiB", *extra))
        match = re.fullmatch(
            r"a budget of 64 MiB is too small for this alignment; "
            r"the smallest that works is --memory (\d+)MiB",
            message,
        )
        assert match is not None
        least = int(match[1])
        assert fail(run("base", "expert-a", "--memory", f"{least - 1}MiB", *extra)) != ""
        arguments = ["base", "expert-b-permuted", "--memory", f"{least}MiB", *extra, "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "edgemerge", "align", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found["peak_rss_bytes"] <= found["budget_bytes"] == least * MIB
        assert found["workers"] == 1


UP = [described(f"blk.{layer}.ffn_up.weight", (512, 256)) for layer in range(2)]
BASE = FakeSource("/m/base", extra=UP)


@pytest.mark.parametrize("full", [False, True])
def test_adapters_count_in_the_budget(full: bool) -> None:
    """Fault: `align --memory` took more than it was given where a model had an adapter."""

    def least(other: FakeSource) -> int:
        with pytest.raises(BudgetError) as caught:
            _plan(BASE, other, MIB, 2, plotted=False, full=full)
        return caught.value.needed

    plain, adapted = FakeSource("/m/a", extra=UP), AdaptedFake("/m/a+x", extra=UP)
    assert isinstance(adapted, AdaptedSource)
    assert least(adapted) == least(plain) + 2 * adapted.held + adapted.reading
    works = [
        _plan(BASE, one, least(adapted) + 10 * MIB, 2, plotted=False, full=full)
        for one in (plain, adapted)
    ]
    assert [work.workers for work in works] == [2, 1]


def test_budget_and_threads_do_not_show(run: Run) -> None:
    one = document(run, "base", "expert-b-permuted", "--memory", "352MiB", "--threads", "1")
    two = document(run, "base", "expert-b-permuted", "--memory", "1G", "--threads", "4")
    assert one["layers"] == two["layers"]


def test_errors_are_one_sentence(run: Run, golden_dir: Path) -> None:
    message = "no: cannot be read (No such file or directory); check the path"
    assert fail(run("base", "no")) == message
    assert fail(run("no", "base")) == message
    assert fail(run("base", "expert-a", "--memory", "lots")).startswith("'lots' is no size;")
    other = str(golden_dir / "inputs_f32" / "a")
    assert fail(run("base", other)).startswith("llama.attention.head_count is 8 in base and 4 in")
    for arguments in (("base",), ("base", "expert-a", "--threads", "0")):
        assert run(*arguments).exit_code == 2
    bad = changed(
        "bad", lambda key, t: np.full_like(t, np.inf) if "1.self_attn.k_proj" in key else None
    )
    message = fail(run("base", bad))
    assert message == (
        "bad: tensor 'blk.1.attn_k.weight': holds NaN or infinity; that model is damaged, "
        "get it again"
    )


def test_a_signal_while_workers_read_stops_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_progress: object, _total: int) -> Callable[[int], None]:
        return lambda _n_bytes: os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("edgemerge.cli.align._adder", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run under nohup
    try:
        result = run("base", "expert-a", "--plot", "x.png")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "edgemerge: interrupted; nothing was changed\n"
    assert made() == set()
