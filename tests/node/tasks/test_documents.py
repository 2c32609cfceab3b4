"""Documents of files, folders and sets: what is read, what stays as it is, and what a user is told."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.node import config
from thinwire.node.tasks.corpora import read_text

pytest.importorskip("datasets", reason="the hf task is an extra")

from thinwire.node.tasks import documents
from thinwire.node.tasks.documents import Document, documents_of
from thinwire.node.tasks.prompt import PromptTemplate

ROWS: list[dict[str, Any]] = [
    {"text": "a fine film", "label": 1, "day": "2024-05-01"},
    {"text": "007", "label": 0, "day": "n/a"},
    {"text": "naïve déjà vu", "label": 1, "day": "NA"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
PACKED = gzip.compress(LINES.encode(), mtime=0)


def read(corpus: Path, split: str = "train", **options: Any) -> list[Document]:
    return list(documents_of(config.Task(name="hf", **options), str(corpus), split))


def fields(corpus: Path, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    return [dict(d.fields) for d in read(corpus, split, **options)]


def parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


# ----------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.JSONL", LINES.encode()),
        ("a.ndjson", LINES.encode()),
        ("a.json", LINES.encode()),
        ("list.json", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl.gz", PACKED),
        ("a.JSONL.GZ", PACKED),
        ("a.json.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("utf16.jsonl", LINES.encode("utf-16")),
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("blank.jsonl", ("\n" + LINES.replace("\n", "\n \n")).encode()),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_json_is_the_same_by_whatever_name_and_packing(
    tmp_path: Path, name: str, data: bytes, in_folder: bool
) -> None:
    """Strings stay strings, in one file and in a folder alike."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(data)
    assert fields(tmp_path / "set" if in_folder else tmp_path / "set" / name) == ROWS


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "comma"), [("a.csv", ","), ("a.TSV", "\t")])
def test_a_table_keeps_its_text(tmp_path: Path, name: str, comma: str, ending: str) -> None:
    lines = [f"text{comma}label", f'"two{ending}lines{comma} 007"{comma}007', "", f"NA{comma}"]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + ending.join(lines).encode())
    rows = read(tmp_path / name)
    assert [dict(d.fields) for d in rows] == [
        {"text": f"two{ending}lines{comma} 007", "label": "007"},
        {"text": "NA", "label": ""},
    ]
    assert rows[1].at == "line 5"


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET"])
def test_parquet_is_read_by_datasets(tmp_path: Path, name: str) -> None:
    parquet(tmp_path / name)
    rows = read(tmp_path / name)
    assert [dict(d.fields) for d in rows] == ROWS
    assert rows[2].where.endswith(f"{name}, row 3")


def test_text_has_no_byte_order_mark_and_one_kind_of_line_end(tmp_path: Path) -> None:
    for name, data in {
        "a.txt": b"\xef\xbb\xbfone\r\ntwo\r\n",
        "b.TXT": "one\ntwo\n".encode("utf-16"),
        "c.txt.gz": gzip.compress(b"one\ntwo\n"),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert fields(tmp_path / name) == [{"text": "one\ntwo\n"}]
    assert [f["text"] for f in fields(tmp_path)] == ["one\ntwo\n"] * 3


def test_bytes_are_unpacked_and_what_is_in_columns_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\ntwo"))
    assert read_text(str(tmp_path / "a.txt.gz")) == b"one\r\ntwo"
    parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet: this is parquet, no text.*task 'hf'"):
        read_text(str(tmp_path / "a.parquet"))
    (tmp_path / "packed.txt").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ConfigError, match=r"packed\.txt: this is gzip"):
        read_text(str(tmp_path / "packed.txt"))
    assert read_text(str(tmp_path)) == b"one\r\ntwo", "of a folder, the text"


def test_splits_and_slices_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(LINES)
    assert fields(tmp_path / "one.jsonl", "train[:2]") == ROWS[:2]
    assert fields(tmp_path / "one.jsonl", "train[-1:]+train[:1]") == [ROWS[2], ROWS[0]]
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# A set\n")
    (folder / "data" / "train-0.JSONL").write_text(LINES)
    (folder / "data" / "train-1.csv").write_text("text,label\nmore,0\n")
    (folder / "data" / "test.jsonl").write_text('{"text": "held", "label": 1}\n')
    assert [f["text"] for f in fields(folder)] == ["a fine film", "007", "naïve déjà vu", "more"]
    assert fields(folder, "test") == [{"text": "held", "label": 1}]
    assert fields(folder, "train[75%:]+test") == [
        {"text": "more", "label": "0"},
        {"text": "held", "label": 1},
    ]
    for split, told in {
        "dev": "no split 'dev' in it, but train, test",
        "train[": r"task\.split 'train\[",
    }.items():
        with pytest.raises(ConfigError, match=told):
            fields(folder, split)


def test_a_folder_s_card_says_what_belongs_to_a_configuration(tmp_path: Path) -> None:
    card = "configs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl"
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n# A set\n")
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert fields(tmp_path, subset="b") == [{"text": "b"}]


def test_what_a_folder_has_besides_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with caplog.at_level(logging.INFO, logger="thinwire.node"), pytest.raises(ConfigError, match="zstd, no"):
        fields(tmp_path)
    assert "left out as no data, or of no split: notes.txt" in caplog.text


def test_slices_that_overlap_are_seen() -> None:
    assert documents.overlap("train", "train")
    assert documents.overlap("train+extra", "train[:10]")
    assert documents.overlap("train[:10%]", "test + train[:10%]")
    assert not documents.overlap("train[:90%]", "train[90%:]")
    assert not documents.overlap("train", "test")


# ------------------------------------------------------------------------------------- what a user is told


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"'text' of .*a\.jsonl, line 2 is null"),
        ("a.jsonl", b'{"text": NaN}\n', r"'text' of .*a\.jsonl, line 1 is null"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            r"a\.jsonl, line 2 has no 'text'; its fields are body",
        ),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"'text' of .*a\.jsonl, line 1 is no text: .*surrogates"),
        ("a.jsonl", b'{"text": ' + b"[" * 10**5, r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: not UTF-8"),
        (
            "a.jsonl.gz",
            PACKED[:-20],
            r"a\.jsonl\.gz: cannot be unpacked, is it whole",
        ),
        ("a.jsonl.gz", LINES.encode(), r"a\.jsonl\.gz: Not a gzipped file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", r"a\.jsonl\.zst: this is zstd.*\.gz, \.bz2, \.xz"),
        ("a.json", b'[{"text": "a"}, 3]', r"a\.json, item 2: not a JSON object: 3"),
        ("a.json", b'[{"text": "a"}, {}]', r"a\.json, item 2 has no 'text'; its fields are none"),
        ("a.csv", b"text,label\na,1\nb\n", r"a\.csv, line 3: 1 values, but the header has 2 columns"),
        ("a.csv", b"text,text\na,1\n", r"a\.csv: two columns have the same name"),
        ("a.csv", b'text,label\n"a,1\n', r"a\.csv, line 2: no CSV"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: cannot be read as parquet"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    for corpus in (tmp_path / name, tmp_path):  # alone, and in a folder
        with pytest.raises(ConfigError, match=message):
            [d.text("text", "field") for d in read(corpus)]


def test_a_null_in_parquet_names_its_row(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(ConfigError, match=r"'text' of .*a\.parquet, row 2 is null"):
        [d.text("text", "field") for d in read(tmp_path / "a.parquet")]


def test_a_line_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents.files, "MAX_LINE_CHARS", 30)
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(ConfigError, match="a line of more than 30 characters"):
        fields(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("text,label\n" + "a," * 20)
    with pytest.raises(ConfigError, match="a line of more than 30 characters"):
        fields(tmp_path / "a.csv")


@pytest.mark.parametrize("read_all", [documents.files.read_bytes, documents.files.read_text])
def test_what_a_packed_file_unpacks_to_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_all: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(documents.files, "MAX_UNPACKED", 1000)
    for n, is_fine in ((1000, True), (1001, False)):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * n))
        if is_fine:
            assert len(read_all(tmp_path / "a.txt.gz")) == n  # type: ignore[arg-type]
        else:
            with pytest.raises(ConfigError, match="unpack it, if it is meant so"):
                read_all(tmp_path / "a.txt.gz")
    (tmp_path / "a.txt").write_bytes(b"a" * 1001)
    assert len(read_all(tmp_path / "a.txt")) == 1001  # type: ignore[arg-type]


def test_fields_are_listed_shortly() -> None:
    many = Document({f"field-{n}": n for n in range(10**4)}, "r.jsonl")
    with pytest.raises(ConfigError) as refused:
        many.text("none", "field")
    assert len(str(refused.value)) < 1000


def test_names_with_points_are_found_wherever_they_are() -> None:
    document = Document({"a": [{"d.e": "list", "x": {"f": "g"}}], "a.0": {"y": "other"}}, "r.jsonl")
    assert PromptTemplate.of("{a.0.d.e} {a.0.x.f} {a.0.y}").filled(document) == "list g other"


def test_a_long_path_to_nowhere_takes_no_time() -> None:
    """Every way to split it at its points was tried."""
    with pytest.raises(ConfigError, match="has no"):
        REVIEW.text("review.text" + ".x" * 500, "field")


# ------------------------------------------------------------------------------------------------- prompts

REVIEW = Document(
    {
        "text": "fine",
        "review-text": "odd",
        "review": {"text": "nested", "stars": 4},
        "answers": {"text": ["first", "second"]},
        "a.b": "pointed",
        " padded ": "spaces",
        "none": None,
    },
    "r.jsonl",
    "line 7",
)


@pytest.mark.parametrize(
    ("prompt", "filled"),
    [
        ("{text} It was", "fine It was"),
        ("{review-text}!", "odd!"),
        ("{review.text} {review.stars}", "nested 4"),
        ("{answers.text.1}", "second"),
        ("{a.b}", "pointed"),
        ("{ text }", "fine"),
        ("{ padded }", "spaces"),
        ('{{"t": "{text}"}} {{text}}', '{"t": "fine"} {text}'),
        ("{{{text}}}", "{fine}"),
    ],
)
def test_prompts_are_filled(prompt: str, filled: str) -> None:
    assert PromptTemplate.of(prompt).filled(REVIEW) == filled


LISTED = r"its fields are  padded , a\.b, answers\.text, none, review-text, review\.stars, review\.text, text"


def _fill(prompt: str) -> Callable[[], str]:
    return lambda: PromptTemplate.of(prompt).filled(REVIEW)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{body}", rf"task\.prompt: r\.jsonl, line 7 has no 'body'; {LISTED}"),
        ("{review.body}", rf"has no 'review\.body'; {LISTED}"),
        ("{review-texts}", "has no 'review-texts'"),
        ("{answers.text.2}", r"has no 'answers\.text\.2'"),
        ("{text!r}", "has no 'text!r'"),
        ("{review}", "'review' of r.jsonl, line 7 is dict, no text"),
        ("{none}", "'none' of r.jsonl, line 7 is null"),
        ("{text", "the '{' at character 1 of '{text' has no other half; write '{{'"),
        ("{text} }", "the '}' at character 8 "),
        ("{} {text}", "'{}' names no field"),
        ("{{text}}", "no field in it"),
        ("It was", "no field in it"),
    ],
)
def test_what_names_no_field_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _fill(prompt)()
