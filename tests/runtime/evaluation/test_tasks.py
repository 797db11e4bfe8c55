from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgemerge.errors import FormatError
from edgemerge.runtime.evaluation.questions import read_questions
from edgemerge.runtime.evaluation.tasks import read_task

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "lm_eval"


def test_a_sample_is_drawn_by_seed_and_asked_in_the_files_order(eval_dir: Path) -> None:
    path = eval_dir / "general.jsonl"
    whole = read_questions(path)
    task = read_task("questions", path, limit=5, seed=3)
    assert task.indices == (66, 121, 189, 242, 278)  # for good: results are compared by it
    assert task.questions == tuple(whole[i] for i in task.indices)
    assert (task.name, task.n_total, task.n_shots) == ("general", 300, 0)
    assert read_task("questions", path, limit=5, seed=3) == task
    assert read_task("questions", path, limit=5, seed=4).indices != task.indices
    for limit in (None, 300, 1000):
        assert read_task("questions", path, limit=limit).indices == tuple(range(300))


def test_examples_and_description_come_before_the_question() -> None:
    task = read_task(
        "mmlu", SAMPLES / "anatomy_test.csv", shots=2, examples=SAMPLES / "anatomy_dev.csv"
    )
    assert task.name == "mmlu_anatomy"
    assert task.questions[0].prompt == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Which organ makes bile?\nA. Gallbladder\nB. Pancreas\nC. Stomach\nD. Liver\nAnswer: D\n\n"
        "Which chamber pumps blood into the aorta?\nA. Left ventricle\nB. Right ventricle\n"
        "C. Left atrium\nD. Right atrium\nAnswer: A\n\n"
        "Which bone is the longest in the human body?\nA. Femur\nB. Tibia\nC. Humerus\nD. Ulna\nAnswer:"
    )
    zero = read_task("mmlu", SAMPLES / "anatomy_test.csv")
    assert zero.questions[0].prompt.startswith("The following are multiple choice questions")


def test_a_subject_of_several_words(tmp_path: Path) -> None:
    path = tmp_path / "college_medicine_val.csv"
    shutil.copy(SAMPLES / "anatomy_test.csv", path)
    task = read_task("mmlu", path)
    assert task.name == "mmlu_college_medicine"
    assert "(with answers) about college medicine.\n\n" in task.questions[0].prompt


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = SAMPLES / "anatomy_test.csv"
    with pytest.raises(FormatError, match="it has 5 examples, not 6"):
        read_task("mmlu", path, shots=6, examples=SAMPLES / "anatomy_dev.csv")
    other = tmp_path / "virology_dev.csv"
    shutil.copy(SAMPLES / "anatomy_dev.csv", other)
    with pytest.raises(FormatError, match="its examples are not about anatomy"):
        read_task("mmlu", path, shots=5, examples=other)
    for name in ("anatomy.csv", "_test.csv"):
        nameless = tmp_path / name
        shutil.copy(path, nameless)
        with pytest.raises(FormatError, match="is named SUBJECT_test"):
            read_task("mmlu", nameless)
