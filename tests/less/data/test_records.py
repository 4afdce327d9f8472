"""Rows come out as they went in, in whatever form they are kept."""

import datetime
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.errors import DataError
from less.data import Record, open_source, write_selected
from less.data.records import write_lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(max_size=4) | st.sampled_from(["influence_score", 'a"}', "{"])
ROWS = st.dictionaries(NAMES, JSON, max_size=4)
SPACES = st.sampled_from(["", " ", "\t", "  "])


def lines_of(source):
    return [record.raw for record in source.iter_records()]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=6),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\n\n", "\n  \r\n"]), min_size=6, max_size=6),
    bom=st.booleans(),
    final=st.booleans(),
    escaped=st.booleans(),
)
def test_json_lines_keep_every_byte_of_a_row(rows, ends, bom, final, escaped, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "pool.jsonl"
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    text = "".join(line + end for line, end in zip(lines, ends, strict=False))
    content = (b"\xef\xbb\xbf" if bom else b"") + (text if final else text.rstrip()).encode()
    path.write_bytes(content)
    source = open_source(path)
    assert source.num_rows == len(rows)
    assert source.sha256 == hashlib.sha256(content).hexdigest()
    assert lines_of(source) == [line.encode() for line in lines]
    assert [record.columns for record in source.iter_records()] == rows
    records = list(source.iter_records())
    for record in records:
        line = int(record.where.removeprefix("pool.jsonl:"))
        assert content.split(b"\n")[line - 1].strip(b"\xef\xbb\xbf\r") == record.raw
    backwards = range(len(rows))[::-1]
    assert source.take(backwards) == records[::-1]
    assert list(source.iter_records(1, 3)) == records[1:3]


def test_a_bad_line_is_a_record_with_a_problem(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_bytes(
        b'{"id": 5}\n\n{"a": \n\xff\n[1]\n'
        + b'{"id": null, "x": NaN, "y": -Infinity, "z": 123456789012345678901234567890}\n'
        + b"[" * 100_000
        + b"\n"
    )
    records = list(open_source(path).iter_records())
    assert [record.problem and record.problem.reason for record in records] == [
        None,
        "not JSON",
        "not JSON",
        "not an object",
        None,
        "not JSON",
    ]
    assert [record.where for record in records] == [f"pool.jsonl:{line}" for line in (1, 3, 4, 5, 6, 7)]
    assert [record.id for record in records] == ["5", "pool:1", "pool:2", "pool:3", "pool:4", "pool:5"]
    assert records[4].columns is not None
    assert records[4].columns["z"] == 123456789012345678901234567890
    assert records[1].columns is None


def test_rows_past_the_end_are_no_rows(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    source = open_source(path)
    assert [record.number for record in source.iter_records(1, 99)] == [1]
    assert list(source.iter_records(2)) == []
    assert source.take([]) == []


@settings(max_examples=100, deadline=None)
@given(
    row=ROWS,
    new=st.dictionaries(NAMES, st.none() | st.floats(allow_nan=False) | st.text(max_size=4)),
    space=SPACES,
)
def test_new_columns_are_spliced_into_the_line(row, new, space, tmp_path_factory):
    members = f",{space}".join(f"{json.dumps(name)}{space}:{space}{json.dumps(value)}" for name, value in row.items())
    raw = f"{space}{{{space}{members}{space}}}{space}".encode()
    path = tmp_path_factory.mktemp("spliced") / "out.jsonl"
    write_selected(path, [Record(number=0, where="x", columns=row, raw=raw)], [new], "jsonl")
    written = path.read_bytes()
    assert written.endswith(b"\n")
    expected = {**row, **new}
    assert json.loads(written) == expected
    assert list(json.loads(written)) == list(expected)
    if not row.keys() & new.keys():
        body = raw.rstrip()[:-1].rstrip()
        assert written.startswith(body)
        if not new:
            assert written == raw + b"\n"


def test_a_splice_leaves_numbers_spaces_and_escapes_alone(tmp_path):
    raw = b'{"x": 1.50, "s": "\\u00e9\\ud83d", "influence_rank":7, "n": {"influence_rank": 1}, "x": 1e2}'
    record = Record(number=0, where="x", columns=json.loads(raw), raw=raw)
    extra = {"influence_rank": 1, "influence_score": 0.25, "influence_subtask": None}
    write_selected(tmp_path / "a/b/out.jsonl", [record], [extra], "jsonl")
    assert (tmp_path / "a/b/out.jsonl").read_bytes() == (
        b'{"x": 1.50, "s": "\\u00e9\\ud83d", "influence_rank":1, "n": {"influence_rank": 1}, "x": 1e2, '
        b'"influence_score": 0.25, "influence_subtask": null}\n'
    )


def arrow_table():
    return pa.table(
        {
            "id": pa.array([10, 11, 12], pa.int32()),
            "when": pa.array([datetime.datetime(2024, 1, 1)] * 3, pa.timestamp("ms")),
            "messages": [[{"role": "user", "content": "x"}]] * 3,
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        }
    )


def test_parquet_to_parquet_keeps_the_arrow_types(tmp_path):
    table = arrow_table()
    pq.write_table(table, tmp_path / "pool.parquet", row_group_size=2)
    source = open_source(tmp_path / "pool.parquet")
    assert (source.kind, source.name, source.stem, source.num_rows) == ("parquet", "pool.parquet", "pool", 3)
    assert source.sha256 == hashlib.sha256((tmp_path / "pool.parquet").read_bytes()).hexdigest()
    taken = source.take([2, 0])
    assert [record.id for record in taken] == ["12", "10"]
    assert [record.where for record in taken] == ["pool.parquet[2]", "pool.parquet[0]"]
    extra = [{"influence_score": 0.5, "id": 1}, {"influence_score": None, "id": 2}]
    write_selected(tmp_path / "out.parquet", taken, extra, source.kind)
    written = pq.read_table(tmp_path / "out.parquet")
    for name in ("when", "messages", "kind"):
        assert written.schema.field(name).type == table.schema.field(name).type
        assert written[name].to_pylist() == table.take([2, 0])[name].to_pylist()
    assert written["influence_score"].to_pylist() == [0.5, None]
    assert written["id"].to_pylist() == [1, 2]
    assert written.column_names == [*table.column_names, "influence_score"]


def test_rows_can_change_their_form(tmp_path):
    pq.write_table(arrow_table(), tmp_path / "pool.parquet")
    records = list(open_source(tmp_path / "pool.parquet").iter_records(1, 2))
    write_selected(tmp_path / "out.jsonl", records, [{"rank": 1}], "parquet")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["when"] == "2024-01-01T00:00:00"
    assert row["rank"] == 1
    (record,) = open_source([{"a": "日本", "b": [1, 2]}]).iter_records()
    write_selected(tmp_path / "made", [record], [{"rank": 1}], "parquet")
    assert pq.read_table(tmp_path / "made").to_pylist() == [{"a": "日本", "b": [1, 2], "rank": 1}]
    write_selected(tmp_path / "plain.jsonl", [record], [{"half": "\ud800"}])
    assert json.loads((tmp_path / "plain.jsonl").read_text(encoding="utf-8")) == record.columns | {"half": "\ud800"}
    mixed = list(open_source([{"a": 1}, {"a": "x"}]).iter_records())
    with pytest.raises(DataError, match=r"write a \.jsonl file instead"):
        write_selected(tmp_path / "mixed.parquet", mixed, [{}, {}], "memory")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def breaks_off():
        yield "one"
        raise RuntimeError("power cut")

    path = tmp_path / "out.jsonl"
    write_lines(path, ["old"])
    with pytest.raises(RuntimeError, match="power cut"):
        write_lines(path, breaks_off())
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_folder_of_parquet_files_is_one_source(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    pq.write_table(arrow_table(), folder / "b.parquet")
    pq.write_table(arrow_table().slice(0, 1), folder / "a.parquet")
    source = open_source(folder)
    assert (source.name, source.num_rows, source.location) == ("pool", 4, str(folder.resolve()))
    assert [record.id for record in source.iter_records()] == ["10", "10", "11", "12"]
    assert [record.id for record in source.iter_records(1, 3)] == ["10", "11"]
    assert [record.id for record in source.take([3, 0, 1])] == ["12", "10", "10"]
    pq.write_table(pa.table({"other": [1]}), folder / "c.parquet")
    with pytest.raises(DataError, match="different columns"):
        open_source(folder)


def test_a_data_set_gives_the_same_rows_from_memory_and_from_its_folder(tmp_path):
    rows = [{"id": str(number), "messages": [{"role": "user", "content": "x"}]} for number in range(3)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved")
    in_memory, on_disk = open_source(dataset), open_source(tmp_path / "saved")
    assert in_memory.kind == on_disk.kind == "dataset"
    assert (in_memory.location, on_disk.location) == (None, str((tmp_path / "saved").resolve()))
    assert in_memory.sha256 == on_disk.sha256 == open_source(rows).sha256
    for source in (in_memory, on_disk, open_source(rows)):
        assert [record.columns for record in source.iter_records()] == rows
        assert [record.columns for record in source.take([2, 0])] == [rows[2], rows[0]]
    assert open_source(in_memory) is in_memory
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits.*splits/train"):
        open_source(tmp_path / "splits")


def test_rows_in_memory_need_not_be_good():
    records = list(open_source([{"id": 1}, "x"]).iter_records())
    assert records[0].id == "1"
    assert records[1].problem is not None
    assert records[1].problem.reason == "not an object"
    assert records[1].where == "memory[1]"


def test_a_source_that_cannot_be_used_says_why(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    (tmp_path / "array.json").write_text('\n [{"a": 1}]')
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "rows.csv").write_text("x")
    (tmp_path / "folder").mkdir()
    for data, message in [
        (tmp_path / "absent.jsonl", "no file or folder"),
        ("absent/folder/rows", "no file or folder"),
        (tmp_path / "empty.jsonl", "holds no rows"),
        (tmp_path / "array.json", "one JSON array"),
        (tmp_path / "broken.parquet", "cannot read"),
        (tmp_path / "rows.csv", "cannot tell the format"),
        (tmp_path / "folder", "neither"),
        ([], "holds no rows"),
        (5, "cannot read rows from a int"),
        ({"train": [{}]}, "cannot read rows from a dict"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source(data)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: 1 / 0)
    with pytest.raises(DataError, match="someone/something is no file or folder"):
        open_source("someone/something")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([{"a": 1}]))
    assert open_source("someone/something").location == "someone/something"


def test_exports_are_sorted_and_there():
    import less.data

    assert (
        sorted(less.data.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)) == less.data.__all__
    )
    assert all(hasattr(less.data, name) for name in less.data.__all__)


def test_a_package_import_loads_no_data_set_library():
    code = "import sys, less.data; sys.exit('datasets' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
