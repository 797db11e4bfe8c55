from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgemerge.cli.demo_answers import N_SHOWN, SEED, answer_lines
from edgemerge.cli.demo_steps import output_folder
from edgemerge.errors import OutputError
from edgemerge.runtime.evaluation.evaluate import Mark
from edgemerge.runtime.evaluation.questions import Question, read_questions
from edgemerge.runtime.evaluation.tasks import read_task


def marks(questions: list[Question], chosen: int) -> list[Mark]:
    return [Mark(chosen, chosen, q.answer == chosen, q.answer == chosen) for q in questions]


def test_all_held_out_questions_fit_eighty_columns(eval_dir: Path) -> None:
    for name in ("disease", "substance"):
        questions = read_questions(eval_dir / f"{name}.jsonl")
        lines = answer_lines(questions, {f"model {i}": marks(questions, i) for i in range(4)})
        assert max(map(len, lines)) <= 80
        assert "belong to" not in "\n".join(lines)
        assert "What class" not in "\n".join(lines)


def test_a_right_answer_is_marked_and_counted() -> None:
    prompt = "Question: What class of substance is insulin?\nAnswer:"
    questions = [Question(prompt, ("enzymes", "hormones"), 1)]
    lines = answer_lines(questions, {"a": marks(questions, 0), "b": marks(questions, 1)})
    assert "insulin = hormones" in lines
    assert [line.split() for line in lines if "*" in line] == [["enzymes", "*hormones"]]
    assert lines[-1].split() == ["0", "of", "1", "1", "of", "1"]


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match="cannot be made a folder"), output_folder(tmp_path / "a"):
        pass


def test_an_interrupt_tells_of_the_files_that_are_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, output_folder(tmp_path / "kept"):
        raise KeyboardInterrupt
    said = f"what was merged stays in {tmp_path / 'kept'}; --force replaces it"
    assert caught.value.__notes__ == [said]


@pytest.mark.llama
def test_the_demo_shows_what_four_models_answer(tmp_path: Path, eval_dir: Path) -> None:
    pytest.importorskip("llama_cpp")
    command = [sys.executable, "-m", "edgemerge", "demo", "--limit", "4", "-o", str(tmp_path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = text[text.index("The best of these merges") :]
    assert max(map(len, text.splitlines())) <= 80
    for name in ("disease", "substance"):
        task = read_task(name, eval_dir / f"{name}.jsonl", limit=N_SHOWN, seed=SEED)
        for question in task.questions:
            assert f"= {question.options[question.answer]}" in text
    counts = re.findall(r"(\d+) of 10\b", text)
    assert len(counts) == 4
    assert text.count("*") == sum(map(int, counts)) + 1  # and once in the legend
