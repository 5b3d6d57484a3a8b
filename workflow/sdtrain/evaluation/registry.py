"""The metrics of a milestone: their records, when they are measured, and how reports show them. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdtrain.errors import ConfigError, did_you_mean

Record = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the reports: a figure of a record, `path` its keys joined by dots.

    `real` is the path of the figure that real images reach. Without a title, the column is named after the key `metric`
    beside the figure.
    """

    path: str
    title: str = ""
    arrow: str = ""  # ↓ if lower is better, ↑ if higher is better
    real: str = ""
    scale: int = 1
    form: str = "{:.1f}"
    text: bool = True  # whether metrics.txt shows it


@dataclass(frozen=True)
class Metric:
    """A metric, measured by the function `measure` of the module in this folder that is named like its record."""

    record: str  # name of its module, and of its JSON file beside a milestone
    key: str  # its key in the rows of metrics.json
    setting: str  # the key of `evaluation` that names its network; without a value it is not measured
    needed: tuple[str, ...]  # keys of the record
    columns: Callable[[Record], list[Column]]  # of a record
    note: str  # below its headline, a format string over the keys of the record
    explain: Callable[[Record], list[tuple[str, str]]]  # the terms that the report explains, each with its text
    by_resolution: bool = False  # one headline for each resolution, with the figure before training
    with_reference: bool = False  # whether it compares with the reference features of the stage
    optional: bool = True  # whether a run may leave it out

    def measure(self, samples: Record, given: dict[str, str], config: Any) -> Record:
        """Return the record of generated images: at least `metric`, the name that reports show, and `value`.

        `samples` is from `features.read_samples`; `given` has the files and folders of the metric by name: `network`
        and, where it needs them, `reference` and more; `config` is an `evaluation` section.
        """
        return importlib.import_module(f"{__package__}.{self.record}").measure(samples, given, config)


def distance_columns(record: Record) -> list[Column]:
    """Return the columns of the distance, its floor, and the further distances that the record has."""
    from sdtrain.evaluation.metrics import DISTANCES  # here, as it imports torch

    first = [
        Column("value", arrow="↓", real="floor"),
        Column("floor", title="floor"),
        Column("images", title="n", real="floor_images", form="{:,}"),
    ]
    return first + [
        Column(f"{d.key}.value", arrow=d.arrow, real=f"{d.key}.floor", scale=d.scale, text=False)
        for d in DISTANCES[1:]
        if d.key in record
    ]


def explain_distances(record: Record) -> list[tuple[str, str]]:
    """Explain the distances that the record has, and their floor."""
    from sdtrain.evaluation.metrics import DISTANCES  # here, as it imports torch

    (_, text), *further = [
        (block["metric"], distance.about.format(**record))
        for distance in DISTANCES
        if (block := record.get(distance.key) if distance.key else record)
    ]
    if record["metric"] != DISTANCES[0].inception:
        text += " Its network is not the Inception network of FID: do not compare it with published values."
    floor = (
        f"The same distance for {record['floor_images']:,} real training images. A model that reproduces its training "
        "set reaches it."
    )
    return [(record["metric"], text), ("Floor", floor), *further]


def explain_score(record: Record) -> list[tuple[str, str]]:
    """Explain CLIPScore or the alignment score, and the score with shuffled captions."""
    count, real = f"{record['images']:,} images", record.get("real")
    if record["metric"].startswith("CLIPScore"):
        text = f"100 times the cosine of CLIP's embeddings of image and caption, negative ones as 0, mean over {count}."
    else:
        text = (
            "100 times the cosine of a caption's embedding and the one that a linear map predicts from the image, mean "
            f"over {count}; 0 means unrelated. It is not CLIPScore. The map was fitted on the training images, which "
            "favours images that look like them"
        )
        if real:
            text += (
                f": real images that it was not fitted on, {real['images']:,} held-out ones at "
                f"{real['resolution']} px, score {real['value']:.1f}, and {real['shuffled']:.1f} when shuffled"
            )
        text += "."
    shuffled = (
        "The same images with captions of other images. A model that ignores captions reaches this score. In the last "
        f"row, the own caption scores {record['difference']:.1f} ± {record['difference_standard_error']:.1f} more."
    )
    return [(record["metric"], text), ("Shuffled", shuffled)]


METRICS = (
    Metric(
        record="frechet_distance",
        key="frechet_distance",
        setting="features",
        needed=("metric", "value", "floor", "kernel"),
        columns=distance_columns,
        note="Lower is better; real images reach {floor:.1f}.",
        explain=explain_distances,
        by_resolution=True,
        with_reference=True,
        optional=False,
    ),
    Metric(
        record="clip_score",
        key="alignment",
        setting="alignment",
        needed=("metric", "value", "shuffled"),
        columns=lambda record: [
            Column("value", arrow="↑", real="real.value"),
            Column("shuffled", title="shuffled", real="real.shuffled"),
        ],
        note="with the captions that the images were made from; {shuffled:.1f} with the same captions shuffled. Higher "
        "is better.",
        explain=explain_score,
    ),
)


def metric_of(record: str) -> Metric:
    """Return the metric with this record. Raise ConfigError if there is none."""
    found = {metric.record: metric for metric in METRICS}
    if record not in found:
        raise ConfigError(f"metric={record}: unknown{did_you_mean(record, found)}")
    return found[record]


def measured(evaluation: Any) -> list[Metric]:
    """Return the metrics that an `evaluation` section asks for."""
    return [metric for metric in METRICS if evaluation[metric.setting]]


def short_name(metric: str) -> str:
    """Return the name of a metric without its network, such as `Frechet distance`."""
    return metric.partition(" (")[0]


def figure(record: Record | None, path: str) -> Any:
    """Return the value at a path of a record, or None."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) and key else None
    return value
