"""The step report: metrics.json, a table for the terminal, and a self-contained report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from omegaconf import OmegaConf

from sdtrain.config import schema
from sdtrain.config.fingerprint import code_digest, fingerprint
from sdtrain.config.load import load_config, require
from sdtrain.data import yields
from sdtrain.errors import ConfigError
from sdtrain.evaluation.charts import chart
from sdtrain.evaluation.features import read_record, read_samples
from sdtrain.evaluation.pictures import show_grids
from sdtrain.evaluation.registry import METRICS, Column, Metric, figure, short_name
from sdtrain.io.files import read_json
from sdtrain.io.logs import read_log

TEMPLATE = Path(__file__).with_name("report.html.j2")
# keys of train.json
TRAINED = ["images", "samples", "dropped", "skipped", "rollbacks", "global_batch", "world_size"]
TRAINED += ["fingerprint", "code", "versions"]
CURVES = {"loss": "loss", "gradient norm": "grad_norm", "images a second": "images_per_second"}  # title: log key


# ---------------------------------------------------------------- reading
def read_row(folder: Path, name: str) -> dict[str, Any]:
    """Return the records of a milestone, such as stage1/32000; `metrics` has None for one that was not measured."""
    stage, _, images = name.partition("/")
    if not stage or not images.isdigit():
        raise ConfigError(f"rows={name}: expected stage/images, such as stage1/32000")
    beside = folder / stage / images
    config = require(load_config(schema.StageConfig, folder / stage / "config" / "train.yaml"), name)
    train = read_record(beside / "train.json", *TRAINED)
    return {
        "stage": stage,
        "config": config,
        "train": train,
        "samples": read_samples(beside / "samples.json"),
        "metrics": {metric.key: read_metric(beside, metric) for metric in METRICS},
        "log": read_frame(folder / stage / "log.jsonl", train["images"]),
    }


def read_metric(folder: Path, metric: Metric) -> dict[str, Any] | None:
    """Return the record of a metric without its code digest; None if it was left out."""
    path = folder / f"{metric.record}.json"
    if metric.optional and not path.exists():
        return None
    return {key: value for key, value in read_record(path, *metric.needed).items() if key != "code"}


def read_frame(path: Path, until: int) -> pd.DataFrame:
    """Return the measurements of a training log up to `until` images, without events; empty if nothing was trained."""
    entries = read_log(path) if path.exists() else []
    measured = [entry for entry in entries if entry["images"] <= until and "event" not in entry]
    keys = ("images", "loss", "mfu", "images_per_second", "data_wait", *CURVES.values())
    return pd.DataFrame(measured, columns=list(dict.fromkeys(keys)))


# ---------------------------------------------------------------- metrics.json and the terminal
def summary(run: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of metrics.json."""
    return {
        "run": run,
        "rows": [row_metrics(row) for row in rows],
        "fingerprint": fingerprint([row["train"]["fingerprint"] for row in rows]),
        "code": code_digest(),
        "versions": rows[-1]["train"]["versions"],
    }


def row_metrics(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one milestone."""
    samples, log = row["samples"], row["log"]
    losses, mfu = log["loss"].dropna(), log["mfu"].dropna()
    return {
        "name": row_name(row),
        "stage": row["stage"],
        "images": row["train"]["images"],
        "resolution": samples["resolution"],
        **row["metrics"],
        "images_per_second": float(log["images_per_second"].median()) if len(log) else None,
        "data_wait_share": data_wait_share(log),
        "loss": float(losses.iloc[-1]) if len(losses) else None,
        "mfu": float(mfu.median()) if len(mfu) else None,
        "seed": row["config"].experiment.seed,
        "sampling": {key: samples[key] for key in ("guidance_scale", "num_inference_steps", "seed") if key in samples},
        "fingerprint": row["train"]["fingerprint"],
        "code": row["train"]["code"],
    }


def row_name(row: dict[str, Any]) -> str:
    """Return the name of a milestone: untrained, stage1, or stage2 before training (a stage's initial weights)."""
    if row["train"]["images"]:
        return row["stage"]
    return f"{row['stage']} before training" if row["config"].init or row["config"].model.pretrained else "untrained"


def data_wait_share(log: pd.DataFrame) -> float | None:
    """Return the share of the training time spent waiting for data, 0..1."""
    spans = (log["images"].diff() / log["images_per_second"]).iloc[1:]
    waited = spans * log["data_wait"].iloc[1:]
    # Python's sum adds in order; that of pandas differs in the last bits
    return sum(waited.tolist()) / sum(spans.tolist()) if len(spans) else None


def columns(rows: list[dict[str, Any]]) -> list[tuple[Metric, Column]]:
    """Return the columns of all metrics that the last row has."""
    last = rows[-1]
    return [(metric, column) for metric in METRICS if last[metric.key] for column in metric.columns(last[metric.key])]


def title_of(record: dict[str, Any], column: Column) -> str:
    """Return the title of a column: its own, or the short name of the metric beside the figure."""
    beside = ".".join([*column.path.split(".")[:-1], "metric"])
    return column.title or short_name(figure(record, beside))


def cell(record: dict[str, Any] | None, path: str, column: Column, missing: str) -> str:
    """Return a figure of a record as text, or `missing`."""
    value = figure(record, path)
    return missing if value is None else column.form.format(column.scale * value)


def terminal_table(rows: list[dict[str, Any]]) -> str:
    """Return the most important figures as an aligned table, and the full names of the metrics."""
    shown = [(metric, column) for metric, column in columns(rows) if column.text]
    titles = [title_of(rows[-1][metric.key], column) for metric, column in shown]
    lines = [["", "images seen", "px", *titles, "img/s"]]
    for row in rows:
        cells = [cell(row[metric.key], column.path, column, "") for metric, column in shown]
        rate = row["images_per_second"]
        lines.append([row["name"], f"{row['images']:,}", str(row["resolution"]), *cells, f"{rate:.1f}" if rate else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust] + [str.rjust] * (len(widths) - 1)
    text = ["  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)) for line in lines]
    return "\n".join([*text, "; ".join(rows[-1][metric.key]["metric"] for metric in METRICS if rows[-1][metric.key])])


# ---------------------------------------------------------------- report.html
def render(metrics: dict[str, Any], folder: Path, rows: list[dict[str, Any]], data: Path | None) -> str:
    """Return the page; images and curves are embedded."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"comma": "{:,}".format, "round1": "{:.1f}".format, "title1": heading}
    environment.filters["bytes"] = yields.show_bytes
    stages = {row["stage"]: row for row in rows}  # the last milestone of each
    evaluate = folder / "config" / "evaluate.yaml"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metrics=metrics,
        pretrained=bool(rows[0]["config"].model.pretrained),
        headlines=headlines(metrics["rows"]),
        table=html_table(metrics["rows"]),
        terms=terms(metrics["rows"][-1]),
        grids=show_grids(rows, [row_name(row) for row in rows], data),
        trainings=[training(row) for row in stages.values() if row["train"]["images"]],
        yields=read_json(data / "yields.json") if data and (data / "yields.json").exists() else None,
        configs={f"{stage}: training": show_config(row["config"]) for stage, row in stages.items()}
        | ({"evaluation": evaluate.read_text(encoding="utf-8")} if evaluate.exists() else {}),
    )


def heading(text: str) -> str:
    """Return a text with a capital first letter, and the name of Maurice Fréchet as he wrote it."""
    return (text[:1].upper() + text[1:]).replace("Frechet", "Fréchet")


def show_config(config: Any) -> str:
    """Return the configuration of a stage as YAML, without the one secret that it can contain."""
    return OmegaConf.to_yaml(OmegaConf.merge(config, {"wandb": {"api_key": None}}), resolve=True)


def headlines(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the cards that open the page: a metric's last figure, or its first and last one per resolution."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["resolution"], []).append(row)
    found = []
    for metric in METRICS:
        for resolution, group in groups.items() if metric.by_resolution else [(0, rows[-1:])]:
            last = group[-1][metric.key]
            if last is None:
                continue
            compared = [group[0], group[-1]] if len(group) > 1 else []
            place = f" at {resolution} px" if metric.by_resolution else ""
            names = " → ".join(row["name"] for row in compared)
            values = [row[metric.key]["value"] for row in compared] or [last["value"]]
            found.append(
                {
                    "title": short_name(last["metric"]) + place,
                    "value": " → ".join(f"{value:.1f}" for value in values),
                    "note": (f"{names}. " if names else "") + metric.note.format(**last),
                }
            )
    return found


def html_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return titles, rows and, for each resolution, the figures that real images reach."""
    shown = columns(rows)
    titles = []
    for metric, column in shown:
        times = f" × {column.scale}" if column.scale != 1 else ""
        title = title_of(rows[-1][metric.key], column)
        titles.append(f"{heading(title)}{times} {column.arrow}" if column.arrow else title)
    cells = [[cell(row[metric.key], column.path, column, "–") for metric, column in shown] for row in rows]
    last = {row["resolution"]: row for row in rows}
    real = {px: [real_cell(row[metric.key], column, px) for metric, column in shown] for px, row in last.items()}
    return {"titles": titles, "rows": list(zip(rows, cells, strict=True)), "real": real}


def real_cell(record: dict[str, Any] | None, column: Column, resolution: int) -> str:
    """Return the figure of real images; empty if it was measured at another resolution."""
    measured_at = figure(record, "real.resolution") if column.real.startswith("real.") else resolution
    return cell(record, column.real, column, "") if measured_at == resolution else ""


def terms(last: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the terms that the page explains."""
    return [term for metric in METRICS if last[metric.key] for term in metric.explain(last[metric.key])]


def training(row: dict[str, Any]) -> dict[str, Any]:
    """Return the name, the facts and the curves of a stage."""
    log = row["log"].set_index("images")
    lines = {title: log[key].dropna() for title, key in CURVES.items()}
    charts = [chart(title, line) for title, line in lines.items() if len(line)]
    return {"stage": row["stage"], "train": row["train"], "resolution": row["samples"]["resolution"], "charts": charts}
