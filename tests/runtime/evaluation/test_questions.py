from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemerge.errors import FormatError
from edgemerge.runtime.evaluation.questions import FILES, FORMATS, Question, read_questions

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "lm_eval"


def test_the_stored_questions_can_be_read(eval_dir: Path) -> None:
    sizes = {path.stem: len(read_questions(path)) for path in eval_dir.glob("*.jsonl")}
    assert sizes == {"disease": 500, "substance": 500, "general": 300}


GOOD = json.dumps({"question": "q", "options": ["a", "b"], "answer": 1, "id": "kept out"})


def test_blank_lines_and_other_keys_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "good.jsonl"
    path.write_text(f"\n{GOOD}\n\n", encoding="utf-8")
    assert read_questions(path) == [Question("Question: q\nAnswer:", ("a", "b"), 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"options": ["a", "b"], "answer": 0}', "'question' must be a text"),
        ('{"question": "q", "answer": 0}', "'options' must be a list"),
        ('{"question": "q", "options": ["a"], "answer": 0}', "two or more"),
        ('{"question": "q", "options": ["a", " "], "answer": 0}', "not empty"),
        ('{"question": "q", "options": ["a", 1], "answer": 0}', "must be texts"),
        ('{"question": "q", "options": ["a", "b"], "answer": 2}', "0 to 1"),
        ('{"question": "q", "options": ["a", "b"], "answer": true}', "0 to 1"),
        ('{"question": "q", "options": ["a", "b"], "answer": "a"}', "0 to 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(FormatError, match=message) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "not JSON"),
        (f'{{"question": {"1" * 5000}}}', "not JSON"),
        ('{"question": "\\ud800", "options": ["a", "b"], "answer": 0}', "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("name", ["questions", "pubmedqa"])
def test_a_hostile_line_is_one_sentence(tmp_path: Path, name: str, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line.replace("question", "QUESTION") if name == "pubmedqa" else line)
    with pytest.raises(FormatError, match=f"{path.name}: ({message}|line 1: )"):
        read_questions(path, name)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(FormatError, match="no questions"):
        read_questions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        read_questions(path)


def first(name: str, file: str) -> Question:
    return read_questions(SAMPLES / file, name)[0]


def test_prompts_are_the_harness_s() -> None:
    assert first("medmcqa", "medmcqa.json") == Question(
        "Question: Which cranial nerve supplies the lateral rectus muscle?\nChoices:\nA. Oculomotor\n"
        "B. Trochlear\nC. Abducens\nD. Facial\nAnswer:",
        ("A", "B", "C", "D"),
        2,
    )
    medqa = first("medqa", "medqa.jsonl")
    assert medqa.prompt.startswith("Question: A 24-year-old man has had polyuria")
    assert medqa.prompt.endswith(
        "lack?\nA. Glucagon\nB. Insulin\nC. Cortisol\nD. Thyroxine\nAnswer:"
    )
    assert medqa.answer == 1
    pubmedqa = first("pubmedqa", "ori_pqal.json")
    assert pubmedqa.prompt.startswith("Abstract: Infections are common among children")
    assert "groups.\nForty groups" in pubmedqa.prompt
    assert pubmedqa.prompt.endswith(
        "\nQuestion: Does hand washing reduce infections in a kindergarten?\nAnswer:"
    )
    assert (pubmedqa.options, pubmedqa.answer) == (("yes", "no", "maybe"), 0)
    mmlu = read_questions(SAMPLES / "anatomy_test.csv", "mmlu")
    assert mmlu[1] == Question(
        "Where does the thoracic duct end?\nA. Right atrium\nB. Left venous angle\n"
        "C. Inferior vena cava\nD. Azygos vein\nAnswer:",
        ("A", "B", "C", "D"),
        1,
    )
    assert 'by its "sliding", moves' in mmlu[2].prompt


def test_every_form_of_a_file_gives_the_same_questions(tmp_path: Path) -> None:
    own = read_questions(SAMPLES / "medqa.jsonl", "medqa")
    assert read_questions(SAMPLES / "medqa_hub.jsonl", "medqa") == own

    own = read_questions(SAMPLES / "medmcqa.json", "medmcqa")
    rows = [json.loads(line) for line in (SAMPLES / "medmcqa.json").read_text().splitlines()]
    hub = tmp_path / "hub.jsonl"
    hub.write_text("".join(json.dumps({**row, "cop": row["cop"] - 1}) + "\n" for row in rows))
    assert read_questions(hub, "medmcqa") == own

    own = read_questions(SAMPLES / "ori_pqal.json", "pubmedqa")
    entries = json.loads((SAMPLES / "ori_pqal.json").read_text())
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries.values()))
    assert read_questions(lines, "pubmedqa") == own
    lines.write_text(json.dumps(next(iter(entries.values()))))
    assert read_questions(lines, "pubmedqa") == own[:1]
    assert read_questions(SAMPLES / "test_ground_truth.json", "pubmedqa") == own[1::2]


def test_each_format_is_described() -> None:
    assert [line.split()[0] for line in FILES.splitlines() if line[:1].islower()] == list(FORMATS)


def medqa(**changes: object) -> str:
    options = {"A": "a", "B": "b", "C": "c", "D": "d"}
    return json.dumps({"question": "q", "options": options, "answer_idx": "A", **changes})


def medqa_hub(**changes: object) -> str:
    endings = {f"ending{i}": "x" for i in range(4)}
    return json.dumps({"sent1": "q", **endings, "label": 0, **changes})


def medmcqa(**changes: object) -> str:
    return json.dumps({"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", **changes})


def pubmedqa(**changes: object) -> str:
    return json.dumps({"QUESTION": "q", "CONTEXTS": ["c"], "final_decision": "yes", **changes})


FIVE = dict(zip("ABCDE", "abcde", strict=True))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "medqa",
            medqa(options=FIVE),
            "line 1: 'options' must be an object with the texts A, B, C",
        ),
        ("medqa", medqa(answer_idx="E"), "line 1: 'answer_idx' must be one of A, B, C, D"),
        ("medqa", medqa(answer_idx=["A"]), "line 1: 'answer_idx' must be one of A, B, C, D"),
        ("medqa", medqa(question=None), "line 1: 'question' must be a text"),
        ("medqa", medqa_hub(label=4), "line 1: 'label' must be the index of an option, 0 to 3"),
        ("medqa", medqa_hub(ending2=7), "line 1: 'ending2' must be a text"),
        ("medmcqa", medmcqa(), "line 1: 'cop' must be a whole number"),
        ("medmcqa", medmcqa(cop=-1), "its answers are not public .cop is -1."),
        ("medmcqa", medmcqa(cop=2), "it has neither 0 nor 4 as 'cop', so"),
        ("medmcqa", f"{medmcqa(cop=0)}\n{medmcqa(cop=4)}", "it has both 0 and 4 as 'cop', so"),
        ("medmcqa", f"{medmcqa(cop=4)}\n{medmcqa(cop=5)}", "line 2: 'cop' must be 1 to 4, as in"),
        ("medmcqa", medmcqa(cop=4, opc=None), "line 1: 'opc' must be a text"),
        ("pubmedqa", pubmedqa(CONTEXTS="c"), "line 1: 'CONTEXTS' must be a list of texts"),
        ("pubmedqa", pubmedqa(final_decision="no idea"), "line 1: 'final_decision' must be one of"),
        ("pubmedqa", json.dumps({"1": {"QUESTION": 1}}), "PMID 1: 'QUESTION' must be a text"),
        ("pubmedqa", json.dumps({"1": 2}), "PMID 1: expected an object"),
        ("pubmedqa", json.dumps({"1": "yes"}), "it holds answers alone: put PubMedQA's ori_pqal"),
        ("pubmedqa", '{"1": {', "line 1: not JSON"),
        ("mmlu", "q,a,b,c,d", "line 1: expected a question, four options and a letter A to D"),
        ("mmlu", "q,a,b,c,d,A\nq,a,b,c,d,E\n", "line 2: expected a question"),
        ("mmlu", "q,a,b,c,d,A\n\n", "line 2: expected a question"),
        ("mmlu", "", "there are no questions in it"),
    ],
)
def test_a_wrong_record_of_a_published_file_is_named(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = tmp_path / "some_test.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=message) as caught:
        read_questions(path, name)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_answer_without_its_abstract_is_named(tmp_path: Path) -> None:
    (tmp_path / "ori_pqal.json").write_text("{}")
    path = tmp_path / "test_ground_truth.json"
    path.write_text('{"17": "yes"}')
    with pytest.raises(FormatError, match="PMID 17 is not in the ori_pqal"):
        read_questions(path, "pubmedqa")


def test_a_question_keeps_the_id_that_its_file_gives(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    line = {"question": "q", "options": ["a", "b"], "answer": 1}
    path.write_text("\n".join(map(json.dumps, ({**line, "id": "w-7"}, {**line, "id": 8}, line))))
    assert [question.id for question in read_questions(path)] == ["w-7", "8", None]


def test_a_mark_that_spreadsheets_write_is_no_part_of_the_first_question(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text('"What, then?",a,b,c,d,A\n', encoding="utf-8-sig")
    assert read_questions(path, "mmlu")[0].prompt.startswith("What, then?\nA. a")
