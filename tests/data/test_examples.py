"""Reading the examples of a task."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from citer_hf.data.examples import Example, read_examples

CHOICES = {"text": ["the sun", "the moon"], "label": ["A", "B"]}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def only(*rows: dict[str, Any], **options: Any) -> Example:
    (example,) = read_examples(list(rows), **options)
    return example


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_multiple_choice_lists_the_choices_in_the_prompt_and_has_no_reference() -> None:
    example = only({"id": "q7", "question": "What shines?", "choices": CHOICES, "answerKey": "A"}, needs=["answer"])
    assert example == Example(
        id="q7",
        row=1,
        prompt="What shines?\nA. the sun\nB. the moon\nAnswer:",
        answer="A",
        choices=(("A", "the sun"), ("B", "the moon")),
    )


def test_math_takes_the_answer_from_the_last_box_with_its_braces() -> None:
    solution = r"First \boxed{1}, then \boxed{\frac{1}{2} \} x}."
    example = only({"problem": "Half?", "solution": solution}, needs=["answer", "response"])
    assert (example.prompt, example.response, example.answer) == ("Half?", " " + solution, r"\frac{1}{2} \} x")


def test_math_prefers_its_own_answer_column() -> None:
    assert only({"problem": "P", "solution": r"\boxed{1}", "answer": 1.0}).answer == "1"


@pytest.mark.parametrize(
    ("prompt", "cot", "response"),
    [("Why?", "So 4.", " So 4."), ("Why? ", "So 4.", "So 4."), ("Why?\n", "So 4.", "So 4."), ("Why?", "\nSo", "\nSo")],
)
def test_a_chain_of_thought_follows_its_prompt_with_one_space(prompt: str, cot: str, response: str) -> None:
    example = only({"prompt": prompt, "cot": cot, "answerKey": "A", "choices": CHOICES})
    assert (example.response, example.answer) == (response, "A")
    assert example.choices is not None


@pytest.mark.parametrize("column", ["response", "completion"])
def test_generic_text_is_joined_as_it_is(column: str) -> None:
    example = only({"prompt": " a\n", column: "b ", "answer": "c"})
    assert (example.prompt, example.response, example.answer) == (" a\n", "b ", "c")


def test_the_last_turn_of_a_chat_is_the_reference() -> None:
    example = only({"messages": [{**USER, "tool_calls": None}, ASSISTANT]}, needs=["response"])
    assert (example.prompt, example.messages, example.response) == (None, (USER,), "Hello")


def test_a_chat_may_have_its_reference_in_a_column() -> None:
    example = only({"messages": [USER], "response": "Hello"})
    assert (example.messages, example.response) == ((USER,), "Hello")


def test_a_prompt_and_a_completion_may_be_messages() -> None:
    example = only({"prompt": [USER], "completion": [ASSISTANT]})
    assert (example.messages, example.response) == ((USER,), "Hello")


def test_two_references_of_one_chat_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data, row 1: messages ends with a turn of the assistant.*'response'"):
        read_examples([{"messages": [USER, ASSISTANT], "response": "Hello"}])


@pytest.mark.parametrize(
    "messages", [[{"role": "user"}], ["Hi"], [{"role": "user", "content": ["Hi"]}], {"role": "x"}]
)
def test_messages_of_another_form_are_refused(messages: Any) -> None:
    with pytest.raises(ValueError, match=r"data, row 1: messages .*list of messages"):
        read_examples([{"messages": messages}])


def test_columns_are_mapped() -> None:
    row = {"q": "a", "r": "b", "final": 4, "key": 9, "cot": "unused"}
    example = only(row, columns={"prompt": "q", "response": "r", "answer": "final", "id": "key"})
    assert example == Example(id="9", row=1, prompt="a", response="b", answer="4")


def test_a_mapped_solution_is_where_the_answer_comes_from() -> None:
    row = {"problem": "P", "worked": r"\boxed{3}"}
    assert only(row, columns={"response": "worked"}, needs=["answer"]).answer == "3"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "z"}, "no column 'z' for prompt; its columns: 'q', 'r'"),
        ({"promt": "q"}, "no field 'promt'; the fields are prompt, messages"),
        ({}, r"the columns 'q', 'r' are of no known format. Known: .*\(math\).*columns=\{'prompt'"),
    ],
)
def test_an_unknown_table_is_told_how_to_be_mapped(columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples([{"q": "a", "r": "b"}], columns)


def test_a_field_with_two_columns_is_asked_about() -> None:
    row = {"prompt": "a", "cot": "b", "response": "c"}
    with pytest.raises(ValueError, match="'response', 'cot' could each be the response; say which"):
        read_examples([row])
    assert only(row, columns={"response": "response"}).response == "c"


@pytest.mark.parametrize("gap", [None, "", "  ", float("nan")])
def test_gaps_are_named_and_counted(gap: Any) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": gap}, {"prompt": "c"}]
    assert [example.answer for example in read_examples(rows)] == ["1", None, None]
    with pytest.raises(
        ValueError, match=r"data, row 2: answer \(column 'answer'\) is missing or empty. .* 1 more of 3"
    ):
        read_examples(rows, needs=["answer"])
    with pytest.raises(ValueError, match=r"data, row 2: prompt \(column 'prompt'\) is missing or empty.$"):
        read_examples([{"prompt": "a"}, {"prompt": gap}])


def test_a_solution_without_a_box_lacks_an_answer() -> None:
    with pytest.raises(ValueError, match=r"row 1: answer \(no .boxed\{\} in the solution\) is missing"):
        read_examples([{"problem": "P", "solution": "none"}], needs=["answer"])


def test_a_needed_field_without_a_column_says_how_to_map_it() -> None:
    with pytest.raises(ValueError, match=r"needs a response, .*'prompt'.*--map response=COLUMN"):
        read_examples([{"prompt": "a"}], needs=["response"])


def test_rows_with_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="rows 1 and 3 have the same id '5'"):
        read_examples([{"prompt": "a", "id": 5}, {"prompt": "b", "id": 6}, {"prompt": "c", "id": "5"}])


@pytest.mark.parametrize(("answer", "text"), [(4.0, "4"), (4.5, "4.5"), (7, "7"), ("007", "007"), (" 4.0 ", "4.0")])
def test_answers_become_text(answer: Any, text: str) -> None:
    assert only({"prompt": "a", "answer": answer}).answer == text


def test_an_answer_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1: answer \(column 'answer'\) must be text, got list"):
        read_examples([{"prompt": "a", "answer": ["4"]}])


@pytest.mark.parametrize(
    "choices", [["a", "b"], {"text": ["a"], "label": ["A", "B"]}, {"text": ["a", "b"], "label": "AA"}]
)
def test_choices_of_another_form_are_refused(choices: Any) -> None:
    with pytest.raises(ValueError, match="row 1: choices"):
        read_examples([{"question": "q", "choices": choices, "answerKey": "A"}])


def test_an_answer_that_is_no_label_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1: the answer 'E' is none of the labels 'A', 'B'"):
        read_examples([{"question": "q", "choices": CHOICES, "answerKey": "E"}])


def test_json_lines_keep_texts_and_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(
        '\ufeff{"prompt": "a\u2028b", "answer": "2020-01-02"}\n\n{"prompt": "c", "answer": 123456789012345678901}\n'
    )
    first, second = read_examples(path)
    assert (first.prompt, first.answer, first.row) == ("a\u2028b", "2020-01-02", 1)
    assert (second.answer, second.row, second.id) == ("123456789012345678901", 3, "3")


def test_json_may_be_an_array(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1))
    assert [example.prompt for example in read_examples(str(path))] == ["a", "b"]


def test_csv_keeps_texts_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "task.csv"
    path.write_text('prompt,answer\na,007\n"b\nc, d",NA\ne,4.0\nf,\n')
    examples = read_examples(path)
    assert [example.prompt for example in examples] == ["a", "b\nc, d", "e", "f"]
    # pandas writes a column of whole numbers so when one is missing.
    assert [example.answer for example in examples] == ["007", "NA", "4", None]


def test_csv_holds_choices_and_messages_as_json(tmp_path: Path) -> None:
    path = tmp_path / "task.csv"
    path.write_text('question,choices,answerKey\nq,"' + json.dumps(CHOICES).replace('"', '""') + '",B\n')
    assert read_examples(path)[0].choices == (("A", "the sun"), ("B", "the moon"))
    path.write_text("question,choices,answerKey\nq,A or B,B\n")
    with pytest.raises(ValueError, match=r"row 1: choices .* must be JSON"):
        read_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "\n", "a.jsonl: there are no rows"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl, line 2: broken JSON"),
        ("a.jsonl", "3\n", "row 1: expected an object with named fields, got int"),
        ("a.json", '[{"prompt": "a"},\n]', "a.json, line [12]: broken JSON"),
        ("a.csv", "prompt,answer\n", "a.csv: there are no rows"),
        (
            "a.csv",
            "prompt,answer\na,b\nc\n",
            r"a.csv, line 3: .* as many values as there are columns \(prompt, answer\)",
        ),
        ("a.csv", "prompt,answer\na,b,c\n", "a.csv, line 2"),
        ("a.csv", 'prompt,answer\na,"b\n', "a.csv: broken CSV after line 1"),
        ("a.txt", "a", "ends in '.txt'; expected .jsonl, .json, .csv, .parquet"),
        ("a.parquet", "a", "a.parquet cannot be read"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, name: str, content: str, message: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


def test_a_file_that_is_not_utf8_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ValueError, match=r"a.jsonl is not UTF-8"):
        read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing", "./user/name", "a/b/c"])
def test_a_file_that_is_not_there_is_explained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{name} does not exist. Give a file"):
        read_examples(name)


@pytest.mark.parametrize("data", [[], ()])
def test_no_rows_are_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="no rows"):
        read_examples(data)


@pytest.mark.parametrize("data", [5, ["a"], {"prompt": ["a"]}])
def test_other_data_is_refused(data: Any) -> None:
    with pytest.raises(TypeError, match="data: expected the path of a file"):
        read_examples(data)


def test_a_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": ""}]
    assert len(read_examples(lines(tmp_path / "a.jsonl", *rows), limit=2)) == 2
    with pytest.raises(ValueError, match="limit: expected at least one row, got 0"):
        read_examples(rows, limit=0)


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    for data in ([{"prompt": "a"}], lines(tmp_path / "a.jsonl", {"prompt": "a"})):
        with pytest.raises(ValueError, match=r"split: .* has no splits, got 'test'"):
            read_examples(data, split="test")


def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_text("a")
    with pytest.raises(ImportError, match=r"^datasets is not installed: pip install 'citer-hf\[train\]'$"):
        read_examples(tmp_path / "a.parquet")


class TestDatasets:
    """What goes through the library `datasets`."""

    rows = [{"prompt": "a", "answer": 4.0}, {"prompt": "b", "answer": None}]

    @pytest.fixture
    def datasets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        return datasets

    def check(self, examples: list[Example]) -> None:
        assert [(example.prompt, example.answer, example.row) for example in examples] == [
            ("a", "4", 1),
            ("b", None, 2),
        ]

    def test_a_dataset_is_read(self, datasets: Any) -> None:
        data = datasets.Dataset.from_list(self.rows)
        self.check(read_examples(data))
        self.check(read_examples(data.with_format("numpy")))
        with pytest.raises(ValueError, match="split: a Dataset has no splits"):
            read_examples(data, split="train")
        with pytest.raises(TypeError, match="IterableDataset: load it without streaming"):
            read_examples(data.to_iterable_dataset())

    def test_parquet_is_read(self, datasets: Any, tmp_path: Path) -> None:
        datasets.Dataset.from_list(self.rows).to_parquet(tmp_path / "a.parquet")
        self.check(read_examples(tmp_path / "a.parquet"))

    def test_messages_and_choices_of_parquet_are_read(self, datasets: Any, tmp_path: Path) -> None:
        row = {"messages": [{**USER, "name": "x"}, ASSISTANT], "choices": CHOICES, "answer": "B"}
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
        (example,) = read_examples(tmp_path / "a.parquet")
        assert example.messages == ({**USER, "name": "x"},)
        assert (example.response, example.choices) == ("Hello", (("A", "the sun"), ("B", "the moon")))

    def test_a_saved_directory_is_read(self, datasets: Any, tmp_path: Path) -> None:
        data = datasets.Dataset.from_list(self.rows)
        data.save_to_disk(tmp_path / "one")
        self.check(read_examples(tmp_path / "one"))
        datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(tmp_path / "two")
        self.check(read_examples(tmp_path / "two", split="test"))
        with pytest.raises(ValueError, match="two has the splits train, test; say which"):
            read_examples(tmp_path / "two")
        with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
            read_examples(tmp_path / "two", split="dev")

    def test_a_name_like_those_of_the_hub_is_loaded_by_name(
        self, datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repository = tmp_path / "user" / "name"
        repository.mkdir(parents=True)
        lines(repository / "train.jsonl", self.rows[0])
        lines(repository / "test.jsonl", *self.rows)
        monkeypatch.chdir(tmp_path)
        self.check(read_examples("user/name", split="test"))
        with pytest.raises(ValueError, match="user/name has the splits train, test; say which"):
            read_examples("user/name")
        with pytest.raises(OSError, match=r"user/name cannot be loaded.*Unknown split"):
            read_examples("user/name", split="dev")

    def test_a_hub_dataset_that_cannot_be_reached_is_explained(
        self, datasets: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(name: str, split: str | None) -> None:
            raise ConnectionError(f"no way to {name} {split}")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(
            OSError, match=r"user/absent cannot be loaded as a dataset: ConnectionError: no way .* test"
        ):
            read_examples("user/absent", split="test")
