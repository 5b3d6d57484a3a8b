"""The autoencoder's loss in closed form, its exact normalisation, and the real command, whole and resumed."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from samples import load_script, make_sample, run_script, write_tar

from sdtrain import shards

script = load_script("train_autoencoder")
CPU = torch.device("cpu")
TERMS = ("l1", "l2", "low_pass", "gradient", "chroma")
SETTINGS = """
data: any
resolution: 16
num_examples_to_see: 24
batch_size: 4
warmup_length: 2
save_every: 3
log_every: 2
ema_decay: 0.5
params:
  block_out_channels: [8, 16]
  down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D]
  up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]
  latent_channels: 3
  layers_per_block: 1
  norm_num_groups: 4
  mid_block_add_attention: false
"""


def weights(**given):
    return SimpleNamespace(**{term: given.get(term, 0.0) for term in TERMS})


# ---------------------------------------------------------------- closed forms
def test_each_term_of_the_loss_on_simple_errors():
    target = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    grey = target + 0.25  # the same everywhere: no gradient, no chroma
    red = target.clone()
    red[:, 0] += 0.3
    blue = target + torch.tensor([0.0, 0.0, 0.3]).view(3, 1, 1)
    columns = target + 0.2 * (torch.arange(8) % 2 * 2 - 1)  # plus and minus 0.2 in turn: nothing once averaged
    expected = {
        "l1": (0.25, 0.1, 0.1, 0.2),
        "l2": (0.0625, 0.03, 0.03, 0.04),
        "low_pass": (0.25, 0.1, 0.1, 0.0),
        "gradient": (0.0, 0.0, 0.0, 0.4),
        "chroma": (0.0, 0.15, 0.15, 0.0),
    }
    for term, values in expected.items():
        found = [
            script.reconstruction_loss(x, target, weights(**{term: 2.0})).item() / 2 for x in (grey, red, blue, columns)
        ]
        assert found == pytest.approx(values, abs=1e-6), term
    together = sum(v[1] * w for v, w in zip(expected.values(), (1, 2, 3, 4, 5), strict=True))
    found = script.reconstruction_loss(red, target, weights(**dict(zip(TERMS, (1, 2, 3, 4, 5), strict=True))))
    assert found.item() == pytest.approx(together, abs=1e-5)


def test_divergence_is_that_of_torch():
    mean, logvar = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    moments = SimpleNamespace(mean=mean, logvar=logvar, var=logvar.exp())
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(script.kl_divergence(moments), expected)


def test_the_learning_rate_rises_and_falls():
    rates = [script.learning_rate(step, 110, 2.0, 10) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.2, 2.0, 2.0, 1.0, 0.0])


def test_psnr_of_a_known_error():
    class Offset:
        """A VAE that adds 0.2 to every pixel."""

        def encode(self, image):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: image))

        def decode(self, latents):
            return SimpleNamespace(sample=latents + 0.2)

    dataset = [{"pixels": torch.zeros(3, 4, 4)}, {"error": "undecodable"}, {"pixels": torch.full((3, 4, 4), -0.5)}]
    assert script.psnr(Offset(), dataset, CPU) == pytest.approx(20.0, abs=1e-4)  # 0.1 of the range


def test_folding_the_normalisation_changes_no_image():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8).eval()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(3)
        vae.quant_conv.bias.add_(torch.arange(8.0))
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    folded = copy.deepcopy(vae)
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        flat = before.mode().transpose(0, 1).flatten(1)
        mean, std = flat.mean(1), flat.std(1)
        script.fold_normalisation(folded, mean, std)
        after = folded.encode(images).latent_dist
        channels = after.mode().transpose(0, 1).flatten(1)
        torch.testing.assert_close(channels.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(channels.std(1), torch.ones(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.std * std.view(1, -1, 1, 1), before.std, atol=1e-4, rtol=1e-4)
        one, two = (v.decode(d.mode()).sample for v, d in ((vae, before), (folded, after)))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert folded.config.scaling_factor == 1.0


# ---------------------------------------------------------------- the command
def arguments(folder, image_shards, name="component", *extra: str) -> list[str]:
    (folder / "config.yaml").write_text(SETTINGS)
    manifest = image_shards / "manifest.json"
    return [
        f"config={folder / 'config.yaml'}",
        f"train={manifest}",
        f"held_out={manifest}",
        f"output={folder / name}.json",
        *extra,
    ]


@pytest.fixture(scope="module")
def trained(image_shards, tmp_path_factory):
    """The folder where the real command trained `component`, six steps, uninterrupted."""
    folder = tmp_path_factory.mktemp("autoencoder")
    done = run_script("train_autoencoder", *arguments(folder, image_shards))
    assert done.returncode == 0, done.stderr
    return folder


def run(*given: str) -> None:
    script.main(["train_autoencoder.py", *given])


def test_the_command_leaves_a_component(trained, image_shards):
    record = json.loads((trained / "component.json").read_text())
    assert (record["source"], record["images_seen"]) == ("train", 24)
    assert record["held_out"].keys() == {"psnr_16px", "psnr_32px"} and all(v > 0 for v in record["held_out"].values())
    vae = AutoencoderKL.from_pretrained(trained / "component")
    assert vae.config.latent_channels == 3 and vae.config.scaling_factor == 1.0
    dataset = script.loader.ImageDataset(str(image_shards / "manifest.json"), 32)
    mean, std = script.latent_statistics(vae, dataset, CPU)
    torch.testing.assert_close(mean, torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=0.02, rtol=0)
    log = [json.loads(line) for line in (trained / "component/log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in log] == [8, 16, 24] and log[-1]["loss"] < log[0]["loss"]


def test_a_resumed_training_gives_the_same_weights(trained, image_shards, tmp_path, monkeypatch):
    given = arguments(tmp_path, image_shards)
    save = script.checkpoint.save

    def save_and_die(*args, **options):
        save(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(script.checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(*given)
    assert not (tmp_path / "component.json").exists()
    monkeypatch.undo()
    run(*given)
    one, two = (load_file(f / "component/diffusion_pytorch_model.safetensors") for f in (trained, tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    fingerprints = {json.loads((f / "component.json").read_text())["fingerprint"] for f in (trained, tmp_path)}
    assert len(fingerprints) == 1


def test_an_undecodable_image_does_not_stop_it(image_shards, tmp_path):
    samples = [make_sample(n) for n in range(20)]
    samples[3][1]["jpg"] = b"nothing"
    folder = tmp_path / "shards"
    folder.mkdir()
    shards.write_manifest(folder / "manifest.json", "images", [write_tar(folder / "0.tar", samples)], {}, {})
    with pytest.warns(UserWarning, match="skipped: .*000000003: undecodable"):
        run(*arguments(tmp_path, folder))
    assert (tmp_path / "component.json").exists()


def test_bad_input_is_one_message(image_shards, tmp_path):
    spoiled = shutil.copytree(image_shards, tmp_path / "spoiled")
    (spoiled / "00002.tar").write_bytes((spoiled / "00002.tar").read_bytes()[:900])
    for given, message in [
        (arguments(tmp_path, spoiled), "error: .*00002.tar: 900 bytes, .* expected"),
        (
            arguments(tmp_path, image_shards, "x", "params.latent_chanels=3"),
            "error: params: AutoencoderKL refuses them: .*latent_chanels",
        ),
        (
            arguments(tmp_path, image_shards, "x", "batchsize=3"),
            "error: command line: unknown key batchsize; did you mean batch_size",
        ),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(*given)
    assert not list(tmp_path.glob("*.json"))


def test_a_second_trainer_is_kept_out(image_shards, tmp_path):
    with script.checkpoint.lock(tmp_path / "component/checkpoints"):
        with pytest.raises(SystemExit, match="error: .*another process is training here"):
            run(*arguments(tmp_path, image_shards))
