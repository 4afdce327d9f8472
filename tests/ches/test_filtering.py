"""Which pairs are kept and which are drawn beside them, what is written, and what is refused."""

import json
import math
import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ches.filtering import LENGTHS, QUANTILES, filter_pairs
from datastore.errors import DataError, SettingError


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def pair(number: int, value, difference: int = 0, **more) -> dict:
    return {
        "prompt": [{"role": "user", "content": f"mix {number}"}],
        "chosen": [{"role": "assistant", "content": "red" * (1 + number % 3)}],
        "rejected": [{"role": "assistant", "content": "blue" * (1 + number % 4)}],
        "ln_ches": value, "length_difference": difference, "length_chosen": 9, "length_rejected": 9 + difference,
        "ches_problem": None if value is not None else "empty reply",
    } | more  # fmt: skip


def pairs(values, differences=None) -> list[dict]:
    return [pair(n, v, d) for n, (v, d) in enumerate(zip(values, differences or [0] * len(values), strict=True))]


@pytest.fixture
def rows() -> list[dict]:
    """Twenty pairs, of which rows 3 and 11 could not be measured."""
    values = np.random.default_rng(5).normal(-50, 20, 20).tolist()
    differences = np.random.default_rng(6).integers(-30, 30, 20).tolist()
    return pairs([None if n in (3, 11) else value for n, value in enumerate(values)], differences)


@pytest.fixture
def lines(rows) -> list[str]:
    """The same as lines, oddly spaced, with a bad one."""
    texts = [json.dumps(row, separators=(" ,", ":  ")) if n % 2 else json.dumps(row) for n, row in enumerate(rows)]
    return [*texts[:7], "{bad", *texts[7:]]


@pytest.fixture
def scored(tmp_path, lines):
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def lowest_first(rows, members=None):
    members = [n for n, row in enumerate(rows) if row["ln_ches"] is not None] if members is None else members
    return sorted(members, key=lambda n: (rows[n]["ln_ches"], n))


def ceiling(fraction: float, count: int) -> int:
    return math.ceil(Fraction(str(fraction)) * count)


VALUES = st.lists(st.one_of(st.none(), st.integers(-3, 3), st.floats(-4, 4, width=16)), min_size=1, max_size=12)
FRACTIONS = st.integers(1, 99).map(lambda percent: percent / 100)


class TestKept:
    @given(values=VALUES.filter(lambda values: any(v is not None for v in values)), fraction=FRACTIONS)
    def test_are_the_ceiling_of_the_fraction_and_the_lowest_of_the_ranked(self, values, fraction):
        rows = pairs(values)
        order = lowest_first(rows)
        result = filter_pairs(rows, keep_lowest=fraction)
        count = ceiling(fraction, len(order))
        assert result.kept.tolist() == sorted(order[:count])
        assert result.dropped.tolist() == sorted(order[count:])
        assert [row.row for row in result.unranked] == [n for n, value in enumerate(values) if value is None]
        assert [record.columns for record in result.records] == [rows[n] for n in result.kept]
        assert result.threshold == max(rows[n]["ln_ches"] for n in result.kept)

    @given(values=VALUES, fraction=FRACTIONS)
    def test_are_what_is_left_once_the_highest_are_dropped(self, values, fraction):
        rows = pairs([*values, 0, 1])
        order = lowest_first(rows)
        left = len(order) - ceiling(fraction, len(order))
        if left:
            assert filter_pairs(rows, drop_highest=fraction).kept.tolist() == sorted(order[:left])
        else:
            with pytest.raises(SettingError, match=rf"drops all {len(order)} ranked rows; lower it"):
                filter_pairs(rows, drop_highest=fraction)

    @given(values=VALUES, limit=st.integers(-2, 3))
    def test_are_those_strictly_below_a_limit(self, values, limit):
        rows = pairs([*values, -3])
        expected = [n for n, row in enumerate(rows) if row["ln_ches"] is not None and row["ln_ches"] < limit]
        result = filter_pairs(rows, below=limit)
        assert result.kept.tolist() == expected
        assert len(result.dropped) == len(rows) - len(expected) - len(result.unranked)

    def test_are_counted_in_decimal_digits(self):
        assert len(filter_pairs(pairs(range(100)), keep_lowest=0.07).kept) == 7  # 0.07 * 100 is above 7 in binary
        assert len(filter_pairs(pairs(range(20)), keep_lowest=0.15).kept) == 3
        assert len(filter_pairs(pairs(range(100)), drop_highest=0.07).kept) == 93

    def test_of_equal_value_are_the_earlier_ones(self):
        assert filter_pairs(pairs([1, 0.0, 1, -0.0, 1, 1]), keep_lowest=0.5).kept.tolist() == [0, 1, 3]
        assert filter_pairs(pairs([1, 0, 1, 0, 1, 1]), drop_highest=0.5).kept.tolist() == [0, 1, 3]

    def test_may_be_all(self, rows):
        result = filter_pairs(rows, keep_lowest=1.0, random_control=True)
        assert len(result.kept) == 18
        assert len(result.dropped) == 0
        assert result.control.tolist() == result.kept.tolist()
        assert result.summary["dropped"].quantiles is None
        assert set(result.summary["dropped"].mean_lengths.values()) == {None}

    def test_can_be_found_by_any_column_of_numbers(self, rows):
        result = filter_pairs(rows, keep_lowest=0.1, measure="length_difference")
        order = sorted(range(20), key=lambda n: (rows[n]["length_difference"], n))
        assert result.kept.tolist() == sorted(order[:2])

    def test_by_the_negative_of_a_column_are_its_highest(self):
        rows = [pair(n, 0, edit_distance=distance) for n, distance in enumerate([0.9, 0.1, 0.9, 0.5, 0.95])]
        assert filter_pairs(rows, keep_lowest=0.4, measure="-edit_distance").kept.tolist() == [0, 4]
        result = filter_pairs(rows, below=-0.4, measure="-edit_distance")
        assert result.kept.tolist() == [0, 2, 3, 4]
        assert result.threshold == -0.5

    def test_never_lack_the_measure(self):
        bad = [None, "1.5", True, math.nan, math.inf, -math.inf, 10**400, [1]]
        rows = [*pairs([4.0, *bad]), {"id": "bare"}, pair(10, None, ches_problem=None), pair(11, 3, ches_problem="odd")]
        result = filter_pairs(rows, keep_lowest=1.0)
        assert result.kept.tolist() == [0, 11]  # a flag takes no row away
        odd = "ln_ches is not a finite number"
        assert [row.reason for row in result.unranked] == ["empty reply", *[odd] * 7, "no ln_ches", "no ln_ches"]
        assert [row.where for row in result.unranked] == [f"memory[{n}]" for n in range(1, 11)]
        assert result.unranked[1].detail == "ln_ches is '1.5'"

    def test_of_a_file_with_bad_lines_are_told_by_its_row_numbers(self, scored):
        result = filter_pairs(scored, keep_lowest=1.0)
        assert {row.row: row.reason for row in result.unranked} == {
            3: "empty reply", 7: "not JSON", 12: "empty reply",
        }  # fmt: skip
        assert result.kept.tolist() == [n for n in range(21) if n not in (3, 7, 12)]


class TestLengthStrata:
    @given(
        cells=st.lists(st.tuples(st.integers(-3, 3), st.integers(-4, 4)), min_size=4, max_size=16),
        strata=st.integers(2, 4),
        fraction=FRACTIONS,
        rule=st.sampled_from(["keep_lowest", "drop_highest"]),
    )
    def test_share_the_rows_and_rank_within(self, cells, strata, fraction, rule):
        rows = pairs(*zip(*cells, strict=True))
        wanted = ceiling(fraction, len(rows))
        if rule == "drop_highest" and wanted == len(rows):
            return
        result = filter_pairs(rows, length_strata=strata, random_control=True, **{rule: fraction})
        assert len(result.kept) == (wanted if rule == "keep_lowest" else len(rows) - wanted)
        bins = self.bins(rows, strata)
        assert result.strata == tuple(map(len, bins))
        for members in bins:
            kept = set(result.kept.tolist()) & set(members)
            assert kept == set(lowest_first(rows, members)[: len(kept)])
            assert len(set(result.control.tolist()) & set(members)) == len(kept)
            share = len(members) * (fraction if rule == "keep_lowest" else 1 - fraction)
            assert abs(len(kept) - share) < 1 + 1e-9

    @staticmethod
    def bins(rows, strata):
        """Rows of one length_difference together, in the bin of their middle place."""
        differences = [row["length_difference"] for row in rows]
        found: dict[int, list[int]] = {}
        for n, difference in enumerate(differences):
            before = sum(other < difference for other in differences)
            middle = before + Fraction(differences.count(difference), 2)
            found.setdefault(math.floor(middle * strata / len(rows)), []).append(n)
        return [found[index] for index in sorted(found)]

    def test_of_rows_that_all_differ_are_equal(self):
        rows = pairs(range(23), [(7 * n) % 23 for n in range(23)])
        sizes = filter_pairs(rows, keep_lowest=0.5, length_strata=5).strata
        assert sum(sizes) == 23
        assert set(sizes) == {4, 5}

    def test_are_fewer_where_rows_are_alike(self):
        rows = pairs(range(9), [0, 0, 0, 0, 0, 0, 0, 1, 2])
        assert filter_pairs(rows, keep_lowest=0.5, length_strata=3).strata == (7, 2)
        assert filter_pairs(pairs(range(9)), keep_lowest=0.5, length_strata=3).strata == (9,)

    def test_hold_the_lengths_where_the_measure_follows_them(self):
        differences = list(range(-50, 50))
        rows = pairs([float(d) for d in differences], differences)
        plain = filter_pairs(rows, keep_lowest=0.2)
        binned = filter_pairs(rows, keep_lowest=0.2, length_strata=10)
        mean = {name: r.summary["kept"].mean_lengths["length_difference"] for name, r in (("p", plain), ("b", binned))}
        assert mean["p"] == pytest.approx(-40.5)
        assert abs(mean["b"] - -0.5) < 5
        assert plain.strata == ()

    def test_do_not_change_how_many_are_kept(self):
        rows = pairs(range(100), range(100))
        assert len(filter_pairs(rows, keep_lowest=0.15, length_strata=10).kept) == 15  # ten ceilings would make 20

    def test_leave_out_a_row_without_the_difference(self, rows):
        rows[5]["length_difference"] = None
        result = filter_pairs(rows, keep_lowest=1.0, length_strata=2)
        assert {row.row: row.reason for row in result.unranked} == {
            3: "empty reply", 5: "no length_difference", 11: "empty reply",
        }  # fmt: skip


class TestControl:
    @given(
        values=VALUES.filter(lambda values: any(v is not None for v in values)),
        fraction=FRACTIONS,
        seed=st.integers(0, 9),
    )
    def test_is_as_many_distinct_ranked_rows_in_order(self, values, fraction, seed):
        result = filter_pairs(pairs(values), keep_lowest=fraction, random_control=True, seed=seed)
        control = result.control.tolist()
        assert len(control) == len(result.kept)
        assert control == sorted(set(control))
        assert all(values[n] is not None for n in control)
        assert [record.number for record in result.control_records] == control

    def test_draws_every_ranked_row_alike(self, rows):
        counts = np.zeros(20, int)
        for seed in range(400):
            counts[filter_pairs(rows, keep_lowest=0.25, random_control=True, seed=seed).control] += 1
        assert counts[[3, 11]].tolist() == [0, 0]
        drawn = np.delete(counts, [3, 11])
        assert drawn.sum() == 400 * 5
        assert 70 < drawn.min() <= drawn.max() < 155  # 111 expected, standard deviation 9

    def test_depends_on_the_seed_alone(self, rows):
        one, two, other = (
            filter_pairs(rows, keep_lowest=0.3, random_control=True, seed=seed).control.tolist() for seed in (0, 0, 1)
        )
        assert one == two != other

    def test_is_drawn_only_when_asked_for(self, rows):
        for asked in (None, False):
            result = filter_pairs(rows, keep_lowest=0.3, random_control=asked)
            assert result.control is result.control_records is result.control_output is None
            assert "control" not in result.summary
            with pytest.raises(SettingError, match="random_control=True"):
                _ = result.control_dataset


class TestSummary:
    def test_gives_each_groups_quantiles_and_mean_lengths(self, rows):
        result = filter_pairs(rows, keep_lowest=0.4, random_control=True)
        assert list(result.summary) == ["all", "kept", "dropped", "control"]
        groups = {
            "all": [n for n in range(20) if n not in (3, 11)],
            "kept": result.kept, "dropped": result.dropped, "control": result.control,
        }  # fmt: skip
        for name, members in groups.items():
            group = result.summary[name]
            assert group.num_rows == len(members)
            values = [rows[n]["ln_ches"] for n in members]
            assert group.quantiles == pytest.approx(np.quantile(values, QUANTILES).tolist())
            assert group.mean_lengths == pytest.approx(
                {column: np.mean([rows[n][column] for n in members]) for column in LENGTHS}
            )

    def test_takes_the_lengths_that_are_there(self, rows):
        for row in rows:
            del row["length_chosen"]
        rows[0]["length_rejected"] = None
        means = filter_pairs(rows, keep_lowest=1.0).summary["all"].mean_lengths
        assert means["length_chosen"] is None
        assert means["length_rejected"] == np.mean(
            [row["length_rejected"] for n, row in enumerate(rows) if n not in (0, 3, 11)]
        )


class TestFiles:
    def test_of_json_lines_keep_each_line_to_the_byte(self, scored, lines, tmp_path):
        result = filter_pairs(
            scored, keep_lowest=0.5, output=tmp_path / "deep" / "kept.jsonl", random_control=tmp_path / "control.json"
        )
        written = (tmp_path / "deep" / "kept.jsonl").read_bytes().decode().split("\n")
        assert written == [*(lines[n] for n in result.kept), ""]
        written = (tmp_path / "control.json").read_bytes().decode().split("\n")
        assert written == [*(lines[n] for n in result.control), ""]
        assert (result.output, result.control_output) == (tmp_path / "deep" / "kept.jsonl", tmp_path / "control.json")

    def test_of_parquet_keep_the_types(self, rows, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(rows).append_column("day", pa.array(range(20), pa.date32()))
        pq.write_table(table, tmp_path / "scored.parquet", row_group_size=6)
        result = filter_pairs(
            tmp_path / "scored.parquet", keep_lowest=0.5,
            output=tmp_path / "k.parquet", random_control=tmp_path / "c.jsonl",
        )  # fmt: skip
        assert result.kept.tolist() == filter_pairs(rows, keep_lowest=0.5).kept.tolist()
        assert pq.read_table(tmp_path / "k.parquet").equals(table.take(result.kept))
        control = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
        assert [row["ln_ches"] for row in control] == [rows[n]["ln_ches"] for n in result.control]

    def test_may_come_from_rows_in_memory_or_a_data_set(self, rows, tmp_path):
        import datasets
        import pyarrow.parquet as pq

        kept = [rows[n] for n in filter_pairs(rows, keep_lowest=0.5).kept]
        for data in (rows, datasets.Dataset.from_list(rows)):
            filter_pairs(data, keep_lowest=0.5, output=tmp_path / "k.jsonl")
            assert [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()] == kept
            filter_pairs(data, keep_lowest=0.5, output=tmp_path / "k.parquet")
            assert pq.read_table(tmp_path / "k.parquet").to_pylist() == kept

    def test_are_not_written_when_none_is_named(self, rows, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = filter_pairs(rows, keep_lowest=0.5, random_control=True)
        assert result.output is None
        assert not list(tmp_path.iterdir())

    def test_can_be_filtered_again(self, scored, tmp_path):
        filter_pairs(scored, keep_lowest=0.5, output=tmp_path / "half.jsonl")
        filter_pairs(tmp_path / "half.jsonl", keep_lowest=0.5, output=tmp_path / "quarter.jsonl")
        filter_pairs(scored, keep_lowest=0.25, output=tmp_path / "direct.jsonl")
        assert (tmp_path / "quarter.jsonl").read_bytes() == (tmp_path / "direct.jsonl").read_bytes()

    def test_never_take_the_place_of_the_scored_rows(self, scored, tmp_path):
        content = scored.read_bytes()
        (tmp_path / "link.jsonl").symlink_to(scored)
        for word in ("output", "random_control"):
            for path in (scored, tmp_path / "link.jsonl", tmp_path / "x" / ".." / "scored.jsonl"):
                with pytest.raises(SettingError, match=rf"{word} .* would write over the scored rows, scored\.jsonl"):
                    filter_pairs(scored, keep_lowest=0.5, **{word: path})
        assert scored.read_bytes() == content

    def test_never_go_into_a_folder_of_scored_rows(self, rows, tmp_path):
        import datasets

        (tmp_path / "scored").mkdir()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "scored" / "a.parquet")
        with pytest.raises(SettingError, match="would write over"):
            filter_pairs(tmp_path / "scored", keep_lowest=0.5, output=tmp_path / "scored" / "b.parquet")

    def test_are_two(self, scored, tmp_path):
        for path in (tmp_path / "k.jsonl", str(tmp_path / "x" / ".." / "k.jsonl")):
            with pytest.raises(SettingError, match="output and random_control are both"):
                filter_pairs(scored, keep_lowest=0.5, output=tmp_path / "k.jsonl", random_control=path)

    def test_of_another_format_are_refused(self, scored, tmp_path):
        for word in ("output", "random_control"):
            for name in ("kept", "kept.csv", ""):
                with pytest.raises(SettingError, match=rf"{word} cannot be .*\.jsonl, .*\.parquet"):
                    filter_pairs(scored, keep_lowest=0.5, **{word: name})


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "give one of keep_lowest, drop_highest, below, got none"),
            ({"keep_lowest": 0.1, "below": 3}, "give one of .* got keep_lowest and below"),
            ({"keep_lowest": 0.1, "drop_highest": 0.1, "below": 0}, "got keep_lowest and drop_highest and below"),
            ({"keep_lowest": 0}, "keep_lowest must be above 0 and at most 1, got 0"),
            ({"keep_lowest": 1.01}, "keep_lowest must be .* got 1.01"),
            ({"keep_lowest": math.nan}, "keep_lowest must be .* got nan"),
            ({"drop_highest": 0.0}, "drop_highest must be between 0 and 1, got 0.0"),
            ({"drop_highest": 1.0}, "drop_highest must be between 0 and 1, got 1.0"),
            ({"below": math.nan}, "below must be a finite number, got nan"),
            ({"below": 0, "length_strata": 3}, "below does not rank; use keep_lowest or drop_highest"),
            ({"keep_lowest": 0.5, "length_strata": 1}, "length_strata must be at least 2, got 1"),
            ({"keep_lowest": 0.5, "length_strata": 19}, "length_strata is 19, but only 18 rows are ranked"),
            ({"keep_lowest": 0.5, "seed": -1}, "seed must be at least 0, got -1"),
            ({"keep_lowest": 0.5, "measure": "edit_distance"}, "pairs most at risk; .* -edit_distance"),
            ({"drop_highest": 0.95}, "drop_highest 0.95 drops all 18 ranked rows; lower it"),
            ({"below": -1e6}, r"below -1000000.0 keeps none of the 18 ranked rows: the lowest ln_ches is -\d+\.\d+; "),
        ],
    )  # fmt: skip
    def test_that_do_not_fit_are_refused(self, rows, settings, message):
        with pytest.raises(SettingError, match=message):
            filter_pairs(rows, **settings)

    def test_of_a_measure_that_is_not_there_name_those_that_are(self, scored):
        for measure in ("ches", "-ches"):
            with pytest.raises(
                DataError,
                match=r"scored\.jsonl has no column ches, only these of numbers: ln_ches, length_difference, "
                r"length_chosen, length_rejected\. .*gradsift ches score --measures",
            ):
                filter_pairs(scored, keep_lowest=0.5, measure=measure)
        with pytest.raises(DataError, match=r"memory has no column ln_ches, only these of numbers: none\."):
            filter_pairs([{"id": "a", "ok": True}], keep_lowest=0.5)

    def test_of_strata_need_the_length_difference(self):
        with pytest.raises(DataError, match=r"no column length_difference, only these of numbers: ln_ches\."):
            filter_pairs([{"ln_ches": 1}, {"ln_ches": 2}], keep_lowest=0.5, length_strata=2)

    def test_that_can_rank_no_row_are_refused(self):
        rows = [*pairs([None, None]), pair(2, "x")]
        with pytest.raises(DataError, match=r"none of the 3 rows .* by ln_ches \(empty reply, ln_ches is not a finite"):
            filter_pairs(rows, keep_lowest=0.5)

    def test_are_checked_before_the_rows_are_read(self, tmp_path):
        with pytest.raises(SettingError, match="give one of"):
            filter_pairs(tmp_path / "absent.jsonl")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(datasets|dill|multiprocess|pyarrow|pandas).*")
class TestTraining:
    def test_data_sets_hold_the_same_rows_as_the_files(self, rows, tmp_path):
        for row in rows[::2]:
            row["note"] = "even"
        result = filter_pairs(rows, keep_lowest=0.5, output=tmp_path / "k.jsonl", random_control=True)
        expected = [{**rows[n], "note": rows[n].get("note")} for n in result.kept]
        assert result.dataset.to_list() == expected
        assert result.control_dataset.to_list() == [{**rows[n], "note": rows[n].get("note")} for n in result.control]

    def test_data_sets_of_rows_that_fit_no_table_are_refused(self, rows):
        rows[0]["note"], rows[1]["note"] = "text", {"a": 1}
        with pytest.raises(DataError, match="one table"):
            _ = filter_pairs(rows, keep_lowest=1.0).dataset

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it itself
    @pytest.mark.parametrize("form", ["file", "data set"])
    def test_by_dpo_takes_every_kept_row(self, rows, tiny_model, tiny_tokenizer, tmp_path, form):
        import datasets
        from trl import DPOConfig, DPOTrainer

        result = filter_pairs(rows, keep_lowest=0.5, output=tmp_path / "kept.jsonl")
        if form == "file":
            data = datasets.load_dataset(
                "json", data_files=str(tmp_path / "kept.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
            )
        else:
            data = result.dataset
        trainer = DPOTrainer(
            tiny_model,
            args=DPOConfig(output_dir=str(tmp_path / "run"), report_to="none", bf16=False, use_cpu=True),
            train_dataset=data,
            processing_class=tiny_tokenizer,
        )
        assert len(trainer.train_dataset) == len(result.kept) == 9
