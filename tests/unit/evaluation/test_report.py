"""Tests of the report: numbers, a self-contained page with escaped captions, no output for invalid input."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from samples import load_script, make_sample, write_tar

from sdtrain.data.manifest import write_manifest
from sdtrain.evaluation import metrics as evaluation_metrics
from sdtrain.evaluation.metrics import DISTANCES
from sdtrain.io.files import read_json, write_json, write_text

EVIL = '<script>alert("1")</script> & "quoted" \' {{ 7 * 7 }}'
SEEN = ["a red square", EVIL]
STAGES = {"stage1": (32, [0, 320]), "stage2": (64, [0, 160])}
ROWS = "stage1/0,stage1/320,stage2/0,stage2/160"
CONFIG = """
wandb: {{api_key: {key}}}
experiment: {{log_dir: logs, project: trial, name: {stage}, num_examples_to_see: 320, seed: 5}}
dataset: {{params: {{path: none, resolution: {px}}}}}
init: {init}
"""


report = load_script("report")


def write_row(folder: Path, px: int, images: int) -> None:
    """Write the records of a milestone that the report reads."""
    (folder / "samples").mkdir(parents=True)
    grids = []
    for number, (title, prompts) in enumerate(
        {"captions <b>seen</b>": SEEN, "held-out captions": ["a new thing"]}.items()
    ):
        sheet = Image.new("RGB", (2 * px, px))
        sheet.paste((10, 200, 30), (0, 0, px, px))
        sheet.paste((200, 10, 30), (px, 0, 2 * px, px))
        path = folder / "samples" / f"grid{number}.png"
        sheet.save(path)
        grids.append({"title": title, "prompts": prompts, "image": str(path), "columns": 2})
    sampling = {"guidance_scale": 2.0, "num_inference_steps": 15, "seed": 9, "resolution": px}
    record = {"images": 2, "prompts": SEEN, "folder": str(folder / "samples"), "grids": grids, **sampling}
    write_json(folder / "samples.json", record)
    trained = {"images": images, "samples": 41, "dropped": {"filters": 7}, "global_batch": 32, "world_size": 2}
    trained |= {"skipped": 1203, "rollbacks": 2}
    trained |= {"fingerprint": f"print{images}", "code": "digest", "versions": {"torch": "2.13.0"}}
    write_json(folder / "train.json", trained)
    kernel = {"metric": "kernel distance (Net)", "value": 0.5, "floor": 0.01}
    distance = {"metric": "Frechet distance (Net)", "value": 300.25 - images / 2, "floor": 70.0, "kernel": kernel}
    distance |= {"images": 192, "floor_images": 192, "reference_images": 71, "resolution": px}
    write_json(folder / "frechet_distance.json", distance)
    real = {"value": 36.6, "shuffled": 0.1, "images": 228, "resolution": 64}
    score = {
        "metric": "alignment score (Net to Text)",
        "value": 20.0,
        "shuffled": 1.0,
        "difference": 19.0,
        "images": 192,
    }
    write_json(folder / "clip_score.json", score | {"difference_standard_error": 0.5, "real": real})


@pytest.fixture
def run(tmp_path) -> dict[str, str]:
    """Write a run of two stages and its data; return the arguments of its report."""
    folder, data = tmp_path / "run", tmp_path / "data"
    for stage, (px, milestones) in STAGES.items():
        init = "null" if stage == "stage1" else "stage1"
        write_text(folder / stage / "config" / "train.yaml", CONFIG.format(stage=stage, px=px, init=init, key="SECRET"))
        lines = [{"images": 32 * i, "loss": 1 / i, "data_wait": 0.1, "images_per_second": 32.0} for i in range(1, 11)]
        lines.insert(4, {"images": 140, "event": "skipped"})
        del lines[1]["loss"]
        write_text(folder / stage / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"images": 35')
        for images in milestones:
            write_row(folder / stage / str(images), px, images)
    write_text(folder / "config" / "evaluate.yaml", "num_images: 192\n")
    (data / "train" / "shards").mkdir(parents=True)
    key, fields = make_sample(0)
    samples = [
        (key, fields | {"txt": b"a red square\n"}),
        ("000000001", fields | {"txt": EVIL.encode(), "jpg": b"broken"}),
    ]
    tar = write_tar(data / "train" / "shards" / "00000.tar", samples)
    write_manifest(data / "train" / "shards" / "manifest.json", "images", [tar], {}, {})
    row = {"column": "width", "predicate": "<b> >= 256", "null": 1, "alone_dropped": 2, "dropped": 2, "kept": 3}
    more = {"duplicates": {"column": "url", "dropped": 1234}, "rows_limit": None, "size_from": "<i> x height"}
    more["bytes"] = {"train": 5_600_000, "held_out": 780}
    write_json(data / "yields.json", {"rows": 3372, "predicates": [row], "kept": 48, "train": 41, "held_out": 7} | more)
    out = {"output": "out/metrics.json", "html": "out/report.html", "text": "out/metrics.txt"}
    return {"run": "trial", "rows": ROWS, "folder": folder, "data": data} | {k: tmp_path / v for k, v in out.items()}


def make(keys: dict) -> None:
    report.main(["report.py", *(f"{key}={value}" for key, value in keys.items())])


class Page(HTMLParser):
    """The parsed page: tags, loaded addresses, alternative texts, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.loads, self.alts, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.loads += [values[name] for name in ("src", "href", "srcset", "data", "action") if name in values]
        self.alts += [values["alt"]] if "alt" in values else []

    def handle_data(self, data):
        self.words.append(data)


def test_metrics_json_and_terminal_table(run, capsys):
    make(run)
    metrics = read_json(run["output"])
    assert [row["name"] for row in metrics["rows"]] == ["untrained", "stage1", "stage2 before training", "stage2"]
    assert [row["frechet_distance"]["value"] for row in metrics["rows"]] == [300.25, 140.25, 300.25, 220.25]
    first, second = metrics["rows"][:2]
    assert first["images_per_second"] is first["loss"] is first["data_wait_share"] is None
    assert (second["images"], second["resolution"], second["loss"], second["images_per_second"]) == (320, 32, 0.1, 32.0)
    assert second["data_wait_share"] == pytest.approx(0.1)  # 0.1 s of each second
    assert second["alignment"]["shuffled"] == 1.0 and second["frechet_distance"]["images"] == 192
    assert metrics["rows"][3]["loss"] == 0.2  # only log lines up to the milestone count
    assert (second["seed"], second["sampling"]["seed"]) == (5, 9)
    assert metrics["versions"] == {"torch": "2.13.0"} and len(metrics["code"]) == 16
    text = Path(run["text"]).read_text()
    assert text == capsys.readouterr().out
    assert text.splitlines()[-1] == str(run["html"])
    table = [line.split() for line in text.splitlines()[1:5]]
    assert table[1] == ["stage1", "320", "32", "140.2", "70.0", "192", "20.0", "1.0", "32.0"]
    assert len({len(line) for line in text.splitlines()[:5]}) == 1, "columns are aligned"


def test_page_is_self_contained_and_escaped(run):
    make(run)
    source = Path(run["html"]).read_text()
    page = Page(source)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("b") == 3, "the three headline numbers, and none from a caption"
    assert all(load.startswith("data:image/webp;base64,") for load in page.loads)
    assert not re.search(r"https?:|url\(|@import", source)
    text = "".join(page.words)
    assert EVIL in text and f"{EVIL} (stage2)" in page.alts
    assert "Captions <b>seen</b>" in text and "width <b> >= 256" in text
    assert "SECRET" not in source
    for word in (
        "Fréchet distance",
        "300.2 → 140.2",
        "41 captioned images",
        "3,372 rows",
        "1,234 passed the filters and were dropped",
        "5.6 MB to train on, 780 B",
        "from <i> x height",
        "7 by filters",
        "1,203 steps with a non-finite loss or gradient",
        "num_images: 192",
    ):
        assert word in text, word


def test_page_shows_every_stage_beside_the_real_image(run):
    make(run)
    page = Page(Path(run["html"]).read_text())
    images = dict(zip(page.alts, page.loads, strict=True))
    assert len(images) == 4 * 3 + 1  # four models, three captions; one of them has a readable real image
    assert "a red square (real image)" in images and "a new thing (real image)" not in images

    def colour(alt: str) -> tuple[tuple[int, int], tuple[int, ...]]:
        image = Image.open(io.BytesIO(base64.b64decode(images[alt].partition(",")[2])))
        return image.size, image.convert("RGB").resize((1, 1)).getpixel((0, 0))

    size, (red, green, _) = colour("a red square (untrained)")
    assert size == (32, 32) and green > 150 > red  # each tile comes from its own position in the grid
    size, (red, green, _) = colour(f"{EVIL} (stage2)")
    assert size == (64, 64) and red > 150 > green
    assert colour("a red square (real image)")[0] == (64, 64)


def test_report_of_a_run_without_score_and_without_data(run):
    for path in Path(run["folder"]).rglob("clip_score.json"):
        path.unlink()
    make(run | {"data": "", "rows": "stage1/0"})
    assert read_json(run["output"])["rows"][0]["alignment"] is None
    text = "".join(Page(Path(run["html"]).read_text()).words)
    assert "Shuffled" not in text and "rows in the table" not in text and "real image " not in text


def test_fid_kid_and_clipscore_are_named_with_their_own_networks(run):
    for path in Path(run["folder"]).rglob("frechet_distance.json"):
        record = read_json(path)
        write_json(path, record | {"metric": "FID", "kernel": record["kernel"] | {"metric": "KID"}})
    for path in Path(run["folder"]).rglob("clip_score.json"):
        record = read_json(path)
        del record["real"]
        write_json(path, record | {"metric": "CLIPScore (clip-vit-b32)"})
    make(run)
    text = "".join(Page(Path(run["html"]).read_text()).words)
    assert "FID at 64 px" in text and "KID" in text and "CLIPScore (clip-vit-b32)" in text
    assert "not CLIPScore" not in text and "not the Inception" not in text


@pytest.mark.parametrize(
    "lost, message",
    [
        ("stage2/160/train.json", "train.json: not a readable JSON file"),
        ("stage2/160/samples.json", "samples.json: not a readable JSON file"),
        ("stage1/0/frechet_distance.json", "snakemake --force"),
        ("stage1/config/train.yaml", "train.yaml: no such file"),
        ("stage1/320/samples/grid0.png", "grid0.png: not a readable image"),
    ],
)
def test_missing_input_is_an_error(run, lost, message):
    (run["folder"] / lost).unlink()
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}"):
        make(run)
    assert not run["output"].parent.exists()


@pytest.mark.parametrize("rows", ["stage1", "stage1/x", ""])
def test_malformed_rows_are_refused(run, rows):
    with pytest.raises(SystemExit, match="expected stage/images, such as stage1/32000"):
        make(run | {"rows": rows})


def test_records_that_lack_a_newer_distance_are_shown(run, monkeypatch):
    new = dataclasses.replace(DISTANCES[1], key="new", kind="new distance", about="A new explanation.")
    monkeypatch.setattr(evaluation_metrics, "DISTANCES", (*DISTANCES, new))
    make(run)
    assert "A new explanation." not in Path(run["html"]).read_text()
    for images, stage in ((0, "stage1"), (160, "stage2")):
        path = run["folder"] / stage / str(images) / "frechet_distance.json"
        write_json(path, read_json(path) | {"new": {"metric": "new distance (Net)", "value": 0.125, "floor": 0.5}})
    make(run)
    text = "".join(Page(Path(run["html"]).read_text()).words)
    assert "New distance × 1000 ↓" in text and "A new explanation." in text
    assert text.count("125.0") == 2 and "–" in text  # the milestones without the new distance show no figure


def test_record_without_a_required_key_is_refused(run):
    write_json(run["folder"] / "stage1/0/frechet_distance.json", {"metric": "FID"})
    with pytest.raises(SystemExit, match="lacks value, floor, kernel; make it again"):
        make(run)
