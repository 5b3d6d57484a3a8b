"""Tests of sampling: one seed per prompt at any batch size, exported pipelines, and grids of images."""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.models.parts import PARTS, Parts, _from_pretrained, load_parts
from sdtrain.models.pipeline import export_pipeline, generate, grid, load_pipeline, pipeline_of
from sdtrain.training import objective

PROMPTS = ["a red square", "a blue circle", "a green square", "", "a photo of a large circle"]


@pytest.fixture(scope="module")
def parts(tiny_parts, tiny_unet_params):
    """Return model components with random weights."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(**tiny_unet_params).eval()
    loaded = {name: _from_pretrained(name, str(tiny_parts), name) for name in PARTS}
    return Parts(**loaded, unet=unet, folders={})


@pytest.fixture(scope="module")
def pipeline(parts, tmp_path_factory):
    """Export the components; return the pipeline folder."""
    return export_pipeline(tmp_path_factory.mktemp("sampling") / "pipeline", parts, parts.unet)


def images(pipeline, prompts=PROMPTS, batch_size=2, seed=3):
    return sample(load_pipeline(pipeline), prompts, batch_size, seed)


def sample(pipe, prompts=PROMPTS, batch_size=2, seed=3):
    found = generate(pipe, prompts, 32, guidance_scale=3.0, steps=3, seed=seed, batch_size=batch_size)
    return [np.asarray(image, dtype=np.int16) for image in found]


def test_image_depends_only_on_its_prompt_and_seed(pipeline):
    by_two, at_once, one = images(pipeline), images(pipeline, batch_size=8), images(pipeline, PROMPTS[2:3], seed=5)
    assert [image.shape for image in by_two] == [(32, 32, 3)] * 5
    for a, b in zip(by_two, at_once, strict=True):
        assert np.abs(a - b).max() <= 1
    assert np.abs(one[0] - by_two[2]).max() <= 1  # the seed of an image is `seed` + its number: 5 + 0 = 3 + 2
    assert np.abs(by_two[0] - by_two[1]).max() > 5


def test_another_seed_is_another_image(pipeline):
    one, two = (images(pipeline, PROMPTS[:1], seed=seed)[0] for seed in (3, 4))
    assert np.abs(one - two).max() > 5


# ---------------------------------------------------------------- a pipeline in memory
@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction"])
def test_pipeline_in_memory_and_its_export_draw_the_same_images(prediction, parts, tmp_path):
    scheduler = parts.scheduler if prediction == "epsilon" else flow_scheduler("DPMSolverMultistepScheduler")
    parts = dataclasses.replace(parts, scheduler=scheduler)
    here = sample(pipeline_of(parts, parts.unet))
    there = images(export_pipeline(tmp_path / "pipeline", parts, parts.unet))
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
    assert here[0].std() > 5


def test_sampling_does_not_change_the_model(parts):
    """A checkpoint after drawing a grid must still contain the configured scheduler."""
    scheduler = diffusers.DDIMScheduler(steps_offset=0, clip_sample=True)  # a pipeline sets these to 1 and False
    before = dict(scheduler.config), scheduler.timesteps.clone()
    pipe = pipeline_of(dataclasses.replace(parts, scheduler=scheduler), parts.unet)
    sample(pipe, PROMPTS[:1])
    assert len(pipe.scheduler.timesteps) == 3
    assert dict(scheduler.config) == before[0] and torch.equal(scheduler.timesteps, before[1])
    assert pipe.unet is parts.unet and pipe.vae is parts.vae and pipe.safety_checker is None


def test_pipelines_neither_warn_nor_show_progress(parts, tmp_path, capfd):
    parts = dataclasses.replace(parts, scheduler=flow_scheduler("UniPCMultistepScheduler"))
    folder = export_pipeline(tmp_path / "pipeline", parts, parts.unet)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pipe in (pipeline_of(parts, parts.unet), load_pipeline(folder)):
            sample(pipe, PROMPTS[:1])
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- samplers undo the process that is trained
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOWS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")


def flow_scheduler(name, **params):
    return getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction", **params)


SCHEDULERS = {
    **{f"DDIM {p}": diffusers.DDIMScheduler(**SD, prediction_type=p) for p in ("epsilon", "v_prediction", "sample")},
    "DDIM zero": diffusers.DDIMScheduler(**ZERO, prediction_type="v_prediction"),
    "Euler": diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
    "Euler zero": diffusers.EulerDiscreteScheduler(**ZERO, prediction_type="v_prediction"),
    "DPM": diffusers.DPMSolverMultistepScheduler(**SD),
    **{name: flow_scheduler(name) for name in FLOWS},
}


class Optimum(diffusers.UNet2DConditionModel):
    """The optimal network for a dataset of one image: it computes the prediction from x_t."""

    def learn(self, clean, scheduler):
        self.clean, self.process, self.times = clean, objective.process_of(scheduler), []
        return self

    def forward(self, sample, timestep, **_):
        t = timestep.expand(len(sample))
        t = t if self.process.prediction == "flow_prediction" else t.long()  # Euler's times are whole floats
        signal, scale = (x.view(-1, 1, 1, 1) for x in self.process.scales(t))
        self.times.append(timestep.item())
        clean = self.clean.expand_as(sample)
        return (objective.target(self.process, clean, (sample - signal * clean) / scale, t),)


@pytest.fixture(scope="module")
def clean():
    return 2 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pipeline_recovers_the_image_from_the_optimal_prediction(name, clean, parts, tiny_unet_params):
    """Exactly in 27 steps: a flow's noise levels are 37/1000 apart then. Else its times are the integers below, and the

    last of 10 steps, from noise level 0.0999 at time 99, leaves 0.9 % of a tenth of noise minus image.
    """
    scheduler = SCHEDULERS[name]
    unet = Optimum(**tiny_unet_params).learn(clean, scheduler)
    pipe = pipeline_of(dataclasses.replace(parts, scheduler=scheduler), unet)
    for steps, tolerance in ((27, 1e-4), (10, 0.01)):
        options = {"num_inference_steps": steps, "height": 32, "width": 32, "output_type": "latent"}
        found = pipe(["a red square"], generator=torch.Generator().manual_seed(0), **options).images
        torch.testing.assert_close(found, clean, atol=tolerance, rtol=0)
    assert len(unet.times) == 27 + 10 and len(set(unet.times)) > 27


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50, 333, 999])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_sampled_at_times_that_were_trained(name, shift, steps):
    """Training has t = 1000 sigma in (0, 1000]; the samplers' times are the integers below theirs."""
    scheduler = flow_scheduler(name, flow_shift=shift)
    scheduler.set_timesteps(steps)
    above = 1000 * scheduler.sigmas[:-1].double() - scheduler.timesteps
    assert -1e-3 < above.min() and above.max() < 1.001
    assert len(above) == steps and 0 <= scheduler.timesteps.min() and 998 <= scheduler.timesteps.max() < 1000
    assert scheduler.init_noise_sigma == 1 and scheduler.sigmas[-1] == 0


# ---------------------------------------------------------------- grids
def test_grid_arranges_images_row_by_row():
    colours = ["red", "green", "blue", "yellow", "black"]
    sheet = grid([Image.new("RGB", (4, 2), c) for c in colours])
    assert sheet.size == (12, 4)
    expected = [Image.new("RGB", (1, 1), c).getpixel((0, 0)) for c in [*colours, "white"]]
    assert [sheet.getpixel((x, y)) for y in (0, 3) for x in (0, 4, 11)] == expected
    assert grid([sheet, sheet], columns=1).size == (12, 8)


# ---------------------------------------------------------------- export
@pytest.fixture
def project_parts(tiny_parts, tiny_unet_params, tmp_path):
    """Return the tiny components, loaded from a project's resources/components."""
    shutil.copytree(tiny_parts, tmp_path / "project/components")
    values = {part: {"pretrained": str(tmp_path / "project/components")} for part in PARTS}
    unet = {"target": "UNet2DConditionModel", "params": tiny_unet_params}
    torch.manual_seed(0)
    return load_parts(load_config(schema.ModelConfig, values={**values, "unet": unet}))


def sampled_image(folder: Path):
    pipe = load_pipeline(folder)
    return list(generate(pipe, ["a red square"], 32, guidance_scale=2.0, steps=2, seed=0, batch_size=1))[0]


def test_an_exported_pipeline_can_be_moved_with_its_project(project_parts, tmp_path):
    folder = export_pipeline(
        tmp_path / "project/runs/1/pipeline",
        project_parts,
        project_parts.unet,
        {"unet_raw": project_parts.unet.save_pretrained},
    )
    links = {name: os.readlink(folder / name) for name in ("vae", "text_encoder", "tokenizer")}
    assert links == {name: f"../../../components/{name}" for name in links}
    assert (folder / "unet_raw/diffusion_pytorch_model.safetensors").is_file() and not list(folder.rglob("*.bin"))
    before = sampled_image(folder)
    again = export_pipeline(folder, project_parts, project_parts.unet)  # replaces the old one
    assert os.listdir(again.parent) == ["pipeline"] and not (again / "unet_raw").exists()
    moved = shutil.move(tmp_path / "project", tmp_path / "moved")
    assert sampled_image(Path(moved, "runs/1/pipeline")).tobytes() == before.tobytes()


def test_pipeline_can_be_exported_into_a_linked_folder(project_parts, tmp_path):
    (tmp_path / "scratch/deep/down").mkdir(parents=True)
    (tmp_path / "project/runs").symlink_to(tmp_path / "scratch/deep/down")
    folder = export_pipeline(tmp_path / "project/runs/1/pipeline", project_parts, project_parts.unet)
    assert (folder / "vae/config.json").is_file() and (folder / "tokenizer/tokenizer_config.json").is_file()


def test_components_without_a_folder_are_written(project_parts, tmp_path):
    project_parts.folders = {}
    folder = export_pipeline(tmp_path / "pipeline", project_parts, project_parts.unet)
    assert not any((folder / name).is_symlink() for name in ("vae", "text_encoder", "tokenizer"))
    assert sampled_image(folder).size == (32, 32)
