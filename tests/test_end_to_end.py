"""Warm-up, build and select, as a user calls them: what comes out is what the definition says."""

import json

import numpy as np
import pytest
import torch

from datastore import Datastore
from less import build_datastore, score, select
from less.adam import update_direction_ref
from less.adapters import adapted_model
from less.checkpoints import find_checkpoints
from less.data import RenderConfig, Renderer, collate, load_targets, open_source
from less.gradients import gradients_ref
from less.influence import influence_scores_ref
from less.models import ParamLayout, load_base_model, load_tokenizer
from less.moments import load_adam_state


def by_definition(model_folder, run, rows, targets, rule):
    """Scores by autograd, a row at a time, and formulas in float64; no projection, no store."""
    base, renderer = load_base_model(model_folder), Renderer(load_tokenizer(model_folder), RenderConfig())
    pool = [renderer.render_record(record) for record in open_source(rows).iter_records()]
    wanted = load_targets(targets, renderer)
    phis, psis, weights = [], [], []
    for checkpoint in find_checkpoints([run]):
        with adapted_model(base, checkpoint.path) as model:
            layout = ParamLayout.of(model)
            state = load_adam_state(checkpoint.path, model, layout)
            gammas, grads = [], []
            for row in range(len(pool)):
                _, blocks = gradients_ref(model, collate(pool, [row]))
                parts = [
                    update_direction_ref(
                        rule, blocks[name], state.m[name].flatten(), state.v[name].flatten(),
                        step=state.step, beta1=state.beta1, beta2=state.beta2, eps=state.eps,
                    )
                    for name in layout.names
                ]  # fmt: skip
                gammas.append(torch.cat(parts, dim=1)[0])
            for row in range(len(wanted.rendered)):
                _, blocks = gradients_ref(model, collate(wanted.rendered, [row]))
                grads.append(torch.cat([blocks[name] for name in layout.names], dim=1)[0])
        phis.append(torch.stack(gammas).numpy())
        psis.append(torch.stack(grads).numpy())
        weights.append(checkpoint.weight)
    subtask_M = [wanted.subtasks.index(name) for name in wanted.subtask_of]
    return influence_scores_ref(phis, psis, weights, subtask_M)


@pytest.mark.parametrize("rule", ["adam", "adam-less", "adam-no-momentum", "sgd", "sign"])
def test_unprojected_scores_equal_the_definition(
    rule, tiny_model_folder, tiny_run, tiny_pool, tiny_rows, tiny_targets, tmp_path
):
    build_datastore(
        model=tiny_model_folder, checkpoints=tiny_run, data=tiny_pool, datastore=tmp_path / "ds",
        update_rule=rule, projection="none", progress=False,
    )  # fmt: skip
    found = score(datastore=tmp_path / "ds", targets=tiny_targets, progress=False)
    expected_NJ = by_definition(tiny_model_folder, tiny_run, tiny_rows, tiny_targets, rule)
    # sign() of a coordinate near zero is noise: one flip among P moves a cosine by 2/P
    bound = 5e-3 if rule == "sign" else 1e-5
    assert np.abs(found.scores_NJ - expected_NJ).max() < bound


def test_the_selection_is_the_top_of_the_scores_with_every_column_kept(
    tiny_store, tiny_rows, tiny_target_file, tmp_path
):
    (selection,) = select(
        datastore=tiny_store, targets=tiny_target_file, fraction=0.2,
        output=tmp_path / "selected.jsonl", scores=tmp_path / "scores.jsonl", progress=False,
    )  # fmt: skip
    selected = [json.loads(line) for line in (tmp_path / "selected.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(selected) == 8 == len(selection.ids)
    assert [line["id"] for line in scores] == [row["id"] for row in tiny_rows]
    best = sorted(scores, key=lambda line: -line["score"])[:8]
    assert [row["id"] for row in selected] == [line["id"] for line in best]
    rows = {row["id"]: row for row in tiny_rows}
    for rank, (row, line) in enumerate(zip(selected, best, strict=True), start=1):
        added = {name: row.pop(name) for name in list(row) if name.startswith("influence_")}
        assert row == rows[row["id"]]
        assert added == {
            "influence_score": line["score"], "influence_rank": rank, "influence_subtask": line["subtask"],
            "influence_reason": f"best for {line['subtask']}",
        }  # fmt: skip
        assert line["rank"] == rank
        assert line["scores"][line["subtask"]] == line["score"] == max(line["scores"].values())
    assert selection.dataset[0]["id"] == best[0]["id"]
    assert Datastore.open(tiny_store).num_rows == len(tiny_rows)
