"""Tests that every run plans with every profile, offline and without results, and that errors give one message."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest
import yaml
from checkout import ROOT, Plan, make_checkout, set_key, snakemake

RUNS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "components")
PROFILES = ("profiles/local", "slurm")


def trained(plan) -> dict[str, list[int]]:
    """Return the planned milestones by stage."""
    found = {}
    for job in plan.of("train"):
        found.setdefault(job["wildcards"]["stage"], []).append(int(job["wildcards"]["images"]))
    return {stage: sorted(images) for stage, images in found.items()}


def written(tree) -> list[str]:
    """Return the files that planning wrote, without those of Snakemake itself."""
    found = [p for name in ("results", "logs", "resources/components") for p in (tree / name).rglob("*")]
    return sorted(str(p.relative_to(tree)) for p in found)


def test_documented_runs_exist():
    assert {"demo", "sd-v1", "sd-v2-base", "imagenet", "finetune"} <= set(RUNS)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Return a function that plans a whole run with a profile, once, without network and without results."""
    tree = make_checkout(tmp_path_factory.mktemp("planned") / "checkout")

    @functools.cache
    def planned(run: str, profile: str = "profiles/local") -> Plan:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
                patch.setenv(name, "http://127.0.0.1:9")  # no server listens there
            plan = snakemake(tree, "--profile", profile, "--dry-run", "--config", f"run={run}")
        assert plan.ok, plan.text
        assert written(tree) == []
        return plan

    return planned


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("run", RUNS)
def test_every_run_plans_with_every_profile(planned, run, profile):
    plan = planned(run, profile)
    assert {"freeze", "train", "sample", "measure", "report"} <= plan.rules
    counts, launch = LAUNCH[profile]
    for job in plan.of("train"):
        assert job["shellcmd"].startswith(f"{counts}; {launch} workflow/scripts/train.py ")


# Counts and launch line of the trainings by profile
LAUNCH = {
    "profiles/local": (
        "JOB_NODES=1 JOB_TASKS_PER_NODE=2 JOB_CPUS_PER_TASK=2 JOB_GRES=",
        "torchrun --standalone --nproc_per_node $JOB_TASKS_PER_NODE",
    ),
    "slurm": (
        "JOB_NODES=16 JOB_TASKS_PER_NODE=8 JOB_CPUS_PER_TASK=6 JOB_GRES=gpu:8",
        "srun --kill-on-bad-exit --nodes $JOB_NODES --ntasks-per-node $JOB_TASKS_PER_NODE"
        " --cpus-per-task $JOB_CPUS_PER_TASK --gres $JOB_GRES profiles/slurm/rank.sh $(command -v python)",
    ),
}


def test_demo_needs_only_packages(planned):
    demo = planned("demo")
    assert demo.rules >= {"fetch_table", "select_samples", "build_shards", "precompute_latents", "download_component"}
    assert all("text_encoder=resources/components/minilm" in j["shellcmd"] for j in demo.of("precompute_latents"))
    assert {stage: images[0] for stage, images in trained(demo).items()} == {"stage1": 0, "stage2": 0}
    assert {job["wildcards"]["split"] for job in demo.of("build_shards")} == {"train", "held_out"}
    assert "fit_alignment" in demo.rules
    assert "train_autoencoder" not in demo.rules


def test_sd_v2_base_plans_the_full_experiment(planned):
    real = planned("sd-v2-base")
    assert set(trained(real)) == {"stage1", "stage2"}
    by_stage = {stage: [j for j in real.of("train") if j["wildcards"]["stage"] == stage] for stage in trained(real)}
    for stage, resolution in (("stage1", 256), ("stage2", 512)):
        latents = f"results/data/laion-aesthetic/train/latents/sd-vae-{resolution}px/manifest.json"
        assert all(latents in job["input"] for job in by_stage[stage])
    last = f"results/runs/sd-v2-base/stage1/{trained(real)['stage1'][-1]}/train.json"
    first = min(by_stage["stage2"], key=lambda job: int(job["wildcards"]["images"]))
    assert last in first["input"]
    measured = {job["wildcards"]["metric"]: job for job in real.of("measure")}
    for job in [*real.of("reference_features"), measured["frechet_distance"]]:
        assert "resources/components/inception.json" in job["input"]
    assert "resources/components/clip-vit-b32.json" in measured["clip_score"]["input"]
    assert "fit_alignment" not in real.rules
    by_split = {split: {int(j["wildcards"]["part"]) for j in jobs} for split, jobs in grouped(real, "build_shards")}
    assert by_split == {"train": set(range(64)), "held_out": {0}}  # all jobs are known before the first one runs
    assert {len(job["input"]) for job in real.of("gather_shards")} == {1, 64}


def test_existing_shards_are_indexed_in_place(checkout, plan):
    imagenet = plan(checkout, "--config", "run=imagenet", "--", "data")
    assert imagenet.rules == {"freeze", "index_shards", "gather_shards"}


def test_existing_shards_with_filters_are_resharded(checkout, plan):
    (checkout / "configs/data/big.yaml").write_text(BIG)
    chosen = plan(checkout, "--", "results/data/big/train/shards/manifest.json")
    assert chosen.rules >= {"reshard", "gather_shards", "build_shards"} and "index_shards" not in chosen.rules
    assert sorted(list(job["output"]) for job in chosen.of("reshard")) == [
        [f"results/data/big/train/resharded/{part}-of-3.json"] for part in range(3)
    ]
    source = "results/data/emoji/train/shards/manifest.json"  # this workflow makes it, so it is made first
    assert all(source in job["input"] for job in chosen.of("reshard"))
    held_out = plan(checkout, "--", "results/data/big/held_out/shards/manifest.json")
    assert len(held_out.of("reshard")) == 3  # any source shard may contain held-out samples


def test_yields_of_existing_shards_come_from_their_manifest(checkout, plan):
    yields = plan(checkout, "--config", "run=imagenet", "--", "yields")
    assert yields.rules == {"freeze", "index_shards", "gather_shards", "yields"}
    (job,) = yields.of("yields")
    assert "yields=results/data/imagenet/train/shards/manifest.json " in job["shellcmd"]


BIG = """
shards: {path: results/data/emoji/train/shards/manifest.json, parts: 3}
select:
  filters: {original_width: ">=512"}
  held_out: {column: key, fraction: 0.1}
"""


def grouped(plan, rule: str) -> list[tuple[str, list[dict]]]:
    """Return the jobs of a rule by split."""
    jobs = plan.of(rule)
    splits = sorted({job["wildcards"]["split"] for job in jobs})
    return [(split, [job for job in jobs if job["wildcards"]["split"] == split]) for split in splits]


def test_yields_and_verify_are_separate_targets(checkout, plan):
    yields = plan(checkout, "--", "yields")
    assert yields.rules == {"freeze", "fetch_table", "select_samples", "yields"}
    verify = plan(checkout, "--", "verify")
    assert verify.rules >= {"build_shards", "precompute_latents", "verify"} and "train" not in verify.rules
    (job,) = verify.of("verify")
    assert len(job["input"]) == 4  # latents of two resolutions, images of both splits


def test_every_gpu_rule_takes_its_resources_from_the_profile():
    """A rule that needs torch and is submitted to a cluster is a GPU rule."""
    files = [path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk")]
    rules = dict(re.findall(r"^rule (\w+):\n((?:(?: .*)?\n)+)", "".join(files), re.MULTILINE))
    local = {
        name
        for text in files
        for block in re.findall(r"^localrules:\n((?: .*\n)+)", text, re.MULTILINE)
        for name in re.findall(r"\w+", block)
    }
    gpu = {name for name, text in rules.items() if "envs/train.yaml" in text} - local - {"freeze"}
    assert gpu >= {"train", "train_autoencoder", "precompute_latents", "sample", "measure"}
    assert gpu == {name for name, text in rules.items() if "**gpu_job(" in text and "{resources.launch}" in text}
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())["set-resources"]
    assert gpu == {name for name, resources in profile.items() if "gpu" in resources.get("gres", "")}


@pytest.mark.parametrize(
    ("edit", "words", "named"),
    [
        (
            ("demo.yaml", "optimizer/params/learning_rat", 1.0e-3),
            [],
            ["configs/demo.yaml", "did you mean", "learning_rate"],
        ),
        (None, ["--config", "set=optimizer.params.learning_rat=1"], ["learning_rat", "did you mean", "learning_rate"]),
    ],
)
def test_invalid_configuration_ends_planning_with_one_message(checkout, plan, edit, words, named):
    """Other invalid configurations are in tests/unit/orchestration/test_plan.py."""
    if edit:
        set_key(checkout, *edit)
    refused = plan(checkout, *words)
    assert not refused.ok and refused.jobs == [] and "Traceback" not in refused.text
    assert len([line for line in refused.text.splitlines() if all(word in line for word in named)]) == 1, refused.text
    assert written(checkout) == []


@pytest.mark.parametrize("option", ["set-resources", "set-threads"])
def test_settings_of_a_rule_that_does_not_exist_are_refused(checkout, plan, option):
    value = {"set-resources": "measur:mem_mb=1", "set-threads": "measur=1"}[option]
    refused = plan(checkout, f"--{option}", value)
    assert not refused.ok and refused.jobs == []
    assert f"{option}: no rule 'measur'; did you mean measure?; correct the profile" in refused.text


def test_snakemake_exits_with_an_error_for_a_missing_run(checkout):
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--dry-run", "--config", "run=dmo"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "configs/dmo.yaml: no such file" in result.stdout + result.stderr
