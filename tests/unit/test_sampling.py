"""Prompts become images, one seed a prompt whatever the batch, and images a grid."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain import checkpoint, models, sampling

PROMPTS = ["a red square", "a blue circle", "a green square", "", "a photo of a large circle"]


@pytest.fixture(scope="module")
def pipeline(tiny_parts, tiny_unet_params, tmp_path_factory):
    """A pipeline folder of random weights."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(**tiny_unet_params)
    loaded = {name: models._from_pretrained(name, str(tiny_parts), name) for name in models.PARTS}
    parts = models.Parts(**loaded, unet=unet, folders={})
    return checkpoint.export_pipeline(tmp_path_factory.mktemp("sampling") / "pipeline", parts, unet)


def images(pipeline, prompts=PROMPTS, batch_size=2, seed=3):
    pipe = sampling.load_pipeline(pipeline)
    found = sampling.generate(pipe, prompts, 32, guidance_scale=3.0, steps=3, seed=seed, batch_size=batch_size)
    return [np.asarray(image, dtype=np.int16) for image in found]


def test_an_image_depends_on_its_prompt_and_seed_alone(pipeline):
    by_two, at_once, one = images(pipeline), images(pipeline, batch_size=8), images(pipeline, PROMPTS[2:3], seed=5)
    assert [image.shape for image in by_two] == [(32, 32, 3)] * 5
    for a, b in zip(by_two, at_once, strict=True):
        assert np.abs(a - b).max() <= 1
    assert np.abs(one[0] - by_two[2]).max() <= 1  # prompt 2 of seed 3 is prompt 0 of seed 5
    assert np.abs(by_two[0] - by_two[1]).max() > 5


def test_another_seed_is_another_image(pipeline):
    one, two = (images(pipeline, PROMPTS[:1], seed=seed)[0] for seed in (3, 4))
    assert np.abs(one - two).max() > 5


def test_a_grid_lays_images_out_row_by_row():
    colours = ["red", "green", "blue", "yellow", "black"]
    sheet = sampling.grid([Image.new("RGB", (4, 2), c) for c in colours])
    assert sheet.size == (12, 4)
    expected = [Image.new("RGB", (1, 1), c).getpixel((0, 0)) for c in [*colours, "white"]]
    assert [sheet.getpixel((x, y)) for y in (0, 3) for x in (0, 4, 11)] == expected
    assert sampling.grid([sheet, sheet], columns=1).size == (12, 8)
