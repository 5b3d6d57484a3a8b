"""The step sample: prompts, generated images and the grids of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdtrain import distributed
from sdtrain.config.fingerprint import fingerprint
from sdtrain.config.load import held_out_dataset
from sdtrain.data.datasets import PositionDataset, open_dataset
from sdtrain.errors import ConfigError
from sdtrain.io.files import atomic_folder
from sdtrain.models.pipeline import generate, grid, load_pipeline

COLUMNS = 8  # of a grid
CAPTIONS = 16  # of the grid of training captions, unless the configuration names its prompts


def captions_of(dataset: PositionDataset, count: int) -> list[str]:
    """Return the captions of the first `count` samples of the shuffled stream; they repeat if it is smaller."""
    return [dataset.caption(position) for position in range(count)]


def choose_prompts(settings: Any, stage: Any, held_out: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the prompts of the metrics, and the grids of the report as {"title", "prompts"}.

    Metrics use `evaluation.prompts` if it is set, else captions of the training set. A second grid has held-out
    captions.
    """
    seen = open_dataset(stage.dataset, settings.seed)
    if settings.prompts:
        lines = [line.strip() for line in Path(settings.prompts).read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        if not lines:
            raise ConfigError(f"evaluation.prompts: {settings.prompts} contains no prompt; write one per line")
        prompts = [lines[i % len(lines)] for i in range(settings.num_images)]
    else:
        prompts = captions_of(seen, settings.num_images)
    own = list(settings.grid) or captions_of(seen, CAPTIONS)
    grids: list[dict[str, Any]] = [{"title": "captions of the training set", "prompts": own}]
    if settings.held_out_grid:
        unseen = open_dataset(held_out_dataset(stage.dataset, held_out), settings.seed)
        count = min(settings.held_out_grid, len(unseen))
        grids.append({"title": "held-out captions, never trained on", "prompts": captions_of(unseen, count)})
    return prompts, grids


def sample(settings: Any, stage: Any, trained: dict[str, Any], held_out: str, output: Path) -> dict[str, Any]:
    """Write images and grids atomically to the folder `output` without `.json`, and return the record."""
    prompts, grids = choose_prompts(settings, stage, held_out)
    pipe = load_pipeline(trained["pipeline"], distributed.only_device())
    sampling = {"guidance_scale": settings.guidance_scale, "steps": settings.num_inference_steps, "seed": settings.seed}
    options = {**sampling, "batch_size": settings.batch_size}
    resolution, folder = stage.dataset.params.resolution, output.with_suffix("")
    label = f"sample {trained['images']:,} images seen, {resolution} px"
    with atomic_folder(folder) as temporary:
        images = generate(pipe, prompts, resolution, **options)
        for i, image in enumerate(tqdm(images, total=len(prompts), unit="img", desc=label, mininterval=5)):
            image.save(temporary / f"{i:05d}.png")
        for number, entry in enumerate(grids):
            entry.update(image=str(folder / f"grid{number}.png"), columns=COLUMNS)
            tiles = list(generate(pipe, entry["prompts"], resolution, **options))
            grid(tiles, COLUMNS).save(temporary / f"grid{number}.png")
    return {
        "images": len(prompts),
        "folder": str(folder),
        "resolution": resolution,
        "guidance_scale": settings.guidance_scale,
        "num_inference_steps": settings.num_inference_steps,
        "seed": settings.seed,
        "fingerprint": fingerprint(trained["fingerprint"], settings),
        "grids": grids,
        "prompts": prompts,
    }
