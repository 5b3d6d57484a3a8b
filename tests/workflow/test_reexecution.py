"""Tests that an edit reruns exactly the steps that depend on it: plans of the demo with placeholder results."""

from __future__ import annotations

import os
import shutil

import pytest
import yaml
from checkout import make_checkout, make_results, set_key

DATA = {"fetch_table", "select_samples", "build_shards", "precompute_latents"}
MEASURES = {"sample", "reference_features", "measure", "report"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a working copy with placeholder results of the whole demo."""
    folder = make_checkout(tmp_path_factory.mktemp("finished") / "checkout")
    for key, value in SHORTEN.items():
        set_key(folder, "demo.yaml", key, value)
    make_results(folder)
    return folder


@pytest.fixture
def tree(finished, tmp_path):
    """Return a copy of `finished` that a test may edit."""
    return shutil.copytree(finished, tmp_path / "checkout", symlinks=True)


@pytest.fixture
def plan(plan):
    """Return a function that plans and asserts success."""

    def succeed(*arguments):
        planned = plan(*arguments)
        assert planned.ok, planned.text
        return planned

    return succeed


# The demo's stages, whatever their lengths are in configs/demo.yaml
SHORTEN = {
    "stages/stage1/experiment": {"num_examples_to_see": 32000, "milestones": [0]},
    "stages/stage2/experiment": {"num_examples_to_see": 10000, "milestones": [0]},
}
FIRST, SECOND = {"stage1/0", "stage1/32000"}, {"stage2/0", "stage2/10000"}


def trained(plan) -> set[str]:
    """Return the milestones that are trained again."""
    return {f"{job['wildcards']['stage']}/{job['wildcards']['images']}" for job in plan.of("train")}


def test_finished_run_plans_nothing(tree, plan):
    assert plan(tree).jobs == []


def test_edit_of_the_evaluation_trains_nothing(tree, plan):
    set_key(tree, "demo.yaml", "evaluation/guidance_scale", 3.5)
    after = plan(tree)
    assert {"freeze", "sample", "measure", "report"} <= after.rules <= {"freeze", *MEASURES}
    assert [job["output"] for job in after.of("freeze")] == [["results/runs/demo/config/evaluate.yaml"]]


def test_order_of_keys_and_comments_plan_nothing(tree, plan):
    for name in ("demo.yaml", "data/emoji.yaml", "components.yaml"):
        path = tree / "configs" / name
        values = yaml.safe_load(path.read_text())
        path.write_text("# another comment\n" + yaml.safe_dump(values, sort_keys=True))
    assert plan(tree).jobs == []


def test_explicit_default_plans_nothing(tree, plan):
    set_key(tree, "demo.yaml", "optimizer/params/beta1", 0.9)
    assert plan(tree).jobs == []


def test_edit_of_all_stages_retrains_them_and_keeps_the_data(tree, plan):
    set_key(tree, "demo.yaml", "optimizer/params/beta2", 0.9)
    after = plan(tree)
    assert trained(after) == FIRST | SECOND
    assert not after.rules & {*DATA, "download_component", "fit_alignment"}


def test_edit_of_the_second_stage_keeps_the_first(tree, plan):
    set_key(tree, "demo.yaml", "stages/stage2/optimizer/params/learning_rate", 2.0e-3)
    after = plan(tree)
    assert trained(after) == SECOND
    assert {job["wildcards"]["stage"] for job in after.of("sample")} == {"stage2"}
    assert not after.rules & DATA


def test_edit_of_the_first_stage_retrains_both(tree, plan):
    set_key(tree, "demo.yaml", "stages/stage1/dataset/params/crop", "random")
    assert trained(plan(tree)) == FIRST | SECOND


def test_edit_of_a_data_filter_reruns_the_selection_and_later_steps(tree, plan):
    set_key(tree, "data/emoji.yaml", "select/filters/original_width", ">=128")
    after = plan(tree)
    assert after.rules >= {"select_samples", "build_shards", "precompute_latents", "train", "sample", "report"}
    assert not after.rules & {"fetch_table", "download_component"}


def test_edit_of_the_shards_keeps_the_selection(tree, plan):
    set_key(tree, "data/emoji.yaml", "shards/samples_per_shard", 99)
    after = plan(tree)
    assert after.rules >= {"build_shards", "precompute_latents", "train"}
    assert not after.rules & {"fetch_table", "select_samples"}


def test_new_milestone_reruns_later_milestones(tree, plan):
    set_key(tree, "demo.yaml", "stages/stage1/experiment/milestones", [0, 16000])
    after = plan(tree)
    assert trained(after) == {"stage1/16000", "stage1/32000", *SECOND}
    assert not after.rules & DATA
    measured = {f"{job['wildcards']['stage']}/{job['wildcards']['images']}" for job in after.of("sample")}
    assert measured == trained(after)


def test_edit_of_a_component_reruns_the_steps_that_use_it(tree, plan):
    set_key(tree, "components.yaml", "minilm/settings/tokenizer_config.json/model_max_length", 20)
    after = plan(tree)
    assert {job["wildcards"]["component"] for job in after.of("download_component")} == {"minilm"}
    assert trained(after) == FIRST | SECOND  # because the text states change
    assert after.rules & {*DATA} == {"precompute_latents"}


def test_edit_of_the_partitions_rebuilds_the_shards(tree, plan):
    set_key(tree, "data/emoji.yaml", "shards/parts", 3)
    after = plan(tree)
    parts = {job["output"][0] for job in after.of("build_shards") if job["wildcards"]["split"] == "train"}
    assert parts == {f"results/data/emoji/train/built/{part}-of-3.json" for part in range(3)}
    assert not after.rules & {"fetch_table", "select_samples"}


def test_edit_of_the_latents_keeps_the_images(tree, plan):
    set_key(tree, "data/emoji.yaml", "latents/posterior", "moments")
    after = plan(tree)
    assert after.rules & {*DATA, "gather_shards"} == {"precompute_latents"} and trained(after) == FIRST | SECOND


def test_edit_of_an_unused_component_plans_nothing(tree, plan):
    set_key(tree, "components.yaml", "sd-vae/revision", "0" * 40)
    assert plan(tree).jobs == []


def test_touched_file_of_the_same_content_plans_nothing(tree, plan):
    os.utime(tree / "results/data/emoji/train/shards/manifest.json")
    os.utime(tree / "results/runs/demo/stage1/32000/train.json")
    assert plan(tree).jobs == []


def test_changed_result_reruns_later_steps(tree, plan):
    (tree / "results/runs/demo/stage2/0/train.json").write_text("trained anew\n")
    after = plan(tree)
    assert trained(after) == {"stage2/10000"}
    assert {job["wildcards"]["stage"] for job in after.of("sample")} == {"stage2"}


def test_missing_report_reruns_only_the_report(tree, plan):
    (tree / "results/runs/demo/report.html").unlink()
    assert plan(tree).rules == {"report"}


def test_override_on_the_command_line_counts_as_an_edit(tree, plan):
    after = plan(tree, "--config", "set=evaluation.guidance_scale=3.5")
    assert {"sample", "report"} <= after.rules <= {"freeze", *MEASURES}
    after = plan(tree, "--config", "set=stages.stage2.experiment.num_examples_to_see=12000 system.threads=2")
    assert "stage2/12000" in trained(after)
    assert plan(tree, "--config", "set=system.threads=1").jobs == []  # the same value as in the file


def test_another_run_shares_data_and_components(tree, plan):
    shutil.copy(tree / "configs/demo.yaml", tree / "configs/other.yaml")
    set_key(tree, "other.yaml", "optimizer/params/beta2", 0.9)
    after = plan(tree, "--config", "run=other")
    assert len(after.of("train")) == 4
    assert not after.rules & {*DATA, "download_component", "fit_alignment"}
    assert plan(tree).jobs == []
