"""Generate a milestone's images for the metrics and the report: one seed a prompt, PNGs and grids."""

import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import fingerprint
from sdtrain.config.load import held_out_dataset, load_config, require
from sdtrain.data.datasets import PositionDataset, open_dataset
from sdtrain.data.sources import DataError
from sdtrain.errors import one_line_errors
from sdtrain.io.files import read_json, replace_folder, write_json
from sdtrain.models.pipeline import generate, grid, load_pipeline


def captions_of(dataset: PositionDataset, count: int) -> list[str]:
    """Captions of the first `count` samples of the dataset's shuffled stream; they repeat if it is smaller."""
    return [dataset.caption(dataset.locate(position)) for position in range(count)]


def choose_prompts(settings, stage, held_out: str) -> tuple[list[str], list[dict]]:
    """The prompts of the metrics, and the report's grids as {"title", "prompts"}.

    Metrics use `evaluation.prompts` if given, else captions of the training set; a second grid asks for captions
    that were never trained on.
    """
    seen = open_dataset(stage.dataset, settings.seed)
    if settings.prompts:
        lines = [line.strip() for line in Path(settings.prompts).read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        if not lines:
            raise DataError(f"evaluation.prompts: {settings.prompts}: no prompt in it; write one a line")
        prompts = [lines[i % len(lines)] for i in range(settings.num_images)]
    else:
        prompts = captions_of(seen, settings.num_images)
    grids = [{"title": "captions of the training set", "prompts": list(settings.grid) or captions_of(seen, 16)}]
    if settings.held_out_grid:
        unseen = open_dataset(held_out_dataset(stage.dataset, held_out), settings.seed)
        count = min(settings.held_out_grid, len(unseen))
        grids.append({"title": "held-out captions, never trained on", "prompts": captions_of(unseen, count)})
    return prompts, grids


def sample(settings, stage, trained: dict, held_out: str, output: Path) -> dict:
    """Write the PNGs and grids aside, move them into place, and return the record."""
    device = distributed.only_device()
    prompts, grids = choose_prompts(settings, stage, held_out)
    pipe = load_pipeline(trained["pipeline"], device)
    options = {"guidance_scale": settings.guidance_scale, "steps": settings.num_inference_steps, "seed": settings.seed}
    resolution = stage.dataset.params.resolution
    folder, aside = output.with_suffix(""), output.with_name(f".{output.stem}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)

    images = generate(pipe, prompts, resolution, batch_size=settings.batch_size, **options)
    label = f"sample {trained['images']:,} images seen, {resolution} px"
    for i, image in enumerate(tqdm(images, total=len(prompts), unit="img", desc=label, mininterval=5)):
        image.save(aside / f"{i:05d}.png")
    for number, entry in enumerate(grids):
        images = list(generate(pipe, entry["prompts"], resolution, batch_size=settings.batch_size, **options))
        entry.update(image=str(folder / f"grid{number}.png"), columns=8)
        grid(images, entry["columns"]).save(aside / f"grid{number}.png")
    replace_folder(aside, folder)
    return {
        "images": len(prompts),
        "folder": str(folder),
        "resolution": resolution,
        **{"guidance_scale": settings.guidance_scale, "num_inference_steps": settings.num_inference_steps},
        "seed": settings.seed,
        "fingerprint": fingerprint(trained["fingerprint"], settings),
        "grids": grids,
        "prompts": prompts,
    }


def main(argv: list[str]) -> None:
    settings, own = command_line(
        argv, schema.EvaluationConfig, __doc__, stage=None, trained=None, held_out=None, output=None
    )
    with one_line_errors():
        stage = require(load_config(schema.StageConfig, own["stage"]), own["stage"])
        record = sample(settings, stage, read_json(own["trained"]), own["held_out"], Path(own["output"]))
    write_json(own["output"], record)
    print(f"{own['output']}: {record['images']} images, grids {', '.join(g['image'] for g in record['grids'])}")


if __name__ == "__main__":
    main(sys.argv)
