"""The settings of a selection: what is refused, and that a file says the same as the fields."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from datastore.errors import SettingError
from less.selection import Amount, SelectConfig

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
SHARES = st.floats(0, 1, exclude_min=True)
AMOUNTS = st.builds(
    Amount, TEXT.filter(lambda text: "=" not in text), st.one_of(st.none(), TEXT), st.one_of(st.integers(0), SHARES)
)


@given(AMOUNTS)
def test_an_amount_is_read_back_from_its_text(amount):
    assume(amount.value is not None or ":" not in str(amount.amount))
    assert Amount.parse(str(amount)) == amount


def test_amounts_as_they_are_written():
    assert Amount.parse("dataset=gsm8k:0.3") == Amount("dataset", "gsm8k", 0.3)
    assert Amount.parse("dataset=gsm8k:100") == Amount("dataset", "gsm8k", 100)
    assert Amount.parse("dataset=0.5") == Amount("dataset", None, 0.5)
    assert Amount.parse("url=http://x:80/a=b:7") == Amount("url", "http://x:80/a=b", 7)


@pytest.mark.parametrize("text", ["", "dataset", "=a:1", "dataset=", "dataset=a:", "dataset=a", "dataset=:3", "a:0.3"])
def test_an_amount_of_another_form_is_refused_and_the_forms_are_named(text):
    with pytest.raises(SettingError, match="expected COLUMN=VALUE:AMOUNT or COLUMN=AMOUNT"):
        Amount.parse(text)


@pytest.mark.parametrize("text", ["a=b:0.0", "a=b:1.5", "a=b:nan", "a=b:-1", "a=-0.5"])
def test_an_amount_out_of_range_is_refused(text):
    with pytest.raises(SettingError, match="must be"):
        Amount.parse(text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give one of fraction, count, token_budget, got none of them"),
        ({"count": 3, "fraction": 0.1}, "got fraction 0.1, count 3"),
        ({"count": 3, "turns": "subtask", "balance": "skill"}, "give at most one of turns"),
        ({"count": 3, "balance": "skill", "diversity": "mmr"}, "got balance 'skill', diversity 'mmr'"),
        ({"count": 0}, "count must be a whole number, at least 1, got 0"),
        ({"count": True}, "count must be a whole number"),
        ({"count": 2.0}, "count must be a whole number"),
        ({"fraction": 1.2}, "fraction must be above 0 and at most 1, got 1.2"),
        ({"fraction": "0.1"}, "fraction must be above 0"),
        ({"token_budget": 0}, "token_budget must be a whole number, at least 1"),
        ({"count": 3, "turns": "skill"}, "turns must be subtask or target-set, got 'skill'"),
        ({"count": 3, "duplicates": "near"}, "duplicates must be exact, got 'near'"),
        ({"count": 3, "diversity": "dpp"}, "diversity must be mmr or facility-location"),
        ({"count": 3, "balance": ""}, "balance must name a column"),
        ({"count": 3, "near_duplicates": 0}, "near_duplicates must be above 0"),
        ({"count": 3, "diversity_weight": 1.1}, "diversity_weight must be from 0 to 1"),
        ({"count": 3, "diversity_candidates": 0}, "diversity_candidates must be a whole number"),
        ({"count": 3, "away_weight": -1}, "away_weight must be at least 0"),
        ({"count": 3, "min_score": float("nan")}, "min_score must be finite"),
        ({"count": 3, "seed": -1}, "seed must be"),
        ({"count": 3, "quotas": "dataset=a:3"}, "quotas must be a list of amounts, got 'dataset=a:3'"),
        ({"count": 3, "caps": [3]}, "caps must be a list of amounts"),
        ({"count": 3, "caps": ["a=b:3", "a=b:4"]}, "there are two caps for a=b"),
        ({"count": 3, "quotas": ["a=b:3"], "caps": ["a=b:2"]}, "quota a=b:3 asks for more than cap a=b:2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(SettingError, match=words):
        SelectConfig(**fields)


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "turns": st.sampled_from(["subtask", "target-set"]),
        "quotas": st.lists(AMOUNTS, max_size=3),
        "min_score": st.floats(allow_nan=False, allow_infinity=False),
        "away_weight": st.floats(0, 1e9),
        "away_above": st.floats(allow_nan=False, allow_infinity=False),
        "duplicates": st.just("exact"),
        "near_duplicates": SHARES,
        "diversity_candidates": st.integers(1, 9),
        "seed": st.integers(0, 2**62),
    },
).flatmap(
    lambda fields: st.sampled_from([{"fraction": 0.05}, {"count": 7}, {"token_budget": 10**12}]).map(
        lambda size: SelectConfig(**fields, **size)
    )
)


@given(CONFIGS)
def test_a_file_holds_the_same_settings(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("config") / "select.toml"
    file.write_text(config.to_toml(), encoding="utf-8", newline="")
    assert SelectConfig.load(file) == config


@given(TEXT)
def test_a_columns_name_may_hold_any_sign(tmp_path_factory, column):
    file = tmp_path_factory.mktemp("config") / "select.toml"
    config = SelectConfig(count=1, balance=column)
    file.write_text(config.to_toml(), encoding="utf-8", newline="")
    assert SelectConfig.load(file) == config


def write(folder, text):
    (folder / "select.toml").write_text(text, encoding="utf-8")
    return folder / "select.toml"


def test_what_is_given_stands_in_place_of_the_file(tmp_path):
    file = write(tmp_path, 'fraction = 0.05\nbalance = "skill"\nmin_score = 0.1\ncaps = ["dataset=0.5"]\n')
    assert SelectConfig.load(file, count=3, turns="subtask", min_score=None) == SelectConfig(
        count=3, turns="subtask", min_score=0.1, caps=["dataset=0.5"]
    )


def test_a_file_with_a_setting_that_there_is_not_is_refused_by_its_name(tmp_path):
    with pytest.raises(SettingError, match=r"there is no setting 'top'; there are fraction, count, token_budget"):
        SelectConfig.load(write(tmp_path, "top = 3\n"))


@pytest.mark.parametrize(
    ("text", "words"), [("count = ", "cannot read settings"), ("count = 0\n", r"select.toml: count must be")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, words):
    with pytest.raises(SettingError, match=words):
        SelectConfig.load(write(tmp_path, text))
    with pytest.raises(SettingError, match=r"cannot read settings from nowhere\.toml"):
        SelectConfig.load("nowhere.toml")


def test_a_config_says_which_columns_it_reads():
    config = SelectConfig(count=3, balance="skill", quotas=["dataset=a:1"], caps=["dataset=0.5", "lang=en:1"])
    assert config.columns == ("skill", "dataset", "lang")
    assert not config.needs_features
    assert SelectConfig(count=3, diversity="mmr").needs_features


def test_negative_targets_count_once_unless_there_is_a_threshold():
    assert SelectConfig(count=3).away_factor == 1
    assert SelectConfig(count=3, away_above=0.2).away_factor == 0
    assert SelectConfig(count=3, away_above=0.2, away_weight=0.5).away_factor == 0.5
