"""Tests of train.py as a command: global batches, milestones, stages, open-diffusion's YAML, invalid input."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import csv
from safetensors.torch import load_file
from trainings import SCRIPTS, environment, last_checkpoint, log, losses, part, refused, same, weights

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.fingerprint import freeze_stage
from sdtrain.config.load import OmegaConf, load_config, require
from sdtrain.data import tars
from sdtrain.data.datasets import ImageDataset
from sdtrain.data.stream import batches
from sdtrain.io.files import write_json, write_text
from sdtrain.models.pipeline import generate, load_pipeline
from sdtrain.training.diffusion_task import DiffusionTask, read_captions
from sdtrain.training.loop import train as train_task

RUN = Path("logs/tiny/stage1")
pytestmark = pytest.mark.timeout(600)  # the first test of a group waits for its trainings, on a busy machine too


# ---------------------------------------------------------------- one global batch, shared in different ways
WAYS = {  # of sharing one global batch of 4 images
    "one batch": (["system.batch_size=4"], 1),
    "micro-batches": (["system.gradient_accumulation=2"], 1),
    "derived accumulation": (["system.batch_size=1", "system.global_batch=4"], 1),
    "ranks": ([], 2),
    "sharded ranks": (["distributed.strategy=fsdp"], 2),
    "micro-batches of sharded ranks": (
        ["distributed.strategy=fsdp", "system.batch_size=1", "system.global_batch=4"],
        2,
    ),
}
EXACT = [
    "experiment.milestones=[]",
    "optimizer.params.epsilon=1e-4",
]  # so that no division by a tiny number amplifies rounding errors


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory, train, stage_yaml) -> Path:
    """Return the folder of a training of 4 steps, each on one undivided batch."""
    folder = tmp_path_factory.mktemp("one_batch")
    result = train(folder, f"config={stage_yaml}", *EXACT, *WAYS["one batch"][0])
    assert result.codes == [0], result.text
    return folder / RUN


def alike(run: Path, expected: Path, tolerance: float = 1e-4) -> None:
    """Assert equal logs and weights, up to the rounding errors of sums in another order."""
    for x, y in zip(log(run), log(expected), strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert x[key] == pytest.approx(y[key], rel=tolerance, abs=1e-6), key
    for name in ("unet", "ema"):
        a, b = (part(last_checkpoint(r), name) for r in (run, expected))
        assert same(a, b, atol=tolerance / 10, rtol=tolerance)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one batch"])
def test_ranks_micro_batches_and_sharding_do_not_change_the_training(one_batch, tmp_path, train, stage_yaml, way):
    options, ranks = WAYS[way]
    result = train(tmp_path, f"config={stage_yaml}", *EXACT, *options, ranks=ranks)
    assert result.codes == [0] * ranks, result.text
    assert [line["images"] for line in log(tmp_path / RUN)] == [4, 8, 12, 16]
    assert [line["lr"] for line in log(tmp_path / RUN)] == [5e-4, 1e-3, 1e-3, 1e-3]  # warm-up counts optimizer steps
    saved = {int(path.parent.name) for path in (tmp_path / RUN).glob("checkpoints/*/*/.metadata")}
    assert saved == {8, 16}  # save_every=2 counts optimizer steps too, and keep_checkpoints=2 keeps the last two
    alike(tmp_path / RUN, one_batch)
    whole = [weights(run / "pipeline") for run in (tmp_path / RUN, one_batch)]
    assert same(*whole, atol=1e-5, rtol=1e-4)


SWITCHES = {
    "memory format": ["system.channels_last=true"],
    "unfused optimizer": ["optimizer.fused=false"],
    "recomputation": ["model.gradient_checkpointing=true"],
    "attention": ["model.attention=math"],
    "no prefetching": ["dataset.params.prefetch=0"],
    "loader processes": ["system.workers=2"],
    "xformers on a CPU": ["model.xformers=true"],
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_speed_settings_do_not_change_the_weights(one_batch, tmp_path, train, stage_yaml, switch):
    result = train(tmp_path, f"config={stage_yaml}", *EXACT, "system.batch_size=4", *SWITCHES[switch])
    assert result.codes == [0], result.text
    alike(tmp_path / RUN, one_batch)
    records = [json.loads((run / "16/train.json").read_text()) for run in (tmp_path / RUN, one_batch)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]


def test_log_has_loss_throughput_mfu_memory_and_gradient_norm(tmp_path, train, stage_yaml):
    options = ["system.peak_tflops=0.001", "experiment.log_every=8", "experiment.milestones=[]"]
    result = train(tmp_path, f"config={stage_yaml}", *options, ranks=2)
    assert result.codes == [0, 0], result.text
    entry = json.loads((tmp_path / RUN / "log.jsonl").read_text().splitlines()[-1])
    quartiles = [entry[key] for key in entry if key.startswith("loss_q")]
    assert len(quartiles) >= 2 and min(quartiles) <= entry["loss"] <= max(quartiles)
    assert entry["images_per_second"] == pytest.approx(2 * entry["images_per_second_per_gpu"], rel=1e-4)
    assert 0 < entry["mfu"] and 0 <= entry["data_wait"] <= 1 and entry["memory_gb"] > 0.1 and entry["grad_norm"] > 0


def test_system_threads_sets_the_threads_of_torch(tmp_path, stage_values):
    """Use a training that is already finished: it sets the threads and ends."""
    options = ["system.threads=3", f"experiment.log_dir={tmp_path}"]
    cfg, before = load_config(schema.StageConfig, values=stage_values, overrides=options), torch.get_num_threads()
    task = DiffusionTask(cfg)
    write_json(tmp_path / "tiny/stage1/16/train.json", {"fingerprint": task.identify(2).key})
    try:
        assert train_task(task, distributed.world({}), torch.device("cpu"), stop=None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_bf16_losses_are_close_to_those_of_float32(one_batch, tmp_path, train, stage_yaml):
    result = train(tmp_path, f"config={stage_yaml}", *EXACT, "system.batch_size=4", "model.mixed_precision=bf16")
    assert result.codes == [0], result.text
    assert losses(tmp_path / RUN) == pytest.approx(losses(one_batch), rel=0.03)
    assert losses(tmp_path / RUN) != losses(one_batch)
    assert {w.dtype for w in weights(tmp_path / RUN / "pipeline").values()} == {torch.float32}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_samples_of_one_process(image_shards, world_size):
    def samples(size, rank, batch_size, count):
        dataset = ImageDataset(str(image_shards / "manifest.json"), 32, flip=True, seed=0)
        stream = batches(dataset, batch_size, rank=rank, world_size=size)
        return [next(stream) for _ in range(count)]

    alone = samples(1, 0, 4, 12)  # more than one epoch of 41
    shared = [samples(world_size, rank, 4 // world_size, 12) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert batch["key"] == [key for rank in shared for key in rank[step]["key"]]
        assert torch.equal(batch["pixels"], torch.cat([rank[step]["pixels"] for rank in shared]))


# ---------------------------------------------------------------- milestones
def freeze(folder: Path, stage_values: dict, *overrides: str) -> str:
    """Write the frozen configuration of a stage as the workflow does; return its path."""
    stage = require(load_config(schema.StageConfig, values=stage_values, overrides=overrides), "test")
    path = folder / "train.yaml"
    write_text(path, yaml.safe_dump(OmegaConf.to_container(freeze_stage(stage), resolve=True)))
    return str(path)


@pytest.fixture(scope="module")
def frozen_yaml(stage_values, tmp_path_factory) -> str:
    """Return the path of the unchanged stage, frozen."""
    return freeze(tmp_path_factory.mktemp("frozen"), stage_values)


@pytest.fixture(scope="module")
def by_milestones(tmp_path_factory, train, frozen_yaml) -> Path:
    """Return a folder in which jobs like those of the workflow have trained to 0, 8 and 16 images."""
    folder = tmp_path_factory.mktemp("milestones")
    for images in (0, 8, 16):
        done = [m for m in (0, 8, 16) if m <= images]
        result = train(folder, f"config={frozen_yaml}", f"experiment.stop_at={images}", f"experiment.milestones={done}")
        assert result.codes == [0], result.text
    return folder


def test_each_milestone_writes_a_pipeline_and_a_record(by_milestones):
    run = by_milestones / RUN
    for images in (0, 8, 16):
        record = json.loads((run / f"{images}/train.json").read_text())
        assert record["images"] == images and record["samples"] == 41
        assert (by_milestones / record["pipeline"] / "model_index.json").exists()
    assert (run / "pipeline").resolve() == (run / "16/pipeline").resolve()
    assert not same(weights(run / "0/pipeline"), weights(run / "8/pipeline"))
    assert not same(weights(run / "8/pipeline"), weights(run / "16/pipeline"))
    assert [line["images"] for line in log(run)] == list(range(2, 17, 2))


def test_milestones_do_not_change_the_weights(by_milestones, tmp_path, train, stage_yaml):
    result = train(tmp_path, f"config={stage_yaml}")
    assert result.codes == [0], result.text
    assert same(weights(by_milestones / RUN / "pipeline"), weights(tmp_path / RUN / "pipeline"))
    assert log(by_milestones / RUN) == log(tmp_path / RUN)


def forget(folder: Path, images: int) -> None:
    """Delete the result of a milestone, as Snakemake does before it runs the rule again."""
    shutil.rmtree(folder / RUN / f"{images}/pipeline")
    (folder / RUN / f"{images}/train.json").unlink()


def test_finished_milestone_without_a_record_is_exported_again(by_milestones, tmp_path, train, frozen_yaml):
    """A job may finish after Snakemake was killed; its training must not be lost."""
    folder = shutil.copytree(by_milestones, tmp_path / "again", symlinks=True)
    before = weights(folder / RUN / "16/pipeline")
    forget(folder, 16)
    result = train(folder, f"config={frozen_yaml}", "experiment.stop_at=16", "experiment.milestones=[0,8,16]")
    assert result.codes == [0] and "steps 8 to 8 of 8" in result.text, result.text
    assert same(before, weights(folder / RUN / "16/pipeline")) and log(folder / RUN) == log(by_milestones / RUN)


def test_finished_milestone_of_other_code_is_trained_again(by_milestones, tmp_path, train, frozen_yaml):
    folder = shutil.copytree(by_milestones, tmp_path / "again", symlinks=True)
    before = weights(folder / RUN / "16/pipeline")
    forget(folder, 16)
    (mark,) = folder.glob("logs/tiny/stage1/checkpoints/*/16.done")
    mark.write_text("other code")
    result = train(folder, f"config={frozen_yaml}", "experiment.stop_at=16", "experiment.milestones=[0,8,16]")
    assert result.codes == [0], result.text
    assert "resumed at 8 images" in result.text and "steps 4 to 8 of 8" in result.text
    assert same(before, weights(folder / RUN / "16/pipeline"))


def test_edit_that_changes_no_weights_trains_nothing(by_milestones, tmp_path, train, stage_values):
    folder = shutil.copytree(by_milestones, tmp_path / "edited", symlinks=True)
    forget(folder, 16)
    changed = freeze(tmp_path, stage_values, "experiment.save_every=3", "system.batch_size=1", "system.global_batch=2")
    result = train(folder, f"config={changed}", "experiment.stop_at=16", "experiment.milestones=[0,8,16]")
    assert result.codes == [0] and "steps 8 to 8 of 8" in result.text, result.text


def test_edit_that_changes_weights_trains_from_the_start(by_milestones, tmp_path, train, stage_values):
    folder = shutil.copytree(by_milestones, tmp_path / "edited", symlinks=True)
    changed = freeze(tmp_path, stage_values, "optimizer.params.learning_rate=0.002")
    result = train(folder, f"config={changed}", "experiment.stop_at=8", "experiment.milestones=[0,8]")
    assert result.codes == [0] and "steps 0 to 4 of 8" in result.text, result.text


def test_other_number_of_ranks_needs_the_same_global_batch(by_milestones, tmp_path, train, stage_values):
    folder = shutil.copytree(by_milestones, tmp_path / "more", symlinks=True)
    forget(folder, 16)
    last = ("experiment.stop_at=16", "experiment.milestones=[0,8,16]")
    result = train(folder, f"config={freeze(tmp_path, stage_values)}", *last, ranks=2)
    refused(result, "global batch of 2 images", "launch has 4", "system.global_batch=2", "experiment.requeue=false")
    fitting = freeze(tmp_path, stage_values, "system.batch_size=1", "system.global_batch=2")
    result = train(folder, f"config={fitting}", *last, ranks=2)
    assert result.codes == [0, 0] and "resumed at 16 images" in result.text, result.text


def test_folder_of_another_training_is_refused(by_milestones, tmp_path, train, stage_yaml):
    folder = shutil.copytree(by_milestones, tmp_path / "other", symlinks=True)
    other = (f"config={stage_yaml}", "optimizer.params.learning_rate=0.002", "dataset.params.flip=false")
    before = sorted(folder.rglob("*"))
    named = ("dataset.params.flip", "optimizer.params.learning_rate", "experiment.name", "experiment.requeue=false")
    refused(train(folder, *other), *named)
    assert sorted(folder.rglob("*")) == before
    result = train(folder, *other, "experiment.requeue=false", "experiment.stop_at=4")
    assert result.codes == [0] and "steps 0 to 2 of 8" in result.text, result.text


def test_requeue_false_trains_from_the_start(tmp_path, train, stage_yaml):
    for images in (4, 8, 8):
        arguments = (f"config={stage_yaml}", f"experiment.stop_at={images}", "experiment.requeue=false")
        result = train(tmp_path, *arguments, "experiment.milestones=[]")
        assert result.codes == [0] and f"steps 0 to {images // 2} of 8" in result.text, result.text


def test_override_of_a_frozen_stage_trains_in_a_separate_folder(by_milestones, tmp_path, train, frozen_yaml):
    folder = shutil.copytree(by_milestones, tmp_path / "trial", symlinks=True)

    def state():
        files = sorted(p for p in (folder / RUN).rglob("*") if p.is_file())
        return [(p, p.stat().st_mtime_ns) for p in files], os.readlink(folder / RUN / "pipeline")

    before = state()
    result = train(folder, f"config={frozen_yaml}", "optimizer.params.learning_rate=0.002", "experiment.stop_at=4")
    assert result.codes == [0], result.text
    (trial,) = folder.glob("logs/tiny/stage1-trial-*")
    assert (trial / "4/train.json").exists() and (trial / "pipeline/unet").exists()
    assert state() == before


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_second_stage_starts_from_the_weights_of_the_first(by_milestones, tmp_path, train, stage_yaml, which):
    first = by_milestones / RUN / "16/pipeline"
    second = [f"init={first}", f"init_weights={which}", "dataset.params.resolution=48", "experiment.milestones=[]"]
    result = train(tmp_path, f"config={stage_yaml}", *second, "experiment.stop_at=0", "experiment.name=stage2")
    assert result.codes == [0], result.text
    run = tmp_path / "logs/tiny/stage2"
    record = json.loads((run / "0/train.json").read_text())
    assert record["sources"]["init"] == json.loads((first.parent / "train.json").read_text())["fingerprint"]
    raw = load_file(first / "unet_raw/diffusion_pytorch_model.safetensors")
    assert not same(weights(first), raw)
    assert same({"ema": weights(first), "raw": raw}[which], weights(run / "0/pipeline"))
    assert same(part(last_checkpoint(by_milestones / RUN), "unet"), raw)
    assert same(part(last_checkpoint(by_milestones / RUN), "ema"), weights(first))


def test_exported_sample_size_is_that_of_the_training(tmp_path, train, stage_yaml):
    """open-diffusion's template sets sample_size 32 and trains at 512 px, where 64 is right."""
    result = train(tmp_path, f"config={stage_yaml}", "dataset.params.resolution=64", "experiment.stop_at=0")
    assert result.codes == [0] and "model.unet.params.sample_size" in result.text, result.text
    unet = json.loads((tmp_path / RUN / "pipeline/unet/config.json").read_text())
    assert unet["sample_size"] == 32  # the tiny autoencoder halves the side


def test_ema_can_start_from_other_weights(by_milestones, tmp_path, train, stage_yaml):
    first = by_milestones / RUN / "16/pipeline"
    result = train(tmp_path, f"config={stage_yaml}", f"model.ema.path={first}", "experiment.stop_at=0")
    assert result.codes == [0], result.text
    assert same(weights(tmp_path / RUN / "pipeline"), weights(first))


# ---------------------------------------------------------------- samples at each save
def test_other_initial_weights_are_refused_in_the_same_folder(by_milestones, tmp_path, train, stage_yaml):
    first = shutil.copytree(by_milestones / RUN / "16/pipeline", tmp_path / "plain", symlinks=False)
    arguments = (f"config={stage_yaml}", "experiment.milestones=[]")
    assert train(tmp_path, *arguments, "experiment.stop_at=4").codes == [0]
    refused(train(tmp_path, *arguments, f"init={first}"), "the fingerprint of init", "experiment.requeue=false")


def test_sharded_half_precision_flow_matching_trains_and_draws(tmp_path, train, stage_yaml):
    (tmp_path / "captions.txt").write_text("a red square\n")
    scheduler = ["model.scheduler.target=DPMSolverMultistepScheduler"]
    scheduler += ["model.scheduler.params={prediction_type: flow_prediction, use_flow_sigmas: true}"]
    options = [*EXACT, *scheduler, "experiment.eval_caption_file=captions.txt", "experiment.eval_steps=2"]
    found = {}
    for strategy in ("ddp", "fsdp"):
        (tmp_path / strategy).mkdir()
        shutil.copy(tmp_path / "captions.txt", tmp_path / strategy)
        more = [f"distributed.strategy={strategy}", "model.mixed_precision=bf16"]
        result = train(tmp_path / strategy, f"config={stage_yaml}", *options, *more, ranks=2)
        assert result.codes == [0, 0], result.text
        assert (tmp_path / strategy / RUN / "samples/16.png").exists()
        found[strategy] = losses(tmp_path / strategy / RUN)
        whole = weights(tmp_path / strategy / RUN / "pipeline")
        assert {w.dtype for w in whole.values()} == {torch.float32}
    assert found["fsdp"] == pytest.approx(found["ddp"], rel=0.03)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_draw_samples_at_each_checkpoint(tmp_path, train, stage_yaml, strategy):
    (tmp_path / "captions.txt").write_text("a red square\n\na small blue circle\na green circle\nnot asked for\n")
    options = ["experiment.eval_caption_file=captions.txt", "experiment.num_eval_images=3", "experiment.eval_steps=2"]
    options += [f"distributed.strategy={strategy}", "experiment.milestones=[]", "experiment.save_every=2"]
    result = train(tmp_path, f"config={stage_yaml}", *options, ranks=2)
    assert result.codes == [0, 0], result.text
    drawn = {path.stem: Image.open(path).convert("RGB") for path in (tmp_path / RUN / "samples").iterdir()}
    assert sorted(drawn) == ["16", "8"] and {image.size for image in drawn.values()} == {(64, 64)}
    pipe = load_pipeline(tmp_path / RUN / "pipeline")
    seed = {"guidance_scale": 5.0, "steps": 2, "seed": 0, "batch_size": 1}
    expected = list(generate(pipe, ["a red square", "a small blue circle", "a green circle"], 32, **seed))
    for i, box in enumerate([(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64)]):
        found, wanted = (np.asarray(image, np.int16) for image in (drawn["16"].crop(box), expected[i]))
        assert np.abs(found - wanted).max() <= 2
    assert np.asarray(drawn["8"]).tolist() != np.asarray(drawn["16"]).tolist()


def test_eval_captions_can_be_a_column_of_a_csv_file(tmp_path, stage_values):
    """open-diffusion's file is a CSV with the columns uid and caption."""
    (tmp_path / "captions.csv").write_text('uid,caption\n1,"a red, square"\n2,\n3,a circle\n')
    values = {"log_dir": "", "project": "", "name": "", "eval_caption_file": f"{tmp_path}/captions.csv"}
    experiment = load_config(schema.ExperimentConfig, values=values)
    assert read_captions(experiment) == ["a red, square", "a circle"]


@pytest.mark.parametrize("text", [None, "\n \n"])
def test_missing_eval_captions_are_an_error_at_the_start(tmp_path, train, stage_yaml, text):
    if text is not None:
        (tmp_path / "captions.txt").write_text(text)
    result = train(tmp_path, f"config={stage_yaml}", "experiment.eval_caption_file=captions.txt")
    refused(result, "experiment.eval_caption_file", "captions.txt")


# ---------------------------------------------------------------- low-rank additions
def test_only_low_rank_additions_are_trained_and_exported(by_milestones, tmp_path, train, stage_values):
    base = shutil.copytree(by_milestones / RUN / "16/pipeline", tmp_path / "base", symlinks=False)
    model = {
        "pretrained": str(base),
        "lora": {"rank": 2},
        "use_ema": True,
    }  # open-diffusion's local fine-tuning
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump({**stage_values, "model": model}))
    result = train(tmp_path, "config=lora.yaml", "experiment.milestones=[]", ranks=2)
    assert result.codes == [0, 0], result.text
    run = tmp_path / RUN
    assert all("lora" in name for name in part(last_checkpoint(run), "unet"))
    assert not same(weights(base), weights(run / "pipeline"))
    pipe = load_pipeline(base)
    pipe.load_lora_weights(run / "pipeline/lora")
    seed = {"guidance_scale": 2.0, "steps": 2, "seed": 0, "batch_size": 1}
    pair = [next(generate(p, ["a red square"], 32, **seed)) for p in (pipe, load_pipeline(run / "pipeline"))]
    difference = np.abs(np.asarray(pair[0], np.int16) - np.asarray(pair[1], np.int16))
    assert difference.max() <= 2


# ---------------------------------------------------------------- latents with states of the captions
@pytest.fixture(scope="module")
def on_latents(train, latents, stage_yaml, text_parts, tmp_path_factory):
    """Return a function that trains on the latents `name` with a caption dropout and returns the folder."""
    done = {}

    def trained(name: str, dropout: float) -> Path:
        if (name, dropout) not in done:
            folder = done[name, dropout] = tmp_path_factory.mktemp("on_latents")
            options = [f"dataset.params.path={latents[name]}", f"objective.caption_dropout={dropout}"]
            options += [f"model.{part}.pretrained={text_parts}" for part in ("vae", "text_encoder", "tokenizer")]
            options += ["dataset.type=LatentDataset", "experiment.milestones=[]", "optimizer.params.epsilon=1e-4"]
            result = train(folder, f"config={stage_yaml}", *options)
            assert result.codes == [0], result.text
        return done[name, dropout] / RUN

    return trained


def test_cached_text_states_give_the_losses_of_online_encoding(on_latents):
    online, cached = losses(on_latents("online", 0.5)), losses(on_latents("cached", 0.5))
    assert len(online) == 8 and cached == pytest.approx(online, rel=1e-4)  # the cached states are float16
    assert losses(on_latents("cached", 0.0)) != pytest.approx(online, rel=1e-4)  # captions and dropout have an effect


def test_cached_text_states_have_no_effect_if_all_captions_are_dropped(on_latents):
    cached, permuted, online = (
        part(last_checkpoint(on_latents(n, 1.0)), "unet") for n in ("cached", "permuted", "online")
    )
    assert same(cached, permuted)
    assert same(cached, online, atol=5e-5, rtol=1e-3)
    kept = [part(last_checkpoint(on_latents(name, 0.0)), "unet") for name in ("cached", "permuted")]
    assert not same(*kept)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae"])
def test_latents_of_another_network_are_refused(tmp_path, train, latents, stage_yaml, text_parts, part):
    other = shutil.copytree(text_parts, tmp_path / "other")
    write_json(f"{other}.json", {"fingerprint": "00000000000000bb"})
    options = ["dataset.type=LatentDataset", f"dataset.params.path={latents['cached']}"]
    result = train(tmp_path, f"config={stage_yaml}", *options, f"model.{part}.pretrained={other}")
    refused(result, f"model.{part}", str(other), "00000000000000bb", "00000000000000aa", str(latents["cached"]))


# ---------------------------------------------------------------- open-diffusion's template
TEMPLATE = """
wandb:
    api_key: ???
    # entity: ??? # necessary for a project group

system:
    gradient_accumulation: 1
    batch_size: 32
    workers: 6
    dist_backend: ${distributed.dist_backend}
    dist_url: ${distributed.dist_url}

distributed:
    dist_backend: 'nccl'
    dist_url: 'env://'

experiment:
    log_dir: ???
    name: ???
    project: ???
    num_examples_to_see: ???

    save_only_most_recent: True
    save_every: 2000
    requeue: True

optimizer:
    name: adamw
    params:
        learning_rate: 0.0001
        beta1: 0.9
        beta2: 0.98
        weight_decay: 0.01
        epsilon: 0.00000001

model:
    vae:
        pretrained: ???

    text_encoder:
        pretrained: ???

    tokenizer:
        pretrained: ???

    scheduler:
        pretrained: ???

    unet:
        target: UNet2DConditionModel
        params:
            act_fn: "silu"
            attention_head_dim: 8
            block_out_channels: [320, 640, 1280, 1280]
            center_input_sample: False
            cross_attention_dim: 768
            down_block_types: ["CrossAttnDownBlock2D","CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
            downsample_padding: 1
            flip_sin_to_cos: true
            freq_shift: 0
            in_channels: 4
            layers_per_block: 2
            mid_block_scale_factor: 1
            norm_eps: 1e-05
            norm_num_groups: 32
            out_channels: 4
            sample_size: 32
            up_block_types: [
                "UpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D"
            ]

    use_ema: False
    mixed_precision: bf16
    gradient_checkpointing: True
    xformers: True

dataset:
    type: WebDataset
    params:
        path: ???
        batch_size: ${system.batch_size}
        workers: ${system.workers}
        num_examples_to_see: ${experiment.num_examples_to_see}
        resolution: 512

        filters: # optional metadata filters
            # original_width: ">=512"
            # original_height: ">=512"
            pwatermark: "<=0.5"


lr_scheduler:
    scheduler: "ConstantWithWarmup"
    params:
        learning_rate: ${optimizer.params.learning_rate}
        warmup_length: 500
"""
SMALLER = {  # reduces the model of the template, so that a CPU can train it
    "[320, 640, 1280, 1280]": "[16, 16, 16, 32]",
    "cross_attention_dim: 768": "cross_attention_dim: 32",
    "norm_num_groups: 32": "norm_num_groups: 8",
    "layers_per_block: 2": "layers_per_block: 1",
}
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def template_run(tmp_path_factory, tiny_parts, image_shards) -> tuple[Path, str]:
    """Train the template, with every ??? set by an override, on shards in brace notation; return folder and output."""
    folder, text = tmp_path_factory.mktemp("template"), TEMPLATE
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "template.yaml").write_text(text)
    filled = {f"model.{part}.pretrained": tiny_parts for part in ("vae", "text_encoder", "tokenizer", "scheduler")}
    filled |= {"wandb.api_key": SECRET, "experiment.log_dir": "logs", "experiment.project": "open-diffusion"}
    filled |= {"experiment.name": "template", "experiment.num_examples_to_see": 4}
    filled |= {"dataset.params.path": f"{image_shards}/{{00000..00002}}.tar"}
    smaller = {"system.batch_size": 2, "system.workers": 2, "dataset.params.resolution": 32}
    arguments = [f"{key}={value}" for key, value in (filled | smaller).items()]
    command = [sys.executable, "-u", str(SCRIPTS / "train.py"), "config=template.yaml", *arguments]
    env = environment(WANDB_MODE="offline")
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout + result.stderr


def test_open_diffusion_template_trains(template_run):
    folder, text = template_run
    record = json.loads((folder / "logs/open-diffusion/template/4/train.json").read_text())
    assert record["samples"] == 25 and record["dropped"] == {"filters": 16}  # pwatermark <= 0.5
    assert record["steps"] == 2
    assert "model.xformers: needs CUDA" in text


def test_open_diffusion_template_exports_a_pipeline(template_run):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(template_run[0] / "logs/open-diffusion/template/pipeline")
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    image = pipe("a red circle", num_inference_steps=2, height=32, width=32, generator=rng).images[0]
    assert image.size == (32, 32)


def test_wandb_records_offline_and_no_file_holds_the_key(template_run):
    folder, text = template_run
    assert list(folder.glob("logs/open-diffusion/template/wandb/offline-run-*/*.wandb"))
    assert SECRET not in text
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "template.yaml":
            assert SECRET.encode() not in path.read_bytes(), path


# ---------------------------------------------------------------- invalid input
def broken_shards(image_shards: Path, folder: Path, how: str) -> Path:
    """Copy the shards without the second one, or with the second one truncated."""
    copy = shutil.copytree(image_shards, folder / "shards")
    shard = copy / "00001.tar"
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    return copy


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("notation", ["manifest.json", "{00000..00002}.tar"])
def test_a_broken_shard_is_refused(tmp_path, train, stage_yaml, image_shards, notation, how):
    shards = broken_shards(image_shards, tmp_path, how)
    result = train(tmp_path, f"config={stage_yaml}", f"dataset.params.path={shards}/{notation}")
    refused(result, str(shards / "00001.tar"), "rebuild")
    assert not list(tmp_path.rglob("train.json")) and not list(tmp_path.rglob("pipeline*"))


MISTAKES = {
    "an unknown key": (["optimizer.params.learning_rat=1"], ["learning_rat", "did you mean", "learning_rate"]),
    "a malformed predicate": (["dataset.params.filters.pwatermark='=>1'"], ["pwatermark", "=>1"]),
    "filters that keep no sample": (["dataset.params.filters.pwatermark='>5'"], ["no sample", "41", "filters"]),
    "components that do not fit": (
        ["model.unet.params.cross_attention_dim=64"],
        ["model.unet.params.cross_attention_dim", "32"],
    ),
    "no such component": (["model.vae.pretrained=./nowhere"], ["model.vae.pretrained", "./nowhere"]),
    "no such shards": (["dataset.params.path=nowhere.json"], ["nowhere.json", "no such manifest"]),
    "no such initial weights": (["init=nowhere/pipeline"], ["init", "nowhere/pipeline"]),
    "heads that do not divide the channels": (
        ["model.unet.params.attention_head_dim=3"],
        ["model.unet.params.attention_head_dim", "3", "16"],
    ),
    "latents of another depth": (["model.unet.params.in_channels=8"], ["model.unet.params.in_channels", "8", "4"]),
    "a size that cannot be halved": (["dataset.params.resolution=33"], ["dataset.params.resolution", "33", "32"]),
    "an indivisible global batch": (
        ["system.batch_size=2", "system.global_batch=5"],
        ["system.global_batch", "5", "system.batch_size=2"],
    ),
    "a batch of no images": (["system.batch_size=0"], ["system.batch_size", "0"]),
    "automatic batch size without a GPU": (["system.batch_size=auto"], ["system.batch_size", "auto", "GPU"]),
    "automatic batch size with fsdp": (
        ["system.batch_size=auto", "distributed.strategy=fsdp"],
        ["system.batch_size", "auto", "distributed.strategy=ddp"],
    ),
    "a wait longer than the timeout": (["experiment.wait_minutes=30"], ["experiment.wait_minutes", "timeout_minutes"]),
    "a decay of one": (["optimizer.params.beta1=1"], ["optimizer.params.beta1", "less than 1"]),
    "sharding over one rank": (["distributed.strategy=fsdp"], ["distributed.strategy", "ddp"]),
    "LoRA with fsdp": (
        ["distributed.strategy=fsdp", "model.lora.rank=2"],
        ["model.lora", "distributed.strategy=ddp"],
    ),
    "flow with SNR weights": (
        [
            "objective.snr_gamma=5",
            "model.scheduler.target=DPMSolverMultistepScheduler",
            "model.scheduler.params={prediction_type: flow_prediction, use_flow_sigmas: true}",
        ],
        ["objective.snr_gamma", "flow"],
    ),
    "noise prediction at zero terminal SNR": (
        ["model.scheduler.params={rescale_betas_zero_snr: true}"],
        ["model.scheduler", "epsilon", "v_prediction"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_settings_end_with_one_message(tmp_path, train, stage_yaml, mistake):
    arguments, named = MISTAKES[mistake]
    refused(train(tmp_path, f"config={stage_yaml}", *arguments), *named)
    assert not list(tmp_path.rglob("train.json")) and not list(tmp_path.rglob("*.distcp"))


def test_unset_required_keys_are_named(tmp_path, train, stage_values):
    experiment = {**stage_values["experiment"], "project": "???", "num_examples_to_see": "???"}
    (tmp_path / "open.yaml").write_text(yaml.safe_dump({**stage_values, "experiment": experiment}))
    result = train(tmp_path, "config=open.yaml")
    refused(result, "open.yaml", "???", "experiment.project", "experiment.num_examples_to_see")
    assert [p.name for p in tmp_path.iterdir()] == ["open.yaml"]


def test_nccl_without_cuda_is_refused_by_every_rank(tmp_path, train, stage_yaml):
    result = train(tmp_path, f"config={stage_yaml}", "distributed.dist_backend=nccl", ranks=2)
    refused(result, "distributed.dist_backend", "gloo")
    assert not (tmp_path / "logs").exists()


def test_unreadable_checkpoint_is_refused_and_not_deleted(by_milestones, tmp_path, train, frozen_yaml):
    folder = shutil.copytree(by_milestones, tmp_path / "damaged", symlinks=True)
    (kept,) = folder.glob("logs/tiny/stage1/checkpoints/*/16")
    for file in kept.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    (folder / RUN / "16/train.json").unlink()
    result = train(folder, f"config={frozen_yaml}", "experiment.stop_at=16", "experiment.milestones=[0,8,16]")
    refused(result, str(kept.relative_to(folder)), "unreadable checkpoint", "delete it")
    assert not (folder / RUN / "16/train.json").exists()


def test_a_second_trainer_in_one_folder_is_refused(by_milestones, train, frozen_yaml):
    before = sorted(by_milestones.rglob("*"))
    with open(by_milestones / RUN / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a running trainer does
        result = train(by_milestones, f"config={frozen_yaml}", "experiment.stop_at=16")
    refused(result, str(RUN), "another process is training here")
    assert sorted(by_milestones.rglob("*")) == before


def test_other_data_are_refused_in_the_same_folder(tmp_path, train, stage_yaml, image_shards):
    def run(shard: str, *more: str):
        short = ("experiment.num_examples_to_see=4", "experiment.milestones=[]", *more)
        return train(tmp_path, f"config={stage_yaml}", f"dataset.params.path={image_shards}/{shard}", *short)

    first, second = run("00000.tar"), run("00000.tar")
    assert first.codes == [0] and "finished already" not in first.text
    assert second.codes == [0] and "finished already" in second.text
    refused(run("00002.tar"), "the fingerprint of dataset", "experiment.requeue=false")
    assert run("00002.tar", "experiment.requeue=false").codes == [0]
    assert json.loads((tmp_path / "logs/tiny/stage1/4/train.json").read_text())["samples"] == 19


@pytest.mark.parametrize("kind", ["CSVDataset", "ParquetDataset"])
def test_training_reads_images_from_tables(tmp_path, train, stage_yaml, image_shards, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "images").mkdir()
    rows = {"image": [], "caption": [], "width": []}
    for number, sample in enumerate(tars.index_tar(image_shards / "00000.tar")):
        (tmp_path / f"images/{number}.jpg").write_bytes(sample.read("jpg"))
        rows["image"].append(f"images/{number}.jpg" if kind == "CSVDataset" else sample.read("jpg"))
        rows["caption"].append(sample.read("txt").decode())
        rows["width"].append(number)
    table = tmp_path / ("table.csv" if kind == "CSVDataset" else "table.parquet")
    (csv.write_csv if kind == "CSVDataset" else pq.write_table)(pa.table(rows), table)
    arguments = [f"dataset.type={kind}", f"dataset.params.path={table}", "dataset.params.filters={width: '<10'}"]
    arguments += [
        "experiment.num_examples_to_see=8",
        "experiment.milestones=[]",
        f"dataset.params.cache={tmp_path}/cache",
    ]
    result = train(tmp_path, f"config={stage_yaml}", *arguments, ranks=2)
    assert result.codes == [0, 0], result.text
    record = json.loads((tmp_path / "logs/tiny/stage1/8/train.json").read_text())
    assert record["samples"] == 10 and record["dropped"] == {"filters": 7}
