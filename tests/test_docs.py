"""README.md, CONTRIBUTING.md and docs/ say what the program does, and every link and path leads somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from edgemerge.cli import make_app
from edgemerge.formats.architectures import FAMILIES
from edgemerge.formats.hub.families import READERS
from edgemerge.methods.table import METHODS
from edgemerge.recipe.recipe import load_recipe
from tools.write_docs import command_names, help_text, rewrite

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
SPEED = ROOT / "benchmarks" / "SPEED.md"
ARM = ROOT / "benchmarks" / "ARM.md"
MEASURED = ("benchmarks", "quality", "delta", "boards")
BENCHMARKS = [SPEED, ARM, *(ROOT / "docs" / f"{name}.md" for name in MEASURED)]
FENCE = re.compile(r"^```.*?^```\n", re.MULTILINE | re.DOTALL)
MAX_BYTES = 8192
MAX_WORDS = 25  # of a sentence
MAX_MEDIAN = 18
TREES = ("edgemerge", "kernels", "tests", "tools", "benchmarks", "docs", r"\.ci")
ENDED = ("129", "130", "143")  # exit codes after signals
PLACEHOLDERS = ("NAME", "TYPE")
# What README.md calls the families that are read from directories.
FAMILY_NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral3": "Ministral 3",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "gemma2": "Gemma 2",
    "gemma3_text": "3, 3n and 4 (text)",
    "phi3": "Phi-3",
    "granite": "Granite 3",
    "granitemoehybrid": "Granite 3 and 4",
    "qwen3_5_text": "Qwen3.5",
    "falcon_h1": "Falcon-H1",
    "gpt_oss": "gpt-oss",
    "llama4_text": "Llama 4 (text)",
    "lfm2": "LFM2",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 2 and 3",
    "smollm3": "SmolLM3",
}
# What depends on the machine in the output of a merge: seconds, workers, memory at the peak.
MACHINE = re.compile(r"in [\d.]+ s with \d+ workers?|memory [\d.]+ MiB at peak")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# -- what is quoted from the program ------------------------------------------------------------------


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_a_page_quotes_the_program_as_it_is(page: Path) -> None:
    assert rewrite(read(page)) == read(page), "run make docs"


@pytest.mark.parametrize("command", command_names())
def test_every_option_of_a_command_is_documented(command: str) -> None:
    section = read(ROOT / "docs" / "commands.md").partition(f"\n## {command}\n")[2]
    section = section.partition("\n## ")[0]
    assert help_text(command) in section
    found: Any = typer.main.get_command(make_app([command.split()[0]]))
    for word in command.split():
        found = found.commands[word]
    shown = [p for p in found.params if not getattr(p, "hidden", False)]
    spellings = [word for p in shown for word in p.opts if word.startswith("-")]
    assert [word for word in spellings if word not in section] == []


def test_the_program_and_its_exit_codes_are_documented() -> None:
    page = read(ROOT / "docs" / "commands.md")
    assert help_text("") in page
    assert "--version" in help_text("")
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == ["0", "1", "2", "3", *ENDED]


def test_both_pages_show_the_same_line_of_wings() -> None:
    pages = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md")
    shown = [re.findall(r"^cli -> .*?^```", read(page), re.MULTILINE | re.DOTALL) for page in pages]
    assert len(shown[0]) == 1
    assert shown[0] == shown[1]


def test_every_method_and_parameter_is_documented() -> None:
    text = read(ROOT / "docs" / "methods.md")
    names = [*METHODS, *(p.name for method in METHODS.values() for p in method.parameters)]
    assert [word for word in names if f"| `{word}` |" not in text] == []


def test_every_family_that_is_read_is_named() -> None:
    assert FAMILIES.keys() == READERS.keys() >= FAMILY_NAMES.keys()  # the README names the first
    limits = " ".join(read(README).partition("\n## Limits\n")[2].partition("\n## ")[0].split())
    assert [known for known in FAMILY_NAMES.values() if known not in limits] == []
    page = read(ROOT / "docs" / "models.md")
    assert [family for family in READERS if f"\n| `{family}` |" not in page] == []


# -- the README ---------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= MAX_BYTES


def sentences(text: str) -> list[str]:
    """Sentences of prose: no code, tables, headings, pictures or addresses of links."""
    text = re.sub(r"!\[.*?\]\(.*?\)|<!--.*?-->", "", FENCE.sub("\n", text))
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"^(#|\|).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *(-|\d+\.) ", "\n", text, flags=re.MULTILINE)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [s for part in paragraphs for s in re.split(r"(?<=[.!?:])\s+(?=[A-Z`*])", part) if s]


def prose(page: Path) -> list[str]:
    """Sentences of a page without what is quoted from the program."""
    quoted = r"<!-- docs:\w+ -->.*?<!-- /docs -->"
    return sentences(re.sub(quoted, "", read(page), flags=re.DOTALL))


@pytest.mark.parametrize("page", [*PAGES, ARM, CHANGELOG], ids=name)
def test_sentences_are_short(page: Path) -> None:
    assert [s for s in prose(page) if len(s.split()) >= MAX_WORDS] == []
    assert statistics.median(len(s.split()) for s in prose(page)) < MAX_MEDIAN


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("summary")


def summary_block() -> str:
    found = re.search(r"<!-- bench:summary -->\n(.*?)<!-- /bench -->", read(README), re.DOTALL)
    assert found
    return found[1]


def test_the_readmes_table_is_made_of_the_benchmarks(summary: ModuleType) -> None:
    assert summary_block() == summary.render() + "\n", "run benchmarks/summary.py"


def test_the_table_of_merges_may_lack_the_peers(
    summary: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`make bench` measures edgemerge alone; only `make bench-peers` sets mergekit up."""

    read_block = summary.read_block

    def without_peers(page: Path, bench: str) -> Any:
        block = read_block(page, bench)
        if bench != "merge":
            return block
        rows = [row[:5] for row in block.rows]
        return dataclasses.replace(block, header=block.header[:5], rows=rows)

    assert "mergekit" in summary.render()
    monkeypatch.setattr(summary, "read_block", without_peers)
    assert "mergekit" not in summary.render()
    pytest.importorskip("matplotlib")
    summary.draw(tmp_path / "summary.png")
    assert (tmp_path / "summary.png").stat().st_size > 0


def test_every_number_of_the_readmes_table_is_in_the_file_it_names() -> None:
    rows = [line for line in summary_block().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 4
    for row in rows:
        *cells, source = row.strip("| ").split(" | ")
        link = re.search(r"\[(\w+)\]\((\S+)\), commit (\w+)", source)
        assert link, row
        marked = rf"<!-- bench:{link[1]} -->(.*?)<!-- /bench -->"
        block = re.search(marked, read(ROOT / link[2]), re.DOTALL)
        assert block, link[2]
        assert f"commit {link[3]}" in block[1]
        measured = " ".join(cells[1:])
        for number in re.findall(r"\d+(?:\.\d+)?", measured):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", block[1]), number


def test_every_table_of_a_benchmark_says_where_it_was_measured() -> None:
    for page in BENCHMARKS:
        blocks = re.findall(r"<!-- bench:(\w+) -->\n(.*?)<!-- /bench -->", read(page), re.DOTALL)
        assert blocks, name(page)
        for bench, block in blocks:
            assert (ROOT / "benchmarks" / f"bench_{bench}.py").is_file()
            assert re.search(r"^Measured on: .*, commit \w+\.$", block, re.MULTILINE), bench


# -- what the README says that commands print ---------------------------------------------------------


def shown_commands() -> list[tuple[str, str]]:
    """Commands of the README after `$ `, each with the output that stands below."""
    blocks = re.findall(r"^```\n\$ (.*?)\n(.*?)^```$", read(README), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    return blocks


@pytest.mark.llama
def test_the_readmes_commands_print_what_it_shows(
    tmp_path: Path, models_dir: Path, eval_dir: Path
) -> None:
    pytest.importorskip("llama_cpp")
    folder = tmp_path / "demo-output"
    folder.mkdir()
    (tmp_path / "tests" / "models").mkdir(parents=True)
    (tmp_path / "tests" / "models" / "eval").symlink_to(eval_dir)
    edgemerge = [sys.executable, "-m", "edgemerge"]
    for model in ("base", "expert-a", "expert-b"):
        convert = [*edgemerge, "convert", str(models_dir / model), "-o", f"{model}.gguf"]
        subprocess.run(convert, cwd=folder, check=True, capture_output=True)
    for command, output in shown_commands():
        program, *words = command.split()
        assert program == "edgemerge"
        found = subprocess.run(
            [*edgemerge, *words], cwd=folder, check=True, capture_output=True, text=True
        )
        assert MACHINE.sub("", found.stdout) == MACHINE.sub("", output), command
    recipe = re.search(r"^```yaml\n(.*?)^```", read(README), re.MULTILINE | re.DOTALL)
    assert recipe
    (folder / "recipe.yml").write_text(recipe[1])
    assert load_recipe(folder / "recipe.yml").method == "ties"


# -- links and paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, SPEED, ARM, CHANGELOG], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", read(page)))
    inside = [target for target in targets if "://" not in target]
    assert [target for target in inside if not (page.parent / target).exists()] == []


def test_the_index_of_the_documentation_names_every_page() -> None:
    index = read(ROOT / "docs" / "README.md")
    assert [p.name for p in DOCS if p.name != "README.md" and f"({p.name})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_of_code_exist(page: Path) -> None:
    paths = re.findall(rf"`((?:{'|'.join(TREES)})/[\w./-]*)", read(page))
    named = {path for path in paths if not any(word in path for word in PLACEHOLDERS)}
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
