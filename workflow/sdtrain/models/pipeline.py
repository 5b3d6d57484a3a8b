"""Load, build and export StableDiffusionPipelines; generate images and arrange them in grids."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from sdtrain.io.files import atomic_folder, relative_target, write_text
from sdtrain.models.parts import Parts

# Loading is fast, and the warnings (a text encoder that is not CLIP, no torchvision) are harmless
for library in (transformers, diffusers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
# a warning of 40 lines about steps_offset 1 and clip_sample false, which the pipeline sets in any case
SCHEDULER_CHANGED = r"The configuration file of this scheduler"


def load_pipeline(folder: str | Path, device: torch.device | str = "cpu") -> diffusers.StableDiffusionPipeline:
    """Load a pipeline from a local folder, without network access and without its progress bar."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SCHEDULER_CHANGED, FutureWarning)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def pipeline_of(parts, unet) -> diffusers.StableDiffusionPipeline:
    """Return a pipeline of networks in memory, equal to the one that `load_pipeline` loads from an exported folder.

    `unet` should be in eval mode. The scheduler is copied: a pipeline changes its configuration, sampling its state.
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
    """Yield a square RGB image of `resolution` pixels for each prompt.

    Sampling uses classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598). Image i starts from the noise of seed
    `seed + i` for any batch size.
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
    """Return the images in rows on a white background, nearly square by default."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def export_pipeline(
    folder: str | Path, parts: Parts, unet: Any, extra: dict[str, Callable[[Path], object]] | None = None
) -> Path:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` loads, atomically, and return its path.

    The UNet and the scheduler are written as safetensors and JSON. Frozen components that were loaded from a local
    folder are linked, not copied. `extra` maps names of further folders to functions that write them.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        unet.save_pretrained(temporary / "unet", safe_serialization=True)
        for name, write in (extra or {}).items():
            write(temporary / name)
        parts.scheduler.save_pretrained(temporary / "scheduler")
        for name, part in (("vae", parts.vae), ("text_encoder", parts.text_encoder), ("tokenizer", parts.tokenizer)):
            source = parts.folders.get(name)
            if source is not None:  # the temporary folder is as deep as the final one
                (temporary / name).symlink_to(relative_target(source, temporary))
            else:
                part.save_pretrained(temporary / name)
        index = {
            "_class_name": "StableDiffusionPipeline",
            **{n: [type(p).__module__.split(".")[0], type(p).__name__] for n, p in parts.named().items()},
            "unet": ["diffusers", type(unet).__name__],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
        }
        write_text(temporary / "model_index.json", json.dumps(index, indent=1) + "\n")
    return folder
