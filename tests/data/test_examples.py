"""Reading the examples of a task."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from citer_hf.data.examples import DataOptions, Example, read_examples

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
    prompt = "What shines?\nA. the sun\nB. the moon\nAnswer:"
    assert example == Example("q7", 1, prompt, answer="A", choices=(("A", "the sun"), ("B", "the moon")))
    # Where a reference is needed, it is the label.
    assert only({"question": "Q", "choices": ["x", "y"], "answer": 1}, needs=["response"]).response == " B"


def test_a_chain_of_thought_follows_its_prompt_with_one_space() -> None:
    for prompt, cot, response in (("Why?", "So", " So"), ("a\n", "b", "b"), ("a", "\nb", "\nb")):
        example = only({"prompt": prompt, "cot": cot, "answerKey": "A", "choices": CHOICES})
        assert (example.response, example.answer, len(example.choices or ())) == (response, "A", 2)
    for column in ("response", "completion"):
        example = only({"prompt": " a\n", column: "b ", "answer": "c"})
        assert (example.prompt, example.response, example.answer) == (" a\n", "b ", "c")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**USER, "tool_calls": None}, ASSISTANT]},
        {"messages": [USER], "response": "Hello"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER, ASSISTANT]},
    ],
)
def test_the_reference_of_a_chat_is_its_last_turn_or_a_column(row: dict[str, Any]) -> None:
    assert only(row, needs=["response"]) == Example("1", 1, messages=(USER,), response="Hello")


AB, ABC = (("A", "x"), ("B", "y")), (("A", "x"), ("B", "y"), ("C", "z"))
LISTED = "Q\nA. x\nB. y\nAnswer:"
TURNS = [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SYSTEM = {"role": "system", "content": "S"}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
SENT = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
AGENT = [
    {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
    {"role": "assistant", "content": None, "tool_calls": [SENT]},
    {"role": "tool", "content": "3"},
    {**ASSISTANT, "reasoning": "hm"},
]
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THINKING = {**ASSISTANT, "reasoning": "hm", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"question": "Q", "answer": "6*3\n#### 18"}, {"prompt": "Q", "response": " 6*3\n#### 18", "answer": "18"}),
        ({"question": "Q", "answer": "#### 18"}, {"prompt": "Q", "answer": "18"}),
        (
            {"problem": "Q", "solution": "So\n#### 2\nEnd"},
            {"prompt": "Q", "response": " So\n#### 2\nEnd", "answer": "2"},
        ),
        ({"question": "Q", "choices": ["x", "y"], "answer": 1}, {"prompt": LISTED, "answer": "B", "choices": AB}),
        ({"question": "Q", "choices": "['x', 'y']", "answer": "b)"}, {"prompt": LISTED, "answer": "B", "choices": AB}),
        (
            {"question": "Q", "options": ["x", "y", "z"], "answer": "C", "answer_index": 2},
            {"prompt": "Q\nA. x\nB. y\nC. z\nAnswer:", "answer": "C", "choices": ABC},
        ),
        (
            {
                "question": {"stem": "Q", "choices": [{"text": text, "label": label} for label, text in AB]},
                "answerKey": "B",
            },
            {"prompt": LISTED, "answer": "B", "choices": AB},
        ),
        ({"question": "Q", "options": dict(AB), "answer": "y"}, {"prompt": LISTED, "answer": "B", "choices": AB}),
        ({"conversations": TURNS}, {"messages": (SYSTEM, USER), "response": "Hello"}),
        ({"query": "Q", "response": "R"}, {"prompt": "Q", "response": " R"}),
        ({"input": "Q", "output": "R"}, {"prompt": "Q", "response": " R"}),
        ({"instruction": "Q", "input": "X", "output": "R"}, {"prompt": "Q\n\nX", "response": " R"}),
        ({"instruction": "Q", "input": "", "output": "R"}, {"prompt": "Q", "response": " R"}),
        (
            {"messages": AGENT, "tools": json.dumps([{"name": "f"}])},
            {"messages": (USER, CALLING, AGENT[2]), "response": "Hello", "turn": THINKING, "tools": ({"name": "f"},)},
        ),
        ({"messages": [USER, AGENT[1]]}, {"messages": (USER,), "response": "", "turn": CALLING}),
        ({"": 0, "prompt": "Q"}, {"prompt": "Q"}),
    ],
)
def test_published_rows_are_read(row: dict[str, Any], fields: dict[str, Any]) -> None:
    assert only(row) == Example("1", 1, **fields)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"chat": True}, {"messages": ({**USER, "content": LISTED},)}),
        ({"system_prompt": "S"}, {"messages": (SYSTEM, {**USER, "content": LISTED})}),
        (
            {"prompt_template": r"In \boxed{}: {question}!"},
            {"prompt": "In \\boxed{}: Q\nA. x\nB. y!", "is_text": True},
        ),
        (
            {"prompt_template": "{choices}? {question}", "chat": True},
            {"messages": ({**USER, "content": "A. x\nB. y? Q"},)},
        ),
        ({"prompt_template": "form.txt"}, {"prompt": "Q\nA. x\nB. y\n>", "is_text": True}),
    ],
)
def test_options_say_how_a_question_becomes_a_prompt(
    options: Any, fields: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("form.txt").write_text("{question}\n>\n")
    row = {"question": "Q", "choices": ["x", "y"], "answer": 1}
    assert only(row, **options) == Example("1", 1, answer="B", choices=AB, **fields)
    with pytest.raises(ValueError, match=r"prompt_template: expected a text with {question}, .* got 'form'"):
        only(row, prompt_template="form")


def test_the_reader_tells_in_a_line_what_it_took_each_column_for(capsys: pytest.CaptureFixture[str]) -> None:
    only({"": 1, "question": "Q", "answer": "R #### 2", "l": 3})
    only({"talk": TURNS}, columns={"messages": "talk"})
    assert capsys.readouterr().err.splitlines() == [
        "data: 1 examples; prompt from 'question', response from 'answer', answer from 'answer' after ####; "
        "not used: l.",
        "data: 1 examples; messages from 'talk', response from the last turn.",
    ]


def test_columns_are_mapped_and_answers_become_text() -> None:
    row = {"q": "a", "r": "b", "final": 4, "key": 9, "cot": "unused"}
    example = only(row, columns={"prompt": "q", "response": "r", "answer": "final", "id": "key"})
    assert example == Example(id="9", row=1, prompt="a", response=" b", answer="4")
    assert only({"prompt": "a", "cot": "b", "response": "c"}, columns={"response": "response"}).response == "c"
    assert only({"talk": [USER, ASSISTANT]}, columns={"messages": "talk"}).messages == (USER,)
    for answer, text in ((4.0, "4"), (4.5, "4.5"), (7, "7"), (" 4.0 ", "4.0")):
        assert only({"prompt": "a", "answer": answer}).answer == text


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"q": "a", "r": "b"}, {"prompt": "z"}, r"{'prompt': \['z'\]} of q, r"),
        ({"q": "a", "r": "b"}, {"promt": "q"}, r"{'promt': \['q'\]} of q, r"),
        ({"q": "a", "r": "b"}, {}, "{} of q, r"),
        ({"prompt": "a", "cot": "b", "response": "c"}, {}, r"{.*'response': \['response', 'cot'\]} of .*"),
        ({"prompt": "a", "messages": "b"}, {}, r"{.*'messages': \['messages'\]} of .*"),
        ({"a": "a", "b": "b"}, {"prompt": "a", "messages": "b"}, r"{'prompt': \['a'\], 'messages': \['b'\]} of a, b"),
    ],
)
def test_an_unknown_table_is_told_how_to_be_mapped(row: Any, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^columns: expected one column of data for each .* got {message}. Name"):
        read_examples([row], columns)


CHOICE = {"question": "q", "choices": CHOICES, "answerKey": "A"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ASSISTANT], "response": "Hello"}, "messages .* ends with a reference, .*'response'"),
        ({"messages": [{"role": "user"}]}, "messages .*list of messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages .*list of messages.*parts of text",
        ),
        ({"messages": [USER], "tools": "f"}, "tools .* must be a list of tools"),
        ({"messages": []}, r"messages \(column 'messages'\) is missing or empty"),
        ({"prompt": [USER], "completion": [{"role": "user"}]}, "response .*'completion'.* list of messages"),
        ({"prompt": "a", "answer": ["4"]}, r"answer \(column 'answer'\) must be text, got list"),
        ({**CHOICE, "choices": 5}, "choices .* as many different labels as texts"),
        ({**CHOICE, "choices": {"text": ["a"], "label": ["A", "B"]}}, "choices .* as many different labels as texts"),
        ({**CHOICE, "choices": {"text": ["a", "b"], "label": "AA"}}, "choices .* as many different labels as texts"),
        ({**CHOICE, "answerKey": "E"}, "answer .* must be one of the labels A, B, got 'E'"),
    ],
)
def test_a_malformed_field_is_named_with_its_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^data, row 1: {message}"):
        read_examples([row])


@pytest.mark.parametrize("gap", [None, "", "  ", float("nan")])
def test_gaps_are_named(gap: Any) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": gap}, {"prompt": "c"}]
    assert [example.answer for example in read_examples(rows)] == ["1", None, None]
    with pytest.raises(ValueError, match=r"data, row 2: answer \(column 'answer'\) is missing or empty"):
        read_examples(rows, needs=["answer"])
    with pytest.raises(ValueError, match=r"data, row 2: prompt \(column 'prompt'\) is missing or empty"):
        read_examples([{"prompt": "a"}, {"prompt": gap}])


def test_a_needed_field_without_a_column_and_an_id_that_comes_twice_are_explained() -> None:
    for row, field, message in (
        ({"problem": "P", "solution": "none"}, "answer", r"answer .*--map answer=COLUMN\) is missing or empty"),
        ({"messages": [USER]}, "response", r"response .*--map response=COLUMN\) is missing or empty"),
    ):
        with pytest.raises(ValueError, match=f"data, row 1: {message}"):
            read_examples([row], needs=[field])
    with pytest.raises(ValueError, match=r"row 3: id .* is '5' as in row 1"):
        read_examples([{"prompt": "a", "id": 5}, {"prompt": "b", "id": 6}, {"prompt": "c", "id": "5"}])


def test_json_keeps_texts(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    rows = '{"prompt": "a\u2028b", "answer": "2020-01-02"}\n\n{"prompt": "c", "answer": 123456789012345678901}\n'
    path.write_text("\ufeff" + rows)
    first, second = read_examples(path)
    assert (first.prompt, first.answer, first.row) == ("a\u2028b", "2020-01-02", 1)
    assert (second.answer, second.row, second.id) == ("123456789012345678901", 2, "2")
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1))
    assert [example.prompt for example in read_examples(str(path))] == ["a", "b"]


def test_compressed_files_with_a_bom_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    for name, content in (
        ("task.csv", b',prompt,answer\r\n0,"a\r\nb",4\r\n'),
        ("task.jsonl", b'{"prompt": "a\\nb", "answer": 4}\r\n\r\n'),
        ("task.json", b'[{"prompt": "a\\nb",\r\n"answer": 4}]'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content, mtime=0))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert read_examples(path) == [Example("1", 1, "a\nb", answer="4")]


def test_csv_keeps_texts_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "task.csv"
    long = "x" * 200_000
    path.write_text(f'prompt,answer\na,007\n"b\nc, d",NA\ne,4.0\n{long},\n')
    examples = read_examples(path)
    assert [example.prompt for example in examples] == ["a", "b\nc, d", "e", long]
    assert [example.answer for example in examples] == ["007", "NA", "4.0", None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n", "a.jsonl: there are no rows"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "a.jsonl, row 2: .* Expected UTF-8: CSV, a JSON object a line"),
        ("a.jsonl", b"3\n", "row 1: expected an object with named fields, got int"),
        ("a.jsonl", b'{"prompt": "\xe9"}', "a.jsonl, row 1: .*codec.* Expected UTF-8"),
        ("a.json", b'[{"prompt": "a"},\n]', "a.json, row 1: .*line [12]"),
        ("a.csv", b"prompt,answer\na,b\nc\n", "a.csv, row 2: a row without one value for each column"),
        ("a.csv", b'prompt,answer\na,"b\n', "a.csv, row 1: unexpected end of data"),
        ("a.csv", b"prompt\na\n\xe9\n", "a.csv, row 2: .*codec"),
        ("a.csv.gz", b"prompt", "a.csv.gz, row 1: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9], "a.jsonl.gz, row 1: Compressed file ended"),
        ("a.txt", b"a", r"a.txt cannot be loaded: .* Expected a file \(.jsonl, .json, .csv, .parquet\), a directory"),
        ("a.parquet", b"a", "a.parquet cannot be loaded"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


def test_other_data_and_a_file_that_is_not_there_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_examples(tmp_path / "missing.jsonl")
    for data in (5, {"prompt": ["a"]}):
        with pytest.raises(TypeError, match=r"^data: expected a path, .* got (int|dict)\.$"):
            read_examples(data)
    with pytest.raises(ValueError, match="no rows"):
        read_examples([])


def test_a_limit_leaves_the_rest_unread_and_a_split_needs_splits(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": ""}]
    assert len(read_examples(lines(tmp_path / "a.jsonl", *rows), limit=2)) == 2
    for read in (lambda: read_examples(rows, limit=0), lambda: DataOptions(limit=0)):
        with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
            read()
    for data in (rows, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match=r"split: .* has no splits, got 'test'"):
            read_examples(data, split="test")


ROWS = [{"prompt": "a", "answer": 4.0}, {"prompt": "b", "answer": None}]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def check(examples: list[Example]) -> None:
    found = [(example.prompt, example.answer, example.row) for example in examples]
    assert found == [("a", "4", 1), ("b", None, 2)]


def test_datasets_are_read_from_memory_from_parquet_and_from_a_directory(datasets: Any, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    two = datasets.DatasetDict({"train": data.select([0]), "test": data})
    two.save_to_disk(tmp_path / "two")
    data.to_parquet(tmp_path / "a.parquet")
    for one in (data, data.with_format("numpy"), tmp_path / "a.parquet"):
        check(read_examples(one))
    check(read_examples(tmp_path / "two", split="test"))
    with pytest.raises(ValueError, match=r"two has the splits train, test; .* got None"):
        read_examples(tmp_path / "two")
    with pytest.raises(ValueError, match="split: data has no splits"):
        read_examples(data, split="train")
    with pytest.raises(TypeError, match=r"got IterableDataset"):
        read_examples(data.to_iterable_dataset())
    row = {"messages": [{**USER, "name": "x"}, ASSISTANT], "choices": CHOICES, "answer": "B"}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "b.parquet")
    (example,) = read_examples(tmp_path / "b.parquet")
    assert (example.messages, example.response) == (({**USER, "name": "x"},), "Hello")


def test_a_name_like_those_of_the_hub_is_loaded_by_name(datasets: Any, tmp_path: Path, monkeypatch: Any):
    repository = tmp_path / "user" / "name"
    repository.mkdir(parents=True)
    lines(repository / "train.jsonl", ROWS[0])
    lines(repository / "test.jsonl", *ROWS)
    monkeypatch.chdir(tmp_path)
    check(read_examples("user/name", split="test"))
    assert len(read_examples("user/name", split="test[:1]")) == 1
    with pytest.raises(ValueError, match=r"user/name cannot be loaded.*Unknown split"):
        read_examples("user/name", split="dev")
    for name in ("user/absent", "missing.parquet", "a/b/c"):
        with pytest.raises((ValueError, OSError), match=name):
            read_examples(name, split="test")
