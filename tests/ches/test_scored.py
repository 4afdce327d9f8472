"""The scored file's columns, its extreme pairs, its parts and its manifest."""

import json
import os
from dataclasses import asdict

import pytest

from ches.scored import (
    MEASURES,
    Example,
    Manifest,
    Parts,
    ScoredRange,
    columns_of,
    extremes,
    finished,
    manifest_path,
    pair_columns,
)
from datastore.errors import DamagedStoreError, FormatVersionError, ProvenanceError, StoreError, StoreLockedError
from datastore.files import hash_file
from less.data import open_source


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- columns ---


def test_columns_stand_in_one_order_whatever_the_order_asked_for():
    everything = [
        "ches", "ln_ches", "alpha_ches", "last_hidden", "edit_distance", "length_difference", "length_chosen",
        "length_rejected", "logp_chosen", "logp_rejected",
    ]  # fmt: skip
    assert columns_of(tuple(MEASURES)) == everything
    assert columns_of(tuple(MEASURES)[::-1]) == everything


@pytest.mark.parametrize(
    ("measures", "before", "after"),
    [
        (["ln_ches"], ["ln_ches"], []),
        (["logp", "ches"], ["ches"], ["logp_chosen", "logp_rejected"]),
        (["length_difference"], [], []),
        (["edit_distance", "last_hidden"], ["last_hidden", "edit_distance"], []),
    ],
)
def test_lengths_are_always_columns_and_measures_not_asked_for_never(measures, before, after):
    lengths = ["length_difference", "length_chosen", "length_rejected"]
    assert columns_of(measures) == [*before, *lengths, *after]


# --- extremes ---


def example(row, **values):
    return Example(row=row, values=values, chosen={}, rejected={})


def test_the_riskiest_and_the_safest_of_each_measure_are_kept_once_in_row_order():
    examples = [
        example(n, ches=float(37 * n % 100), ln_ches=float(n), last_hidden=float(-53 * n % 100)) for n in range(100)
    ]
    kept = [e.row for e in extremes(examples[::-1], count=3)]
    by_ches = sorted(range(100), key=lambda n: 37 * n % 100)
    assert kept == sorted({*by_ches[:3], *by_ches[-3:], 0, 1, 2, 97, 98, 99})
    assert len(extremes(examples)) <= 2 * 20
    assert extremes(examples[:5]) == examples[:5]
    assert extremes([]) == []


def test_extremes_of_parts_are_those_of_the_whole():
    examples = [example(n, ches=float(n * n % 31), alpha_ches=float(n * 7 % 13)) for n in range(90)]  # with ties
    parts = [extremes(examples[at : at + 25], count=4) for at in range(0, 90, 25)]
    assert extremes((e for part in parts for e in part), count=4) == extremes(examples, count=4)
    assert extremes(examples[::-1], count=4) == extremes(examples, count=4)


# --- parts ---

SETTINGS = {"model": {"fingerprint": "a"}, "measures": ["ches"], "shard_rows": 3}


def scored_range(first):
    return ScoredRange(
        columns=[{"ches": 0.1 * first, "ches_problem": None}, None],
        problems=[{"row": first + 1, "where": "x:2", "id": "x:1", "reason": "not JSON", "detail": "é"}],
        examples=[Example(row=first, values={"ches": 0.1}, chosen={"tokens": ["日"], "ches": [0.1]}, rejected={})],
        num_retries=0,
        rewritten=False,
    )


def test_a_part_comes_back_as_it_was_saved(tmp_path):
    output = tmp_path / "new" / "scored.jsonl"
    with Parts.open(output, SETTINGS) as parts:
        assert parts.load(range(3)) is None
        parts.save(range(3), scored_range(0))
        parts.save(range(3, 6), scored_range(3))
    with Parts.open(output, SETTINGS) as parts:
        assert parts.load(range(3)) == scored_range(0)
        assert parts.load(range(3, 6)) == scored_range(3)
        assert parts.load(range(6)) is None
        parts.remove()
    assert list(output.parent.iterdir()) == []


def test_parts_of_other_settings_are_refused_by_name_with_a_way_out(tmp_path):
    output = tmp_path / "scored.jsonl"
    with Parts.open(output, SETTINGS) as parts:
        parts.save(range(3), scored_range(0))
    changed = {**SETTINGS, "model": {"fingerprint": "b"}, "shard_rows": 4}
    with pytest.raises(ProvenanceError) as error, Parts.open(output, changed):
        pass
    message = str(error.value)
    assert "\n" not in message
    for word in ("model.fingerprint", "'a'", "'b'", "shard_rows is 3", "4", "--output", f"delete {output}.parts"):
        assert word.replace("'", "") in message.replace("'", "").replace('"', "")
    with Parts.open(output, SETTINGS) as parts:  # a refusal changes nothing, and holds no lock
        assert parts.load(range(3)) == scored_range(0)


def test_parts_without_a_finished_range_bind_nobody(tmp_path):
    output = tmp_path / "scored.jsonl"
    with pytest.raises(KeyboardInterrupt), Parts.open(output, SETTINGS):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with Parts.open(output, {**SETTINGS, "shard_rows": 4}):
        pass


def test_a_second_writer_is_refused_while_the_first_is_at_work(tmp_path):
    output = tmp_path / "scored.jsonl"
    with Parts.open(output, SETTINGS):
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()}"), Parts.open(output, SETTINGS):
            pass
        with Parts.open(tmp_path / "other.jsonl", SETTINGS):
            pass
    with Parts.open(output, SETTINGS):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_damaged_part_is_named(tmp_path, text):
    with Parts.open(tmp_path / "scored.jsonl", SETTINGS) as parts:
        parts.save(range(3), scored_range(0))
        (file,) = parts.folder.glob("0*.json")
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(DamagedStoreError, match=file.name):
            parts.load(range(3))


# --- manifest ---


def manifest_of(output):
    return Manifest(
        settings=SETTINGS,
        environment={"device": "cpu"},
        source={"name": "pairs.jsonl", "num_rows": 2},
        output=asdict(hash_file(output)),
        num_scored=1,
        num_retries=0,
        rewritten=False,
        problems=scored_range(0).problems,
        examples=[asdict(e) for e in scored_range(0).examples],
    )


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_text('{"ches": 1.0}\n')
    manifest_of(path).write(path)
    return path


def test_a_manifest_is_read_as_it_was_written(output, tmp_path):
    assert manifest_path(output) == tmp_path / "scored.jsonl.manifest.json"
    assert Manifest.load(output) == Manifest.load(str(output)) == manifest_of(output)
    doc = json.loads(manifest_path(output).read_text())
    assert list(doc)[:2] == ["format", "version"]
    assert (doc["format"], doc["version"]) == ("gradsift-ches-scores", 1)
    assert Manifest.load(tmp_path / "none.jsonl") is None


def test_a_newer_manifest_asks_for_an_upgrade(output):
    path = manifest_path(output)
    path.write_text(json.dumps({"format": "gradsift-ches-scores", "version": 2, "unheard": "of"}))
    with pytest.raises(FormatVersionError, match=r"version 2.*pip install"):
        Manifest.load(output)


def test_a_manifest_that_is_none_is_called_damaged(output):
    path = manifest_path(output)
    doc = json.loads(path.read_text())
    hostile = [
        "", "{", "[]", "null", "[" * 100_000, "{}",
        json.dumps({**doc, "format": "gradsift-datastore"}),
        json.dumps({**doc, "more": 1}),
        json.dumps({name: value for name, value in doc.items() if name != "examples"}),
    ]  # fmt: skip
    for text in hostile:
        path.write_text(text)
        with pytest.raises(DamagedStoreError, match=r"manifest.json is damaged"):
            Manifest.load(output)


def test_a_finished_output_is_held_to_its_settings_and_its_bytes(output, tmp_path):
    assert finished(tmp_path / "none.jsonl", SETTINGS) is None
    assert finished(output, SETTINGS) == manifest_of(output)
    with pytest.raises(ProvenanceError, match=r"measures.*ches.*in this command.*--output"):
        finished(output, {**SETTINGS, "measures": ["ln_ches"]})
    output.write_text('{"ches": 2.0}\n')
    with pytest.raises(ProvenanceError, match=r"changed since it was scored.*--output"):
        finished(output, SETTINGS)


def test_a_file_that_is_no_scored_file_is_not_overwritten(output):
    manifest_path(output).unlink()
    with pytest.raises(ProvenanceError, match=r"no scored file.*--output"):
        finished(output, SETTINGS)


def test_an_output_whose_manifest_is_still_to_come_is_unfinished(output):
    manifest_path(output).unlink()
    with Parts.open(output, SETTINGS) as parts:
        parts.save(range(3), scored_range(0))
    assert finished(output, SETTINGS) is None


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    from ches.scored import write_scored

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ches.scored.write_selected", fail)
    with pytest.raises(StoreError, match=r"cannot write .*: No space left on device"):
        write_scored(tmp_path / "scored.jsonl", [], [])


# --- rewritten layouts ---


def test_columns_of_a_rewritten_pair_are_messages_and_of_no_pair_null():
    good = {"chosen": "\n\nHuman: Which?\n\nAssistant: Red.", "rejected": "\n\nHuman: Which?\n\nAssistant: Blue."}
    same = {"prompt": "x", "chosen": good["chosen"], "rejected": good["chosen"]}
    found, none, other = map(pair_columns, open_source([good, same, {"text": 1}]).iter_records())
    assert found == {
        "prompt": [{"role": "user", "content": "Which?"}],
        "chosen": [{"role": "assistant", "content": "Red."}],
        "rejected": [{"role": "assistant", "content": "Blue."}],
    }
    assert none == other == {"prompt": None, "chosen": None, "rejected": None}
