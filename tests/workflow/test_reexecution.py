"""After an edit exactly what it touches is planned again: the demo's plan, over stand-ins for all of its results."""

from __future__ import annotations

import os
import shutil

import pytest
from checkout import make_checkout, make_results

DATA = {"fetch_table", "select_samples", "build_shards", "precompute_latents"}
MEASURES = {"sample", "reference_features", "frechet_distance", "clip_score", "report"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A working copy in which the whole demo has run."""
    folder = make_checkout(tmp_path_factory.mktemp("finished") / "checkout")
    make_results(folder)
    return folder


@pytest.fixture
def tree(finished, tmp_path):
    """A copy of it to edit."""
    return shutil.copytree(finished, tmp_path / "checkout", symlinks=True)


@pytest.fixture
def plan(plan):
    """As `plan`, and planning must succeed."""

    def succeed(*arguments):
        planned = plan(*arguments)
        assert planned.ok, planned.text
        return planned

    return succeed


def edit(tree, name, old, new):
    """Replace a text that stands once in a configuration."""
    path = tree / "configs" / name
    text = path.read_text()
    assert text.count(old) == 1, f"{name}: {old!r} stands {text.count(old)} times"
    path.write_text(text.replace(old, new))


def trained(plan) -> set[str]:
    """The milestones that are trained again."""
    return {f"{job['wildcards']['stage']}/{job['wildcards']['images']}" for job in plan.of("train")}


def test_after_a_run_nothing_is_planned(tree, plan):
    assert plan(tree).jobs == []


def test_editing_the_evaluation_retrains_nothing(tree, plan):
    edit(tree, "demo.yaml", "guidance_scale: 2.0", "guidance_scale: 3.0")
    after = plan(tree)
    assert {"freeze", "sample", "frechet_distance", "clip_score", "report"} <= after.rules <= {"freeze", *MEASURES}
    assert [job["output"] for job in after.of("freeze")] == [["results/runs/demo/config/evaluate.yaml"]]


def test_order_and_comments_do_nothing(tree, plan):
    path = tree / "configs/demo.yaml"
    blocks = path.read_text().split("\n\n")
    path.write_text("# another comment\n" + "\n\n".join(reversed(blocks)) + "\n")
    edit(
        tree,
        "demo.yaml",
        "    learning_rate: 1.5e-3\n    beta2: 0.99",
        "    beta2: 0.99\n    learning_rate: 0.0015 # as before",
    )
    edit(tree, "data/emoji.yaml", "    column: concept\n    fraction: 0.15", "    fraction: 0.15\n    column: concept")
    assert plan(tree).jobs == []


def test_a_default_written_out_does_nothing(tree, plan):
    edit(tree, "demo.yaml", "    beta2: 0.99\n", "    beta2: 0.99\n    beta1: 0.9\n")
    assert plan(tree).jobs == []


def test_a_key_of_all_stages_trains_again_but_leaves_the_data(tree, plan):
    edit(tree, "demo.yaml", "beta2: 0.99", "beta2: 0.98")
    after = plan(tree)
    assert trained(after) == {"stage1/0", "stage1/32000", "stage2/0", "stage2/10000"}
    assert not after.rules & {*DATA, "download_component", "fit_alignment"}


def test_a_key_of_the_second_stage_leaves_the_first(tree, plan):
    edit(tree, "demo.yaml", "learning_rate: 1.0e-3", "learning_rate: 2.0e-3")
    after = plan(tree)
    assert trained(after) == {"stage2/0", "stage2/10000"}
    assert {job["wildcards"]["stage"] for job in after.of("sample")} == {"stage2"}
    assert not after.rules & DATA


def test_a_key_of_the_first_stage_trains_both(tree, plan):
    edit(tree, "demo.yaml", "{resolution: 64}", "{resolution: 64, crop: random}")
    assert trained(plan(tree)) == {"stage1/0", "stage1/32000", "stage2/0", "stage2/10000"}


def test_a_filter_of_the_data_selects_again_and_all_that_follows(tree, plan):
    edit(tree, "data/emoji.yaml", 'original_width: ">=256"', 'original_width: ">=128"')
    after = plan(tree)
    assert after.rules >= {"select_samples", "build_shards", "precompute_latents", "train", "sample", "report"}
    assert not after.rules & {"fetch_table", "download_component"}


def test_how_shards_are_made_leaves_the_selection(tree, plan):
    edit(tree, "data/emoji.yaml", "samples_per_shard: 256", "samples_per_shard: 128")
    after = plan(tree)
    assert after.rules >= {"build_shards", "precompute_latents", "train"}
    assert not after.rules & {"fetch_table", "select_samples"}


def test_a_new_milestone_is_trained_with_what_follows_it(tree, plan):
    edit(tree, "demo.yaml", "milestones: [0] # the untrained", "milestones: [0, 16000] # the untrained")
    after = plan(tree)
    assert trained(after) == {"stage1/16000", "stage1/32000", "stage2/0", "stage2/10000"}
    assert not after.rules & DATA
    measured = {f"{job['wildcards']['stage']}/{job['wildcards']['images']}" for job in after.of("sample")}
    assert measured == trained(after)


def test_a_component_is_fetched_again_with_what_uses_it(tree, plan):
    edit(tree, "components.yaml", "model_max_length: 16", "model_max_length: 20")
    after = plan(tree)
    assert {job["wildcards"]["component"] for job in after.of("download_component")} == {"minilm"}
    assert trained(after) == {"stage1/0", "stage1/32000", "stage2/0", "stage2/10000"}
    assert not after.rules & DATA


def test_another_component_touches_nothing(tree, plan):
    edit(
        tree,
        "components.yaml",
        "31f26fdeee1355a5c34592e401dd41e45d25a493",
        "0000000000000000000000000000000000000000",
    )
    assert plan(tree).jobs == []


def test_a_touched_file_of_the_same_content_does_nothing(tree, plan):
    os.utime(tree / "results/data/emoji/train/shards/manifest.json")
    os.utime(tree / "results/runs/demo/stage1/32000/train.json")
    assert plan(tree).jobs == []


def test_a_changed_result_is_followed_up(tree, plan):
    (tree / "results/runs/demo/stage2/0/train.json").write_text("trained anew\n")
    after = plan(tree)
    assert trained(after) == {"stage2/10000"}
    assert {job["wildcards"]["stage"] for job in after.of("sample")} == {"stage2"}


def test_a_missing_report_is_made_again_alone(tree, plan):
    (tree / "results/runs/demo/report.html").unlink()
    assert plan(tree).rules == {"report"}


def test_an_override_on_the_command_line_counts_as_an_edit(tree, plan):
    after = plan(tree, "--config", "set=evaluation.guidance_scale=3.0")
    assert {"sample", "report"} <= after.rules <= {"freeze", *MEASURES}
    after = plan(tree, "--config", "set=stages.stage2.experiment.num_examples_to_see=12000 system.threads=2")
    assert "stage2/12000" in trained(after)
    assert plan(tree, "--config", "set=evaluation.guidance_scale=2.0").jobs == []


def test_another_run_shares_data_and_components(tree, plan):
    shutil.copy(tree / "configs/demo.yaml", tree / "configs/other.yaml")
    edit(tree, "other.yaml", "beta2: 0.99", "beta2: 0.95")
    after = plan(tree, "--config", "run=other")
    assert len(after.of("train")) == 4
    assert not after.rules & {*DATA, "download_component", "fit_alignment"}
    assert plan(tree).jobs == []
