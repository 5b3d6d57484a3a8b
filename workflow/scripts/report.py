"""Gather a run's measurements into metrics.json, a table for the terminal and a self-contained report.html.

`rows` are the milestones to show, in order: stage1/0,stage1/32000,stage2/10000. Everything else lies beside them, in
`folder`; `data` is the dataset's folder, if the run has one.
"""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import jinja2
from omegaconf import OmegaConf
from PIL import Image

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import code_digest, fingerprint
from sdtrain.config.load import load_config, require
from sdtrain.data import images, tars, yields
from sdtrain.data.manifest import read_manifest
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.features import EvaluationError, read_record, read_samples
from sdtrain.io.files import read_json, write_json, write_text

TEMPLATE = Path(__file__).resolve().parent.parent / "report" / "report.html"
TILE = 256  # pixels a side at most, of an image in the report
SEARCHED = 16  # shards looked through for the real image of a caption
POINTS = 300  # of a curve
TRAINED = ("images", "samples", "dropped", "skipped", "rollbacks", "global_batch", "world_size", "fingerprint")
TRAINED += ("code", "versions")


def main(argv: list[str]) -> None:
    """Run the command."""
    required = dict.fromkeys(("run", "rows", "output", "html", "text"))
    _, own = command_line(argv, None, __doc__, **required, folder="", data="")
    folder = Path(own["folder"] or f"results/runs/{own['run']}")
    with one_line_errors():
        rows = [read_row(folder, name) for name in own["rows"].split(",")]
        metrics = summary(own["run"], folder, rows)
        page = render(metrics, folder, rows, Path(own["data"]) if own["data"] else None)
    text = f"{terminal_table(metrics['rows'])}\n\n{own['html']}\n"
    write_text(own["html"], page)
    write_text(own["text"], text)
    write_json(own["output"], metrics)
    print(text, end="")


# ---------------------------------------------------------------- reading
def read_row(folder: Path, name: str) -> dict:
    """The records of a milestone, such as stage1/32000; the score of captions is None where it was not asked for."""
    stage, _, images = name.partition("/")
    if not stage or not images.isdigit():
        raise EvaluationError(f"rows={name}: stage/images is expected, such as stage1/32000")
    beside = folder / stage / images
    config = require(load_config(schema.StageConfig, folder / stage / "config" / "train.yaml"), name)
    return {
        "stage": stage,
        "config": config,
        "train": read_record(beside / "train.json", *TRAINED),
        "samples": read_samples(beside / "samples.json"),
        "distance": read_record(beside / "frechet_distance.json", "metric", "value", "floor", "kernel"),
        "score": read_record(beside / "clip_score.json", "metric", "value", "shuffled")
        if (beside / "clip_score.json").exists()
        else None,
    }


def read_log(path: Path, until: int) -> list[dict]:
    """Measurements in a training's log up to `until` images, without its events; none where nothing was trained."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # a line cut by a kill
    return [entry for entry in entries if entry["images"] <= until and "event" not in entry]


# ---------------------------------------------------------------- metrics.json and the terminal
def summary(run: str, folder: Path, rows: list[dict]) -> dict:
    """What metrics.json holds."""
    return {
        "run": run,
        "rows": [row_metrics(folder, row) for row in rows],
        "fingerprint": fingerprint([row["train"]["fingerprint"] for row in rows]),
        "code": code_digest(),
        "versions": rows[-1]["train"]["versions"],
    }


def row_metrics(folder: Path, row: dict) -> dict:
    """One milestone's numbers."""
    distance, score, samples = row["distance"], row["score"], row["samples"]
    log = read_log(folder / row["stage"] / "log.jsonl", row["train"]["images"])
    return {
        "name": row_name(row),
        "stage": row["stage"],
        "images": row["train"]["images"],
        "resolution": samples["resolution"],
        "frechet_distance": {key: value for key, value in distance.items() if key != "code"},
        "alignment": score and {key: value for key, value in score.items() if key != "code"},
        "images_per_second": statistics.median(e["images_per_second"] for e in log) if log else None,
        "data_wait_share": data_wait_share(log),
        "loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "mfu": statistics.median(found) if (found := [e["mfu"] for e in log if "mfu" in e]) else None,
        "seed": row["config"].experiment.seed,
        "sampling": {key: samples[key] for key in ("guidance_scale", "num_inference_steps", "seed") if key in samples},
        "fingerprint": row["train"]["fingerprint"],
        "code": row["train"]["code"],
    }


def row_name(row: dict) -> str:
    """untrained, stage1, or for a stage's starting weights: stage2 before training."""
    if row["train"]["images"]:
        return row["stage"]
    return f"{row['stage']} before training" if row["config"].init or row["config"].model.pretrained else "untrained"


def data_wait_share(log: list[dict]) -> float | None:
    """The share of a training's time spent waiting for data, 0..1."""
    spans = [(now["images"] - before["images"]) / now["images_per_second"] for before, now in pairwise(log)]
    waited = sum(span * entry["data_wait"] for span, entry in zip(spans, log[1:], strict=True))
    return waited / sum(spans) if spans else None


def terminal_table(rows: list[dict]) -> str:
    """The numbers that matter, aligned, and the whole names of the metrics."""
    distance, scored = rows[-1]["frechet_distance"]["metric"], rows[-1]["alignment"]
    metrics = [distance, scored["metric"]] if scored else [distance]
    names = [short_name(metric) for metric in metrics]
    lines = [["", "images seen", "px", names[0], "floor", "n", *([names[1], "shuffled"] if scored else []), "img/s"]]
    for row in rows:
        distance, score, rate = row["frechet_distance"], row["alignment"], row["images_per_second"]
        line = [row["name"], f"{row['images']:,}", str(row["resolution"]), f"{distance['value']:.1f}"]
        line += [f"{distance['floor']:.1f}", f"{distance['images']:,}"]
        line += ([f"{score[key]:.1f}" for key in ("value", "shuffled")] if score else ["", ""]) if scored else []
        lines.append([*line, f"{rate:.1f}" if rate else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust] + [str.rjust] * (len(widths) - 1)
    text = ["  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)) for line in lines]
    return "\n".join([*text, "; ".join(metrics)])


# ---------------------------------------------------------------- report.html
def render(metrics: dict, folder: Path, rows: list[dict], data: Path | None) -> str:
    """The page, whole: images and curves are inside it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"comma": "{:,}".format, "round1": "{:.1f}".format, "short": short_name, "title1": heading}
    environment.filters["bytes"] = yields.show_bytes
    stages = {row["stage"]: row for row in rows}  # the last milestone of each
    evaluate = folder / "config" / "evaluate.yaml"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metrics=metrics,
        pretrained=bool(rows[0]["config"].model.pretrained),
        headlines=headlines(metrics["rows"]),
        real=real_rows(metrics["rows"]),
        grids=grids(rows, data),
        trainings=[training(folder, row) for row in stages.values() if row["train"]["images"]],
        yields=read_json(data / "yields.json") if data and (data / "yields.json").exists() else None,
        configs={f"{stage}: training": show_config(row["config"]) for stage, row in stages.items()}
        | ({"evaluation": evaluate.read_text(encoding="utf-8")} if evaluate.exists() else {}),
    )


def short_name(metric: str) -> str:
    """A metric without its network: "Frechet distance (EfficientNet-Lite0)" -> "Frechet distance"."""
    return metric.partition(" (")[0]


def heading(text: str) -> str:
    """With a capital first letter, and Maurice Fréchet's name as he wrote it."""
    return (text[:1].upper() + text[1:]).replace("Frechet", "Fréchet")


def show_config(config) -> str:
    """A stage's configuration as YAML, without the one secret that it can hold."""
    return OmegaConf.to_yaml(OmegaConf.merge(config, {"wandb": {"api_key": None}}), resolve=True)


def headlines(rows: list[dict]) -> list[dict]:
    """At each resolution, the first row and the last: what training did. The page opens with them."""
    found = {}
    for row in rows:
        found.setdefault(row["resolution"], []).append(row)
    return [{"first": group[0] if len(group) > 1 else None, "last": group[-1]} for group in found.values()]


def real_rows(rows: list[dict]) -> dict[int, dict]:
    """What real images get, by resolution: the floor, and the score of held-out images where it was measured."""
    return {
        row["resolution"]: {**row["frechet_distance"], "score": (row["alignment"] or {}).get("real")} for row in rows
    }


# ---------------------------------------------------------------- images
def grids(rows: list[dict], data: Path | None) -> list[dict]:
    """Titles, column labels and, a caption each, the images of all rows and the real one (None where there is none)."""
    tiles = []
    for samples in (row["samples"] for row in rows):
        tiles.append({grid["title"]: cut(grid, samples["resolution"]) for grid in samples["grids"]})
    captions = {}
    for row in tiles:
        for title, shown in row.items():
            captions.setdefault(title, {}).update(dict.fromkeys(shown))
    wanted = {caption for group in captions.values() for caption in group}
    real = real_images(data, wanted, rows[-1]["samples"]["resolution"]) if data else {}
    labels = [row_name(row) for row in rows]
    found = []
    for title, group in captions.items():
        columns = [row.get(title, {}) for row in tiles]
        columns += [real] if any(caption in real for caption in group) else []
        cards = [{"caption": caption, "images": [column.get(caption) for column in columns]} for caption in group]
        found.append({"title": title, "labels": [*labels, "real image"][: len(columns)], "cards": cards})
    return found


def cut(grid: dict, resolution: int) -> dict[str, str]:
    """Caption -> data URI of each image of a grid."""
    try:
        sheet = Image.open(grid["image"]).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise EvaluationError(f"{grid['image']}: not a readable image ({error}); sample again") from None
    places = [divmod(i, grid["columns"]) for i in range(len(grid["prompts"]))]
    boxes = [(x * resolution, y * resolution, (x + 1) * resolution, (y + 1) * resolution) for y, x in places]
    return {prompt: data_uri(sheet.crop(box)) for prompt, box in zip(grid["prompts"], boxes, strict=True)}


def data_uri(image: Image.Image) -> str:
    """A WebP of at most TILE pixels a side, inside a URI."""
    image.thumbnail((TILE, TILE))
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def real_images(data: Path, captions: set[str], resolution: int) -> dict[str, str]:
    """Caption -> data URI of the first image with it, among the first shards of both splits."""
    found = {}
    for split in ("train", "held_out"):
        manifest = data / split / "shards" / "manifest.json"
        paths = [row["path"] for row in read_manifest(manifest)["shards"]] if manifest.exists() else []
        for sample in (sample for path in paths[:SEARCHED] for sample in tars.index_tar(path)):
            caption = sample.read("txt").decode("utf-8", "replace").strip() if "txt" in sample.fields else None
            extension = next((e for e in images.IMAGE_EXTENSIONS if e in sample.fields), None)
            if caption in captions and not found.get(caption) and extension:
                found[caption] = real_image(sample.read(extension), resolution)
    return found


def real_image(data: bytes, resolution: int) -> str | None:
    """An image as a training sees it, or None where it cannot be decoded."""
    try:
        image = images.decode(data)
    except images.ImageError:
        return None
    return data_uri(images.resize_and_crop(image, resolution, "center", None))


# ---------------------------------------------------------------- curves
def training(folder: Path, row: dict) -> dict:
    """A stage's name, facts and curves."""
    log = read_log(folder / row["stage"] / "log.jsonl", row["train"]["images"])
    series = {"loss": "loss", "gradient norm": "grad_norm", "images a second": "images_per_second"}
    points = {title: [(e["images"], e[key]) for e in log if key in e] for title, key in series.items()}
    charts = [chart(title, line) for title, line in points.items() if line]
    return {"stage": row["stage"], "train": row["train"], "resolution": row["samples"]["resolution"], "charts": charts}


def chart(title: str, points: list[tuple[float, float]], width: int = 360, height: int = 190) -> dict:
    """Where a line of points and its ticks lie on a chart of width x height; x and y begin at 0."""
    left, bottom, top, right = 40, 24, 8, 12
    x_max, y_max = (max(max(values), 1e-9) for values in zip(*points, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + x / x_max * (width - left - right)
        return round(across, 1), round(height - bottom - y / y_max * (height - bottom - top), 1)

    def line(values: list[tuple[float, float]]) -> str:
        thin = values[:: math.ceil(len(values) / POINTS)]
        return " ".join("{},{}".format(*place(*point)) for point in thin)

    return {
        "title": title,
        "size": (width, height),
        "frame": (left, top, width - right, height - bottom),
        "x_ticks": [(place(x, 0)[0], short(x)) for x in ticks(x_max)],
        "y_ticks": [(place(0, y)[1], short(y)) for y in ticks(y_max)],
        "raw": line(points),
        "smooth": line(smoothed(points)),
    }


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of y over a window of a 15th of the points, centred."""
    half = len(points) // 30
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(x, statistics.fmean(y for _, y in window)) for (x, _), window in zip(points, windows, strict=True)]


def ticks(end: float) -> list[float]:
    """Three to six round numbers from 0 to `end`."""
    unit = 10 ** math.floor(math.log10(end / 2.5))
    step = next(unit * factor for factor in (1, 2, 5, 10) if end / (unit * factor) < 6)
    return [i * step for i in range(int(end / step) + 1)]


def short(value: float) -> str:
    """1500 -> 1.5k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


if __name__ == "__main__":
    main(sys.argv)
