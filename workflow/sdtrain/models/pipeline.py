"""Prompts -> images by StableDiffusionPipeline, one seed a prompt; grids of images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image

# A pipeline's parts are read in a blink; that a text encoder is no CLIP, or torchvision is not here, harms nothing
for library in (transformers, diffusers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
# 40 lines on that the pipeline will use steps_offset 1 and clip_sample false, which it does with or without them
SCHEDULER_CHANGED = r"The configuration file of this scheduler"


def load_pipeline(folder: str | Path, device: torch.device | str = "cpu") -> diffusers.StableDiffusionPipeline:
    """A pipeline folder, from disk alone, without its own progress bar."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SCHEDULER_CHANGED, FutureWarning)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def pipeline_of(parts, unet) -> diffusers.StableDiffusionPipeline:
    """The pipeline that `load_pipeline` makes of an exported folder, in memory: `parts`' vae, text_encoder and

    tokenizer as they are, `unet`, which should be in eval mode, and a copy of the scheduler, since a pipeline changes
    its scheduler's configuration and sampling its state.
    """
    networks = {name: getattr(parts, name) for name in ("vae", "text_encoder", "tokenizer")}
    scheduler = type(parts.scheduler).from_config(parts.scheduler.config)
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SCHEDULER_CHANGED, FutureWarning)
        pipe = diffusers.StableDiffusionPipeline(**networks, unet=unet, scheduler=scheduler, **extras)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe, prompts: list[str], resolution: int, *, guidance_scale: float, steps: int, seed: int, batch_size: int
) -> Iterator[Image.Image]:
    """One RGB image of `resolution` pixels a side for each prompt, by classifier-free guidance (Ho & Salimans 2022,

    arXiv 2207.12598). Image i starts from the noise of seed `seed + i`, whatever the batch size.
    """
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(chunk))]
        yield from pipe(
            chunk,
            height=resolution,
            width=resolution,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=generators,
        ).images


def grid(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """The images side by side on white, row by row, nearly square by default."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
