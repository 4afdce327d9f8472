"""`score_pairs`: rows in, the same rows with their scores out, and the same numbers however the work was cut."""

import copy
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ches import ChesConfig, score_pairs
from ches import scoring as module
from ches.scored import MEASURES, Manifest, Parts, columns_of
from ches.tokens import PairRenderer
from datastore.errors import (
    CheckpointError,
    DataError,
    GradsiftError,
    ModelError,
    ProvenanceError,
    RowError,
    SettingError,
    StoreLockedError,
    UnsupportedError,
)
from less.data import RenderConfig, open_source
from less.lm_head import Unembedding, lm_head

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(datasets|dill|multiprocess|pyarrow|pandas).*")

COLUMNS = [*columns_of(tuple(MEASURES)), "ches_problem"]


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def user(content):
    return {"role": "user", "content": content}


def said(content):
    return {"role": "assistant", "content": content}


WORDS = ["red", "green", "blue", "amber", "violet", "teal", "ochre", "plum"]


def pair_row(number):
    """A pair whose lengths vary with its number."""
    asked = " ".join(WORDS[(number * 3 + i) % 8] for i in range(1 + number % 5))
    replies = (" ".join(WORDS[(number * 5 + i * k) % 8] for i in range(1 + number * k % 4)) for k in (3, 5))
    chosen, rejected = replies
    return {
        "id": f"pair-{number}", "prompt": [user(f"mix {asked}")], "chosen": [said(chosen)],
        "rejected": [said(f"{rejected}!")], "rating": 1.50 + number, "when": "2024-05-06",
    }  # fmt: skip


ROWS = [pair_row(n) for n in range(23)]


def write_lines(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", ROWS)


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def score(model):
    def call(data, output=None, **changes):
        return score_pairs(**{"model": model, "data": data, "output": output, "progress": False} | changes)

    return call


@pytest.fixture(scope="module")
def scored(score, data):
    """The scores of `ROWS`."""
    return score(data)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model_folder):
    """A folder with an adapter that changes every linear layer but the head."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", r=2, lora_alpha=8, init_lora_weights=False
        )
        peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


def assert_close(ours, theirs, tolerance=1e-5):
    """The columns of two runs, number for number; differences of near numbers are judged by what they differ from."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        scale = abs(other.get("last_hidden") or 1) * (other.get("length_chosen") or 1) ** 2
        for name, value in one.items():
            if isinstance(value, float):
                size = abs(other[name]) if name.startswith("logp") else scale
                assert abs(value - other[name]) <= tolerance * max(size, 1), (name, value, other[name])
            else:
                assert value == other[name]


def changed_weights(model, scale=1.1):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.parameters()).mul_(scale)
    return changed


# --- rows and columns ---


def test_rows_keep_their_order_and_their_bytes(score, scored, data, tmp_path):
    lines = [
        '{"prompt":[{"role":"user","content":"a"}],   "chosen":[{"role":"assistant","content":"b"}], '
        '"rejected":[{"role":"assistant","content":"\\u00e9"}], "n": 1.50, "n2": 1e3, "ches": "old", "d": "May"}',
        *(json.dumps(row) for row in ROWS),
    ]
    output = tmp_path / "scored.jsonl"
    result = score(write_lines(tmp_path / "odd.jsonl", lines), output)
    written = output.read_text(encoding="utf-8").splitlines()
    assert len(written) == len(lines) == result.num_rows == result.num_scored == result.num_computed
    first = lines[0].replace('"old"', json.dumps(result.columns[0]["ches"]))
    assert written[0].startswith(first[:-1])
    for line, kept, row, columns in zip(written[1:], lines[1:], ROWS, result.columns[1:], strict=True):
        assert line.startswith(kept[:-1])
        assert json.loads(line) == {**row, **columns}
        assert list(columns) == COLUMNS
    assert_close(result.columns[1:], scored.columns)
    assert [record.number for record in result.records] == list(range(24))
    assert result.output == output
    assert not result.problems
    assert not result.rewritten


def test_each_row_has_the_scores_of_its_own_pair(score, scored):
    for n in (0, 7, 22):
        assert_close(score([ROWS[n]]).columns, [scored.columns[n]])
    assert len({columns["ches"] for columns in scored.columns}) > 15


@pytest.mark.parametrize("measures", [("ln_ches",), "ches", ("logp", "ches"), ("length_difference",), ("alpha_ches",)])
def test_only_the_measures_asked_for_are_columns(score, scored, measures):
    names = (measures,) if isinstance(measures, str) else measures
    found = score(ROWS, measures=measures).columns
    expected = [*columns_of(names), "ches_problem"]
    assert [list(columns) for columns in found] == [expected] * len(ROWS)
    assert_close(found, [{name: columns[name] for name in expected} for columns in scored.columns])


def test_without_alpha_ches_and_logp_the_head_is_never_given_a_position(score, model, monkeypatch):
    monkeypatch.setattr(Unembedding, "of", None)
    seen = []
    spy = lm_head(model).register_forward_hook(lambda _, args, logits: seen.append(logits.numel()))
    try:
        score(ROWS, measures=["ches", "ln_ches", "last_hidden", "edit_distance"])
    finally:
        spy.remove()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    "settings",
    [
        {"shard_rows": 1},
        {"shard_rows": 7, "tokens_per_batch": 100},
        {"tokens_per_batch": 1},
        {"tokens_per_batch": 10**6},
    ],
)
def test_how_the_work_is_cut_changes_nothing(score, scored, settings):
    result = score(ROWS, **settings)
    assert_close(result.columns, scored.columns)
    assert result.num_scored == len(ROWS)


def test_a_model_that_cannot_share_prompts_has_the_same_scores(score, scored, monkeypatch):
    monkeypatch.setattr(module, "can_share_prompts", lambda model: False)
    assert_close(score(ROWS, tokens_per_batch=300).columns, scored.columns)


def test_the_numbers_of_terms_and_columns_agree_with_the_tokens(score, data, tiny_tokenizer):
    renderer = PairRenderer(tiny_tokenizer, RenderConfig(max_length=1024), context_length=256)
    for record, columns in zip(open_source(data).iter_records(), score(data, measures="logp").columns, strict=True):
        tokens = renderer.render_record(record)
        lengths = tokens.chosen.num_counted, tokens.rejected.num_counted
        assert (columns["length_chosen"], columns["length_rejected"]) == lengths
        assert columns["length_difference"] == lengths[1] - lengths[0]
        assert columns["logp_chosen"] < 0 > columns["logp_rejected"]


# --- formats ---


def test_every_kind_of_source_gives_the_same_scores(score, scored, tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "pairs.parquet")
    for source in (ROWS, table, tmp_path / "pairs.parquet"):
        result = score(source)
        assert_close(result.columns, scored.columns)
        assert len(result.dataset) == len(ROWS)
        assert result.dataset.column_names == [*ROWS[0], *COLUMNS]
        assert result.dataset["rating"] == [row["rating"] for row in ROWS]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_kind_of_output_can_be_scored_again(score, scored, data, tmp_path, kind, suffix):
    import datasets

    if kind == "parquet":
        data = tmp_path / "pairs.parquet"
        datasets.Dataset.from_list(ROWS).to_parquet(data)
    output = tmp_path / f"scored{suffix}"
    score(data, output)
    assert (output.read_bytes()[:4] == b"PAR1") == (suffix == ".parquet")
    records = list(open_source(output).iter_records())
    assert [{**record.columns, "when": None} for record in records] == [
        {**row, **columns, "when": None} for row, columns in zip(ROWS, scored.columns, strict=True)
    ]
    assert_close(score(output).columns, scored.columns)


@pytest.mark.parametrize("name", ["scored", "scored.csv"])
def test_an_output_that_no_command_could_read_is_refused_at_once(score, data, tmp_path, name):
    with pytest.raises(SettingError, match=r"ends in .*\.jsonl.*\.parquet"):
        score(data, tmp_path / name)
    assert not (tmp_path / name).exists()


# --- bad rows ---

PROBLEMS = {
    "empty reply": {"prompt": [user("x")], "chosen": [said("")], "rejected": [said("b")]},
    "same replies": {"prompt": [user("x")], "chosen": [said("b")], "rejected": [said("b")]},
    "not JSON": "{bad",
    "not an object": "[1, 2]",
    "field missing": {"prompt": [user("x")], "chosen": [said("b")]},
    "no supervised token": {"prompt": [user("x" * 300)], "chosen": [said("b")], "rejected": [said("c")]},
    "no assistant turn": {"prompt": [user("x")], "chosen": [user("b")], "rejected": [said("c")]},
}


def test_bad_rows_have_nulls_and_a_reason_and_change_no_other(score, scored, tmp_path):
    bad = list(PROBLEMS.items())
    lines = [*ROWS[:3], *(row for _, row in bad[:4]), *ROWS[3:], *(row for _, row in bad[4:])]
    data = write_lines(tmp_path / "pairs.jsonl", lines)
    output = tmp_path / "scored.jsonl"
    result = score(data, output, shard_rows=4)
    good = [c for c in result.columns if c["ches_problem"] is None]
    assert_close(good, scored.columns)
    assert result.num_scored == len(ROWS)
    assert result.num_rows == len(lines)
    assert len(result.records) == len(lines) - 2  # what is no object can carry no column
    assert [problem.reason for problem in result.problems] == [reason for reason, _ in bad]
    places = [4, 5, 6, 7, *(range(len(lines) - 2, len(lines) + 1))]
    assert [problem.where for problem in result.problems] == [f"pairs.jsonl:{place}" for place in places]
    for columns in result.columns:
        if columns["ches_problem"] is not None:
            assert list(columns) == COLUMNS
            assert {columns[name] for name in COLUMNS[:-1]} == {None}
    written = read_lines(output)
    reasons = [row["ches_problem"] for row in written if row["ches_problem"]]
    assert reasons == [reason for reason, _ in bad if not reason.startswith("not ")]
    manifest = Manifest.load(output)
    assert [(p["row"], p["reason"]) for p in manifest.problems] == [(p.row, p.reason) for p in result.problems]
    assert manifest.problems[0].keys() == {"row", "where", "id", "reason", "detail"}


def test_a_truncated_reply_is_scored_and_flagged(score, tmp_path):
    long = {"prompt": [user("mix")], "chosen": [said("red " * 80)], "rejected": [said("blue")]}
    output = tmp_path / "scored.jsonl"
    result = score([*ROWS, long], output, max_length=120, strict=True)
    columns = result.columns[-1]
    assert columns["ches_problem"] == "truncated reply"
    assert all(isinstance(columns[name], int | float) for name in COLUMNS[:-1])
    assert result.num_scored == len(result.columns) == len(ROWS) + 1
    (problem,) = result.problems
    assert (problem.row, problem.reason) == (len(ROWS), "truncated reply")
    assert problem.detail.startswith("chosen: ")
    both = score([long, PROBLEMS["same replies"], ROWS[0]], max_length=120)
    assert [problem.row for problem in both.problems] == [0, 1]
    cut = {**long, "chosen": [said("red " * 60)]}
    assert_close(score([cut], max_length=120).columns, [columns])
    assert Manifest.load(output).problems[0]["reason"] == "truncated reply"
    assert Manifest.load(output).num_scored == len(ROWS) + 1


@pytest.mark.parametrize("reason", ["empty reply", "not JSON", "no supervised token"])
def test_strict_stops_at_a_pair_that_cannot_be_scored(score, tmp_path, reason):
    data = write_lines(tmp_path / "pairs.jsonl", [ROWS[0], PROBLEMS[reason]])
    with pytest.raises(RowError, match=rf"pairs.jsonl:2: {reason}"):
        score(data, tmp_path / "scored.jsonl", strict=True)
    assert list(tmp_path.iterdir()) == [data]


def test_data_without_a_pair_that_can_be_scored_is_refused_with_the_first_reason(score, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", [PROBLEMS["same replies"], "{bad"])
    with pytest.raises(DataError, match=r"no pair of .*pairs.jsonl:1: same replies: "):
        score(data, tmp_path / "scored.jsonl", shard_rows=1)
    assert list(tmp_path.iterdir()) == [data]


def test_numbers_that_are_not_finite_are_no_scores(score, model):
    broken = copy.deepcopy(model)
    token = broken.config.vocab_size - 1
    with torch.no_grad():
        lm_head(broken).weight[token] = math.nan
    with pytest.raises(DataError, match="not finite: alpha_ches nan, logp_chosen nan"):
        score(ROWS, model=broken)
    assert score(ROWS, model=broken, measures=["ches"]).num_scored == len(ROWS)
    with torch.no_grad():
        broken.model.embed_tokens.weight[ord("!") - ord("!") + 1] = math.nan  # in every rejected reply
    with pytest.raises(DataError, match="not finite: ches nan"):
        score(ROWS, model=broken, measures=["ches"])
    with pytest.raises(RowError, match="not finite"):
        score(ROWS, model=broken, measures=["ches"], strict=True)


# --- resuming ---


class Killed(BaseException):
    pass


def kill_in_range(monkeypatch, number):
    """The process dies in the `number`-th range, from 1; gives what was computed before."""
    ranges, computed = [], []
    score_range, measure = module.PairScorer.score_range, module.PairScorer.measure

    def counted(self, source, rows, bar):
        ranges.append(rows)
        return score_range(self, source, rows, bar)

    def dying(self, pairs):
        if len(ranges) == number:
            raise Killed
        computed.extend(pairs)
        return measure(self, pairs)

    monkeypatch.setattr(module.PairScorer, "score_range", counted)
    monkeypatch.setattr(module.PairScorer, "measure", dying)
    return computed


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_killed_run_goes_on_to_the_same_bytes(score, tmp_path, monkeypatch, suffix):
    lines = [*ROWS[:4], PROBLEMS["empty reply"], *ROWS[4:]]
    data = write_lines(tmp_path / "pairs.jsonl", lines)
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"scored{suffix}"
    score(data, whole, shard_rows=5)
    with monkeypatch.context() as patch:
        computed = kill_in_range(patch, 3)
        with pytest.raises(Killed):
            score(data, output, shard_rows=5)
        assert len(computed) == 9
        assert not output.exists()
        parts = {path.name: path.read_bytes() for path in Path(f"{output}.parts").glob("0*.json")}
        assert sorted(parts) == ["0000000000-0000000005.json", "0000000005-0000000010.json"]
    with monkeypatch.context() as patch:
        computed = kill_in_range(patch, 0)
        result = score(data, output, shard_rows=5)
    assert len(computed) == result.num_computed == len(lines) - 10
    assert output.read_bytes() == whole.read_bytes()
    ours, theirs = Manifest.load(output), Manifest.load(whole)
    assert ours == theirs
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["pairs.jsonl", *(f"{path.name}{end}" for path in (whole, output) for end in ("", ".manifest.json"))]
    )


def test_a_run_killed_before_its_manifest_goes_on(score, data, tmp_path, monkeypatch):
    output = tmp_path / "scored.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda self, scored: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            score(data, output)
    assert output.exists()
    result = score(data, output)
    assert result.num_computed == 0
    assert Manifest.load(output).num_scored == len(ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scored.jsonl", "scored.jsonl.manifest.json"]


def test_a_finished_output_is_left_as_it_is(score, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "pairs.jsonl", [*ROWS, PROBLEMS["empty reply"], "{bad"])
    output = tmp_path / "scored.jsonl"
    first = score(data, output)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    monkeypatch.setattr(module.PairScorer, "measure", None)
    second = score(data, output)
    assert second.num_computed == 0
    assert second.columns == first.columns
    assert second.problems == first.problems
    assert (second.num_rows, second.num_scored, second.rewritten) == (first.num_rows, first.num_scored, False)
    assert second.dataset["ches"] == first.dataset["ches"]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == files


def bytes_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"measures": ["ches"]}, "measures"),
        ({"max_length": 100}, "rendering.max_length"),
        ({"tokens": "reference"}, "rendering.tokens"),
        ({"system_prompt": "Be brief."}, "rendering.system_prompt"),
        ({"chat_template": "chatml"}, "rendering.template_sha256"),
        ({"shard_rows": 6}, "shard_rows"),
        ({"tokens_per_batch": 77}, "tokens_per_batch"),
        ({"model": "changed"}, "model.fingerprint"),
        ({"dtype": "bfloat16", "model": "folder"}, "model.dtype"),
        ({"adapter": "adapter"}, "model.adapter_sha256"),
        ({"data": ROWS[:-1]}, "source.sha256"),
    ],
)
def test_other_settings_are_refused_by_the_field(
    score, model, data, adapter, tiny_model_folder, tmp_path, monkeypatch, changes, field, done
):
    output = tmp_path / "scored.jsonl"
    changes = dict(changes)
    if "model" in changes:
        changes["model"] = changed_weights(model) if changes["model"] == "changed" else tiny_model_folder
    if "adapter" in changes:
        changes["adapter"] = adapter
    if done:
        score(data, output, shard_rows=5)
    else:
        with monkeypatch.context() as patch:
            kill_in_range(patch, 2)
            with pytest.raises(Killed):
                score(data, output, shard_rows=5)
    files = bytes_in(tmp_path)
    with pytest.raises(ProvenanceError) as error:
        score(**{"data": data, "output": output, "shard_rows": 5} | changes)
    message = str(error.value)
    assert f"{field} is " in message
    assert "another --output, or delete" in message
    assert "\n" not in message
    assert bytes_in(tmp_path) == files


def test_a_changed_output_and_a_foreign_file_are_not_overwritten(score, data, tmp_path):
    output = tmp_path / "scored.jsonl"
    score(data, output)
    output.write_bytes(output.read_bytes() + b"\n")
    with pytest.raises(ProvenanceError, match="changed since it was scored"):
        score(data, output)
    foreign = write_lines(tmp_path / "mine.jsonl", [{"a": 1}])
    with pytest.raises(ProvenanceError, match="no scored file"):
        score(data, foreign)
    assert read_lines(foreign) == [{"a": 1}]
    with pytest.raises(SettingError, match="the data itself"):
        score(data, data)


def test_two_writers_of_one_output_are_kept_apart(score, data, tmp_path, monkeypatch):
    output, measure, refused = tmp_path / "scored.jsonl", module.PairScorer.measure, []

    def while_another_starts(self, pairs):
        with pytest.raises(StoreLockedError, match="being written by process"):
            score(data, output)
        refused.append(len(pairs))
        return measure(self, pairs)

    monkeypatch.setattr(module.PairScorer, "measure", while_another_starts)
    assert score(data, output).num_computed == sum(refused) == len(ROWS)
    assert Manifest.load(output).num_scored == len(ROWS)


# --- models ---


def test_a_model_given_is_given_back_as_it_was(score, tiny_model_folder, adapter):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    weights = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    score(ROWS[:3], model=model)
    plain = score(ROWS[:3], model=model, adapter=adapter)
    with pytest.raises(DataError):
        score([PROBLEMS["same replies"]], model=model)
    assert model.training
    assert all(child.training for child in model.modules())
    assert [name for name, _ in model.named_modules()] == names
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name][0])
        assert value.requires_grad == weights[name][1]
        assert value.grad is None
    assert plain.num_scored == 3


def test_dropout_is_off_while_scoring(score, scored, tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, attention_dropout=0.5).train()
    assert_close(score(ROWS, model=model).columns, scored.columns)


def test_a_folder_and_its_model_are_the_same(score, data, tiny_model_folder, tmp_path):
    output = tmp_path / "scored.jsonl"
    score(data, output, model=tiny_model_folder)
    assert score(data, output).num_computed == 0


def test_an_adapter_is_the_same_given_as_a_folder_or_in_the_model(score, scored, data, adapter, tmp_path, model):
    output = tmp_path / "scored.jsonl"
    by_folder = score(data, output, adapter=adapter)
    assert max(abs(a["ches"] - b["ches"]) for a, b in zip(by_folder.columns, scored.columns, strict=True)) > 0.1
    for name in ("default", "policy"):
        given = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter, adapter_name=name)
        assert_close(score(data, model=given).columns, by_folder.columns)
        assert score(data, output, model=given).num_computed == 0
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload()
    assert_close(score(data, model=merged).columns, by_folder.columns, tolerance=1e-4)
    assert Manifest.load(output).environment["adapter"] == str(adapter)


def test_an_adapter_of_another_strength_is_another_adapter(score, data, adapter, tmp_path, model):
    output = tmp_path / "scored.jsonl"
    score(data, output, adapter=adapter)
    config = peft.LoraConfig.from_pretrained(adapter)
    config.lora_alpha *= 2
    stronger = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter, config=config)
    with pytest.raises(ProvenanceError, match=r"model.adapter_sha256"):
        score(data, output, model=stronger)


@pytest.mark.parametrize("what", ["absent", "without weights", "truncated", "of another model", "no configuration"])
def test_an_adapter_that_cannot_be_loaded_is_one_line(score, adapter, tmp_path, tiny_model_folder, what):
    folder = tmp_path / "odd"
    if what != "absent":
        shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    if what == "without weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif what == "of another model":
        save_file({name: torch.zeros(3, 3) for name in load_file(weights)}, weights)
    elif what == "no configuration":
        (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter for this model can be loaded from .*odd: .*expect") as error:
        score(ROWS, model=tiny_model_folder, adapter=folder)
    assert "\n" not in str(error.value)


def test_what_contradicts_the_model_given_is_refused(score, adapter, model):
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    with pytest.raises(SettingError, match="has an adapter already"):
        score(ROWS, model=adapted, adapter=adapter)
    for given in (model, adapted):
        with pytest.raises(SettingError, match="dtype is bfloat16 but the model given is on float32"):
            score(ROWS, model=given, dtype="bfloat16")


def test_prompt_tuning_is_refused(score, model):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedError, match="tokens of its own"):
            score(ROWS, model=tuned, measures="ches")


def test_a_head_that_is_not_linear_costs_alpha_ches_and_logp_alone(score, scored, model):
    odd = copy.deepcopy(model)
    odd.set_output_embeddings(nn.Sequential(lm_head(odd), nn.Softplus()))
    for measures in ("alpha_ches", "logp"):
        with pytest.raises(UnsupportedError, match=r"alpha_ches and logp.*--measures"):
            score(ROWS, model=odd, measures=measures)
    others = [name for name in MEASURES if name not in ("alpha_ches", "logp")]
    names = [*columns_of(others), "ches_problem"]
    assert_close(score(ROWS, model=odd, measures=others).columns, [{n: c[n] for n in names} for c in scored.columns])


def test_a_model_without_a_name_asks_for_its_tokenizer(score, scored, model, tiny_tokenizer):
    nameless = type(model)(copy.deepcopy(model.config))
    nameless.load_state_dict(model.state_dict())
    nameless.config._name_or_path = nameless.name_or_path = ""
    with pytest.raises(ModelError, match="tokenizer"):
        score(ROWS, model=nameless)
    assert_close(score(ROWS, model=nameless, tokenizer=tiny_tokenizer).columns, scored.columns)


def test_bfloat16_scores_are_near(score, scored, tiny_model_folder):
    columns = score(ROWS, model=tiny_model_folder, dtype="bfloat16").columns
    assert_close(columns, scored.columns, tolerance=0.1)


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"measures": ["ches", "chess"]}, "measures must be among ches, ln_ches.*got 'chess'"),
        ({"measures": "ches,ln_ches"}, "got 'ches,ln_ches'"),
        ({"measures": []}, "no measure was asked for"),
        ({"tokens": "all"}, "tokens must be trainer or reference, got 'all'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, got 0"),
        ({"tokens_per_batch": -1}, "tokens_per_batch must be at least 1, got -1"),
        ({"dtype": "float8"}, "float8"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_value(score, settings, words):
    with pytest.raises(SettingError, match=words):
        score(ROWS, **settings)


def test_measures_are_kept_in_the_order_of_the_columns():
    assert ChesConfig(measures=["logp", "ches", "ches"]).measure_names == ("ches", "logp")
    assert ChesConfig().measure_names == tuple(MEASURES)


def test_a_settings_error_comes_before_the_data_is_read_and_a_missing_file_is_one_line(score, tmp_path):
    with pytest.raises(GradsiftError, match="tokens must be"):
        score(tmp_path / "none.jsonl", tokens="all")
    with pytest.raises(DataError, match=r"none.jsonl"):
        score(tmp_path / "none.jsonl")


# --- manifest and examples ---


def test_the_manifest_says_how_the_scores_came_about(score, data, tmp_path, model, tiny_model_folder):
    output = tmp_path / "scored.jsonl"
    score(data, output, tokens="reference", max_length=200)
    doc = json.loads((tmp_path / "scored.jsonl.manifest.json").read_text())
    assert (doc["format"], doc["version"]) == ("gradsift-ches-scores", 1)
    settings = doc["settings"]
    assert settings["model"].keys() == {"fingerprint", "dtype", "adapter_sha256"}
    assert (settings["model"]["dtype"], settings["model"]["adapter_sha256"]) == ("float32", None)
    assert settings["rendering"].keys() == {
        "vocabulary_sha256", "template_sha256", "max_length", "system_prompt", "template_date", "tokens",
    }  # fmt: skip
    assert (settings["rendering"]["tokens"], settings["rendering"]["max_length"]) == ("reference", 200)
    assert settings["measures"] == list(MEASURES)
    source = open_source(data)
    assert doc["source"] == {
        "name": "pairs.jsonl", "kind": "jsonl", "location": str(data), "sha256": source.sha256, "num_rows": 23,
    }  # fmt: skip
    assert doc["environment"]["model"] == str(tiny_model_folder)
    assert doc["environment"]["device"] == "cpu"
    assert doc["environment"]["versions"].keys() >= {"torch", "transformers", "peft", "gradsift", "python"}
    assert doc["output"]["num_bytes"] == output.stat().st_size
    assert (doc["num_scored"], doc["rewritten"], doc["problems"]) == (23, False, [])


def test_examples_are_the_true_extremes_token_by_token(score, tmp_path, tiny_tokenizer):
    rows = [pair_row(n) for n in range(60)]
    bad = {3: PROBLEMS["empty reply"], 31: "[]"}
    lines = [bad.get(n, row) for n, row in enumerate(rows)]
    output = tmp_path / "scored.jsonl"
    result = score(write_lines(tmp_path / "pairs.jsonl", lines), output, shard_rows=9)
    by_row = {record.number: columns for record, columns in zip(result.records, result.columns, strict=True)}
    scored_rows = [row for row in by_row if by_row[row]["ches"] is not None]
    expected = set()
    for measure in ("ches", "ln_ches", "alpha_ches"):
        ranked = sorted(scored_rows, key=lambda row: (by_row[row][measure], row))
        expected |= {*ranked[:10], *ranked[-10:]}
    examples = Manifest.load(output).examples
    assert [example["row"] for example in examples] == sorted(expected)
    assert 20 < len(examples) < len(scored_rows)
    for example in examples:
        columns = by_row[example["row"]]
        assert example["values"] == {name: columns[name] for name in ("ches", "ln_ches", "alpha_ches")}
        for side in ("chosen", "rejected"):
            assert example[side].keys() == {"tokens", "ches", "alpha_ches"}
            assert {len(values) for values in example[side].values()} == {columns[f"length_{side}"]}
            said_here = rows[example["row"]][side][0]["content"]
            assert "".join(example[side]["tokens"]) == f"{said_here}</s>\n"
        for measure in ("ches", "alpha_ches"):
            terms = example["chosen"][measure], example["rejected"][measure]
            size = sum(map(abs, (*terms[0], *terms[1])))
            assert abs(sum(map(sum, terms)) - columns[measure]) <= 1e-6 * size
        lengths = columns["length_chosen"], columns["length_rejected"]
        normalized = sum(example["chosen"]["ches"]) / lengths[0] ** 2
        normalized += sum(example["rejected"]["ches"]) / (lengths[0] * lengths[1])
        assert normalized == pytest.approx(columns["ln_ches"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("measures", "terms"),
    [
        (["ln_ches"], {"ches"}),
        (["alpha_ches"], {"alpha_ches"}),
        (["ches", "logp"], {"ches"}),
        (["last_hidden"], set()),
    ],
)
def test_examples_hold_terms_of_the_measures_asked_for_only(score, data, tmp_path, measures, terms):
    output = tmp_path / "scored.jsonl"
    score(data, output, measures=measures)
    examples = Manifest.load(output).examples
    assert bool(examples) == bool(terms)
    assert len(examples) <= 20
    for example in examples:
        assert list(example["values"]) == [name for name in measures if name != "logp"]
        assert example["chosen"].keys() == example["rejected"].keys() == {"tokens", *terms}


# --- layouts that DPOTrainer would misread ---


def transcript(asked, reply):
    return f"\n\nHuman: {asked}\n\nAssistant: {reply}"


TRANSCRIPTS = [
    {"id": n, "chosen": transcript(f"Colour {n}?", chosen), "rejected": transcript(f"Colour {n}?", rejected)}
    for n, (chosen, rejected) in enumerate([("Red.", "Blue, or so."), ("Teal", "Amber"), ("None at all.", "Plum.")])
]
ULTRA = [
    {
        "prompt": f"Colour {n}?",
        "chosen": [user(f"Colour {n}?"), said("Red.")],
        "rejected": [user(f"Colour {n}?"), said(w)],
    }
    for n, w in enumerate(("Blue.", "Green, perhaps."))
]
UNSCORED = [
    {"id": 8, "chosen": transcript("x", "Same."), "rejected": transcript("x", "Same.")},
    {"id": 9, "chosen": "", "rejected": transcript("x", "y")},
]


def dpo_tokens(rows, tokenizer, folder, output):
    """What `DPOTrainer` makes of rows."""
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(
        str(output), max_length=1024, report_to="none", use_cpu=True, bf16=False, activation_checkpointing=False
    )
    trainer = trl.DPOTrainer(str(folder), args=args, processing_class=copy.deepcopy(tokenizer), train_dataset=rows)
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "rows", [TRANSCRIPTS, [*TRANSCRIPTS, *UNSCORED], ULTRA], ids=["transcripts", "with bad rows", "UltraFeedback"]
)
def test_a_layout_that_dpo_trainer_would_misread_is_written_as_it_was_scored(
    score, tmp_path, tiny_tokenizer, tiny_model_folder, rows, suffix
):
    import datasets

    output = tmp_path / f"scored{suffix}"
    result = score(datasets.Dataset.from_list(rows), output)
    assert result.rewritten
    assert Manifest.load(output).rewritten
    written = [record.columns for record in open_source(output).iter_records()]
    assert [row.get("id") for row in written] == [row.get("id") for row in rows]
    bad = [row for row in written if row["ches_problem"]]
    assert len(bad) == len([row for row in rows if row in UNSCORED])
    assert all(row[name] is None for row in bad for name in ("prompt", "chosen", "rejected"))

    kind = "json" if suffix == ".jsonl" else "parquet"
    table = datasets.load_dataset(kind, data_files=str(output), cache_dir=str(tmp_path), split="train")
    table = table.filter(lambda row: row["ches_problem"] is None).select_columns(["prompt", "chosen", "rejected"])
    assert all(isinstance(message["content"], str) for row in table for message in row["prompt"] + row["chosen"])
    renderer = PairRenderer(tiny_tokenizer, RenderConfig(max_length=1024), context_length=256)
    records = [record for record in open_source(rows).iter_records() if rows[record.number] not in UNSCORED]
    pairs = [renderer.render_record(record) for record in records]
    assert dpo_tokens(table, tiny_tokenizer, tiny_model_folder, tmp_path / "dpo") == [
        (pair.prompt_ids, pair.chosen.input_ids, pair.rejected.input_ids) for pair in pairs
    ]


def test_a_rewritten_output_scores_the_same_and_is_rewritten_no_more(score, tmp_path):
    output = tmp_path / "scored.jsonl"
    first = score([*TRANSCRIPTS, *ULTRA], output)
    assert read_lines(output)[0]["prompt"] == [user("Colour 0?")]
    again = score(output)
    assert not again.rewritten
    assert_close(again.columns, [{name: columns[name] for name in COLUMNS} for columns in first.columns])
    resumed = score([*TRANSCRIPTS, *ULTRA], output)
    assert (resumed.num_computed, resumed.rewritten) == (0, True)
    assert resumed.dataset["prompt"] == first.dataset["prompt"]


def test_one_pair_that_is_rewritten_makes_all_conversations_explicit(score, tmp_path):
    implicit = {"chosen": [user("Which?"), said("Red.")], "rejected": [user("Which?"), said("Blue.")]}
    output = tmp_path / "scored.jsonl"
    assert not score([implicit]).rewritten
    for rows in ([implicit, TRANSCRIPTS[0]], [TRANSCRIPTS[0], implicit]):
        for shard_rows in (1, 2):
            assert score(rows, output, shard_rows=shard_rows).rewritten
            written = read_lines(output)[rows.index(implicit)]
            assert [written[name] for name in ("prompt", "chosen", "rejected")] == [
                [user("Which?")], [said("Red.")], [said("Blue.")],
            ]  # fmt: skip
            output.unlink()


def test_texts_stay_texts(score, tmp_path):
    rows = [{"prompt": "The sky is", "chosen": " blue.", "rejected": " red."}, {"chosen": "a b", "rejected": "a c"}]
    output = tmp_path / "scored.jsonl"
    result = score(rows, output)
    assert not result.rewritten
    assert [{name: row[name] for name in old} for row, old in zip(read_lines(output), rows, strict=True)] == rows
    assert "prompt" not in read_lines(output)[1]


def test_no_output_writes_nothing(score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Parts, "open", None)
    assert score(ROWS[:2]).output is None
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_pair_once(score, tmp_path, capsys):
    data = write_lines(tmp_path / "pairs.jsonl", [*ROWS, PROBLEMS["empty reply"]])
    capsys.readouterr()
    score(data, shard_rows=5, progress=True)
    assert "pairs: 24 of 24 pairs" in capsys.readouterr().err
    score(data, shard_rows=5)
    assert capsys.readouterr().err == ""


def test_the_scored_tokenizer_is_not_changed(score, tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    before = (tokenizer.chat_template, tokenizer.padding_side, len(tokenizer))
    score(ROWS[:3], tokenizer=tokenizer, chat_template="chatml")
    assert (tokenizer.chat_template, tokenizer.padding_side, len(tokenizer)) == before


@pytest.mark.gpu
def test_a_gpu_gives_the_scores_of_the_cpu(score, scored, tiny_model_folder):
    assert_close(score(ROWS, model=tiny_model_folder, device="cuda", dtype="float32").columns, scored.columns, 1e-4)
