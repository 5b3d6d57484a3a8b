"""train.py as it is called: killed and resumed, by milestones, with the seed's own YAML, on one process and on two."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from pyarrow import csv
from safetensors.torch import load_file
from samples import load_script, write_tar
from trainings import SCRIPTS, TORCHRUN, environment, kill_all

from sdtrain import config, loader, schema, shards, tars

RUN = Path("logs/tiny/stage1")
pytestmark = pytest.mark.timeout(600)  # the first test of a group waits for its trainings, on a busy machine too


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    """The UNet's weights in a pipeline folder."""
    return load_file(pipeline / "unet/diffusion_pytorch_model.safetensors")


def last_checkpoint(run: Path) -> dict:
    """The state in the newest checkpoint."""
    newest = max((run / "checkpoints").glob("*/*.pt"), key=lambda path: int(path.stem))
    return torch.load(newest, weights_only=True)


def log(run: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


def same(a: dict, b: dict, **tolerance) -> bool:
    """Whether two states hold the same tensors: bit for bit, or within a tolerance."""
    if not tolerance:
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **tolerance) for k in a)


# ---------------------------------------------------------------- killed and resumed
LONG = (
    "experiment.num_examples_to_see=240",
    "experiment.milestones=[]",
    "experiment.save_every=10",
    "experiment.log_every=5",
)


def torchrun(folder: Path, stage: str) -> subprocess.Popen:
    """Start a training of 60 steps on two processes."""
    folder.mkdir(exist_ok=True)
    command = [*TORCHRUN, str(SCRIPTS / "train.py"), f"config={stage}", *LONG]
    output = open(folder / "output", "a")
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=output, stderr=output)


@pytest.fixture(scope="module")
def whole_and_killed(tmp_path_factory, stage_yaml) -> tuple[Path, Path]:
    """The folders of a training left alone, and of one killed after a checkpoint and started again."""
    whole, killed = (tmp_path_factory.mktemp(name) for name in ("whole", "killed"))
    process = torchrun(killed, stage_yaml)
    deadline = time.monotonic() + 200
    while not list(killed.glob("logs/tiny/stage1/checkpoints/*/*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, (killed / "output").read_text()
        time.sleep(0.005)
    kill_all(process)
    assert not (killed / RUN / "240/train.json").exists()
    for folder in (killed, whole):
        assert torchrun(folder, stage_yaml).wait(timeout=200) == 0, (folder / "output").read_text()
    return whole, killed


def test_the_log_says_where_it_went_on(whole_and_killed):
    whole, killed = whole_and_killed
    assert "resumed" not in (whole / "output").read_text()
    (said,) = [line for line in (killed / "output").read_text().splitlines() if line.startswith("resumed at")]
    images = int(said.split()[2].replace(",", ""))
    assert 40 <= images < 240 and images % 40 == 0
    assert f"{images}.pt" in said
    assert f"steps {images // 4} to 60 of 60" in (killed / "output").read_text()


def test_killed_and_resumed_is_bit_identical_to_left_alone(whole_and_killed):
    whole, killed = (folder / RUN for folder in whole_and_killed)
    a, b = last_checkpoint(whole), last_checkpoint(killed)
    assert same(a["unet"], b["unet"])
    assert same(a["ema"]["weights"], b["ema"]["weights"])
    assert a["ema"]["updates"] == b["ema"]["updates"] == 60
    assert not same(a["unet"], a["ema"]["weights"])
    assert same(weights(whole / "pipeline"), weights(killed / "pipeline"))
    for moments in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert same(*moments)


def test_the_loss_log_is_that_of_a_training_left_alone(whole_and_killed):
    whole, killed = (folder / RUN for folder in whole_and_killed)
    assert [line["images"] for line in log(whole)] == list(range(20, 241, 20))
    assert log(whole) == log(killed)
    assert all(math.isfinite(line["loss"]) for line in log(whole))


# ---------------------------------------------------------------- the same batch, shared in another way
def test_accumulation_ranks_and_one_large_batch_learn_the_same(tmp_path, train, stage_yaml):
    """Two micro-batches of 2 and two processes with 2 each: one global batch of 4, to the tolerance of float sums."""
    options = ["experiment.milestones=[]", "optimizer.params.epsilon=1e-4"]
    ways = {"accumulate": (["system.gradient_accumulation=2"], 1), "ranks": ([], 2)}
    for name, (more, ranks) in ways.items():
        (tmp_path / name).mkdir()
        result = train(tmp_path / name, f"config={stage_yaml}", *options, *more, ranks=ranks)
        assert result.codes == [0] * ranks, result.text
    a, b = (tmp_path / name / RUN for name in ways)
    assert [line["images"] for line in log(a)] == [4, 8, 12, 16]
    for x, y in zip(log(a), log(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
    assert same(last_checkpoint(a)["unet"], last_checkpoint(b)["unet"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_samples_of_one_process(image_shards, world_size):
    def samples(size, rank, batch_size, count):
        dataset = loader.ImageDataset(str(image_shards / "manifest.json"), 32, flip=True, seed=0)
        stream = loader.batches(dataset, batch_size, rank=rank, world_size=size)
        return [next(stream) for _ in range(count)]

    alone = samples(1, 0, 4, 12)  # more than one epoch of 41
    shared = [samples(world_size, rank, 4 // world_size, 12) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert batch["key"] == [key for rank in shared for key in rank[step]["key"]]
        assert torch.equal(batch["pixels"], torch.cat([rank[step]["pixels"] for rank in shared]))


# ---------------------------------------------------------------- milestones
@pytest.fixture(scope="module")
def frozen_yaml(stage_values, tmp_path_factory) -> str:
    """The stage as the workflow freezes it."""
    path = tmp_path_factory.mktemp("frozen") / "train.yaml"
    stage = config.require(config.load(schema.StageConfig, values=stage_values), "test")
    config.write_text(path, yaml.safe_dump(config.OmegaConf.to_container(config.freeze_stage(stage), resolve=True)))
    return str(path)


@pytest.fixture(scope="module")
def by_milestones(tmp_path_factory, train, frozen_yaml) -> Path:
    """A folder in which the workflow's jobs have trained to 0, 8 and 16 images."""
    folder = tmp_path_factory.mktemp("milestones")
    for images in (0, 8, 16):
        done = [m for m in (0, 8, 16) if m <= images]
        result = train(folder, f"config={frozen_yaml}", f"experiment.stop_at={images}", f"experiment.milestones={done}")
        assert result.codes == [0], result.text
    return folder


def test_each_milestone_leaves_a_pipeline_and_a_record(by_milestones):
    run = by_milestones / RUN
    for images in (0, 8, 16):
        record = json.loads((run / f"{images}/train.json").read_text())
        assert record["images"] == images and record["samples"] == 41
        assert (by_milestones / record["pipeline"] / "model_index.json").exists()
    assert (run / "pipeline").resolve() == (run / "16/pipeline").resolve()
    assert not same(weights(run / "0/pipeline"), weights(run / "8/pipeline"))
    assert not same(weights(run / "8/pipeline"), weights(run / "16/pipeline"))
    assert [line["images"] for line in log(run)] == list(range(2, 17, 2))


def test_milestones_do_not_change_what_is_learnt(by_milestones, tmp_path, train, stage_yaml):
    result = train(tmp_path, f"config={stage_yaml}")
    assert result.codes == [0], result.text
    assert same(weights(by_milestones / RUN / "pipeline"), weights(tmp_path / RUN / "pipeline"))
    assert log(by_milestones / RUN) == log(tmp_path / RUN)


def test_a_forced_rerun_trains_again(by_milestones, tmp_path, train, frozen_yaml):
    folder = shutil.copytree(by_milestones, tmp_path / "again", symlinks=True)
    before = weights(folder / RUN / "16/pipeline")
    shutil.rmtree(folder / RUN / "16/pipeline")
    (folder / RUN / "16/train.json").unlink()
    result = train(folder, f"config={frozen_yaml}", "experiment.stop_at=16", "experiment.milestones=[0,8,16]")
    assert result.codes == [0], result.text
    assert "resumed at 8 images" in result.text and "steps 4 to 8 of 8" in result.text
    assert same(before, weights(folder / RUN / "16/pipeline"))


def test_an_override_by_hand_leaves_the_workflows_results_alone(by_milestones, tmp_path, train, frozen_yaml):
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


def test_a_second_stage_starts_from_the_firsts_weights(by_milestones, train, stage_yaml):
    first = by_milestones / RUN / "16/pipeline"
    second = ["experiment.name=stage2", f"init={first}", "dataset.params.resolution=48", "experiment.milestones=[]"]
    result = train(by_milestones, f"config={stage_yaml}", *second, "experiment.stop_at=0")
    assert result.codes == [0], result.text
    record = json.loads((by_milestones / "logs/tiny/stage2/0/train.json").read_text())
    assert record["sources"]["init"] == json.loads((first.parent / "train.json").read_text())["fingerprint"]
    assert same(weights(first), weights(by_milestones / "logs/tiny/stage2/0/pipeline"))


# ---------------------------------------------------------------- latents with states of the captions
@pytest.fixture(scope="module")
def text_parts(tiny_parts, tmp_path_factory) -> Path:
    """The parts as a component: with a record."""
    folder = shutil.copytree(tiny_parts, tmp_path_factory.mktemp("components") / "parts")
    config.write_json(f"{folder}.json", {"fingerprint": "00000000000000aa"})
    return folder


@pytest.fixture(scope="module")
def latents(text_parts, image_shards, tmp_path_factory) -> dict[str, Path]:
    """Manifests of the same latents: online (captions only), cached (their states too), permuted (other captions)."""
    script, root = load_script("precompute_latents"), tmp_path_factory.mktemp("latents")
    images = shards.read_manifest(image_shards / "manifest.json")["shards"]
    for row in images:
        samples = [(s.key, {e: s.read(e) for e in s.fields}) for s in tars.index_tar(row["path"])]
        captions = [fields["txt"] for _, fields in samples]
        for (_, fields), caption in zip(samples, captions[1:] + captions[:1], strict=True):
            fields["txt"] = caption
        write_tar(root / Path(row["path"]).name, samples)
    shards.write_manifest(root / "permuted.json", "images", sorted(root.glob("*.tar")), {}, {})
    manifests = {}
    for name, text in (("online", None), ("cached", str(text_parts)), ("permuted", str(text_parts))):
        (root / name).mkdir()
        manifests[name] = root / name / "manifest.json"
        source = root / "permuted.json" if name == "permuted" else image_shards / "manifest.json"
        settings = config.load(schema.LatentsConfig, overrides=["workers=0"])
        script.precompute(settings, str(text_parts), text, 32, str(source), manifests[name])
    return manifests


@pytest.fixture(scope="module")
def on_latents(train, latents, stage_yaml, text_parts, tmp_path_factory):
    """on_latents(name, dropout): the folder of a training on one of them, at a caption dropout."""
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


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run)]


def test_cached_states_teach_what_captions_encoded_online_teach(on_latents):
    online, cached = losses(on_latents("online", 0.5)), losses(on_latents("cached", 0.5))
    assert len(online) == 8 and cached == pytest.approx(online, rel=1e-4)  # states in float16
    assert losses(on_latents("cached", 0.0)) != pytest.approx(online, rel=1e-4)  # captions show, and so does dropout


def test_with_all_captions_dropped_cached_states_do_not_matter(on_latents):
    cached, permuted, online = (last_checkpoint(on_latents(n, 1.0))["unet"] for n in ("cached", "permuted", "online"))
    assert same(cached, permuted)
    assert same(cached, online, atol=5e-5, rtol=1e-3)
    kept = [last_checkpoint(on_latents(name, 0.0))["unet"] for name in ("cached", "permuted")]
    assert not same(*kept)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae"])
def test_latents_of_another_network_are_refused(tmp_path, train, latents, stage_yaml, text_parts, part):
    other = shutil.copytree(text_parts, tmp_path / "other")
    config.write_json(f"{other}.json", {"fingerprint": "00000000000000bb"})
    options = ["dataset.type=LatentDataset", f"dataset.params.path={latents['cached']}"]
    result = train(tmp_path, f"config={stage_yaml}", *options, f"model.{part}.pretrained={other}")
    refused(result, f"model.{part}", str(other), "00000000000000bb", "00000000000000aa", str(latents["cached"]))


# ---------------------------------------------------------------- the seed's own YAML
SEED_TEMPLATE = """
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
SMALLER = {  # what keeps a CPU from training the seed's model on the seed's images
    "[320, 640, 1280, 1280]": "[16, 16, 16, 32]",
    "cross_attention_dim: 768": "cross_attention_dim: 32",
    "norm_num_groups: 32": "norm_num_groups: 8",
    "layers_per_block: 2": "layers_per_block: 1",
}
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def seed_run(tmp_path_factory, tiny_parts, image_shards) -> tuple[Path, str]:
    """The folder and output of the template's training: ??? filled in by dot-list, on brace-notation shards."""
    folder, text = tmp_path_factory.mktemp("seed"), SEED_TEMPLATE
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "template.yaml").write_text(text)
    filled = {f"model.{part}.pretrained": tiny_parts for part in ("vae", "text_encoder", "tokenizer", "scheduler")}
    filled |= {"wandb.api_key": SECRET, "experiment.log_dir": "logs", "experiment.project": "seed"}
    filled |= {"experiment.name": "template", "experiment.num_examples_to_see": 4}
    filled |= {"dataset.params.path": f"{image_shards}/{{00000..00002}}.tar"}
    smaller = {"system.batch_size": 2, "system.workers": 2, "dataset.params.resolution": 32}
    arguments = [f"{key}={value}" for key, value in (filled | smaller).items()]
    command = [sys.executable, "-u", str(SCRIPTS / "train.py"), "config=template.yaml", *arguments]
    env = environment(WANDB_MODE="offline")
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout + result.stderr


def test_the_seeds_template_trains(seed_run):
    folder, text = seed_run
    record = json.loads((folder / "logs/seed/template/4/train.json").read_text())
    assert record["samples"] == 25 and record["dropped"] == {"filters": 16}  # pwatermark <= 0.5
    assert record["steps"] == 2
    assert "model.xformers: needs CUDA" in text


def test_the_seeds_template_leaves_a_pipeline(seed_run):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(seed_run[0] / "logs/seed/template/pipeline")
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    image = pipe("a red circle", num_inference_steps=2, height=32, width=32, generator=rng).images[0]
    assert image.size == (32, 32)


def test_wandb_records_offline_and_no_file_holds_the_key(seed_run):
    folder, text = seed_run
    assert list(folder.glob("logs/seed/template/wandb/offline-run-*/*.wandb"))
    assert SECRET not in text
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "template.yaml":
            assert SECRET.encode() not in path.read_bytes(), path


# ---------------------------------------------------------------- what cannot be trained
def broken_shards(image_shards: Path, folder: Path, how: str) -> Path:
    """A copy of the shards in which the second one is missing or cut short."""
    copy = shutil.copytree(image_shards, folder / "shards")
    shard = copy / "00001.tar"
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    return copy


def refused(result, *named: str) -> None:
    """One message, which names all of `named`, and a failure of every process."""
    assert all(code != 0 for code in result.codes), result.text
    assert "Traceback" not in result.text, result.text
    (message,) = [line for line in result.text.splitlines() if line.startswith("error:")]
    assert all(word in message for word in named), message


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
    "nothing left": (["dataset.params.filters.pwatermark='>5'"], ["no sample", "41", "filters"]),
    "parts that do not fit": (
        ["model.unet.params.cross_attention_dim=64"],
        ["model.unet.params.cross_attention_dim", "32"],
    ),
    "no such part": (["model.vae.pretrained=./nowhere"], ["model.vae.pretrained", "./nowhere"]),
    "no such shards": (["dataset.params.path=nowhere.json"], ["nowhere.json", "no such manifest"]),
    "no such first stage": (["init=nowhere/pipeline"], ["init", "nowhere/pipeline"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_message(tmp_path, train, stage_yaml, mistake):
    arguments, named = MISTAKES[mistake]
    refused(train(tmp_path, f"config={stage_yaml}", *arguments), *named)
    assert not list(tmp_path.rglob("train.json")) and not list(tmp_path.rglob("*.pt"))


def test_keys_left_open_are_named(tmp_path, train, stage_values):
    experiment = {**stage_values["experiment"], "project": "???", "num_examples_to_see": "???"}
    (tmp_path / "open.yaml").write_text(yaml.safe_dump({**stage_values, "experiment": experiment}))
    result = train(tmp_path, "config=open.yaml")
    refused(result, "open.yaml", "???", "experiment.project", "experiment.num_examples_to_see")
    assert [p.name for p in tmp_path.iterdir()] == ["open.yaml"]


def test_nccl_without_cuda_is_refused_by_every_rank(tmp_path, train, stage_yaml):
    result = train(tmp_path, f"config={stage_yaml}", "distributed.dist_backend=nccl", ranks=2)
    refused(result, "distributed.dist_backend", "gloo")
    assert not (tmp_path / "logs").exists()


def test_an_unreadable_checkpoint_is_refused_and_left(by_milestones, tmp_path, train, frozen_yaml):
    folder = shutil.copytree(by_milestones, tmp_path / "damaged", symlinks=True)
    (kept,) = folder.glob("logs/tiny/stage1/checkpoints/*/8.pt")
    kept.write_bytes(kept.read_bytes()[:1000])
    (folder / RUN / "16/train.json").unlink()
    result = train(folder, f"config={frozen_yaml}", "experiment.stop_at=16", "experiment.milestones=[0,8,16]")
    refused(result, str(kept.relative_to(folder)), "unreadable checkpoint", "delete it")
    assert not (folder / RUN / "16/train.json").exists()


def test_a_second_trainer_in_one_folder_is_refused(by_milestones, train, frozen_yaml):
    before = sorted(by_milestones.rglob("*"))
    with open(by_milestones / RUN / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a trainer that is still alive holds it
        result = train(by_milestones, f"config={frozen_yaml}", "experiment.stop_at=16")
    refused(result, str(RUN), "another process is training here")
    assert sorted(by_milestones.rglob("*")) == before


def test_other_data_are_trained_on_anew(tmp_path, train, stage_yaml, image_shards):
    def run(shard: str) -> str:
        short = ("experiment.num_examples_to_see=4", "experiment.milestones=[]")
        result = train(tmp_path, f"config={stage_yaml}", f"dataset.params.path={image_shards}/{shard}", *short)
        assert result.codes == [0], result.text
        return result.text

    assert "finished already" not in run("00000.tar") and "finished already" in run("00000.tar")
    assert "finished already" not in run("00002.tar")
    assert json.loads((tmp_path / "logs/tiny/stage1/4/train.json").read_text())["samples"] == 19


@pytest.mark.parametrize("kind", ["CSVDataset", "ParquetDataset"])
def test_images_in_tables_are_trained_on(tmp_path, train, stage_yaml, image_shards, kind):
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
