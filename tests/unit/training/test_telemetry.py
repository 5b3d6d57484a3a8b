"""Tests of telemetry: the log after interruptions, counted FLOPs, and a wandb key that is in no file."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import socket
import time
from pathlib import Path

import diffusers
import peft
import pytest
import torch
import wandb
from diffusers.models.attention_processor import XFormersAttnProcessor
from omegaconf import OmegaConf
from PIL import Image
from samples import ROOT
from wandb.proto import wandb_internal_pb2

from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError
from sdtrain.training.telemetry import Telemetry, peak_flops, start_wandb, training_flops


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_entries_are_written_immediately(tmp_path):
    log = tmp_path / "run/log.jsonl"
    telemetry = Telemetry(log, total=40)
    entry = telemetry.log(10, {"loss": 0.123456789, "lr": 1.0})
    assert entry["loss"] == 0.123456789 and entry["images_per_second"] > 0
    assert lines(log)[0]["loss"] == 0.123457  # already before close()
    telemetry.log(20, {"loss": 0.5})
    telemetry.close()
    assert [line["images"] for line in lines(log)] == [10, 20]


@pytest.mark.parametrize(("start", "kept"), [(0, []), (10, [10]), (25, [10, 20]), (40, [10, 20, 30, 40])])
def test_resume_drops_log_lines_after_its_start(tmp_path, start, kept):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"images": i, "loss": 1.0}) + "\n" for i in (10, 20, 30, 40)))
    telemetry = Telemetry(log, total=100, start=start)
    telemetry.log(50, {"loss": 2.0})
    telemetry.close()
    assert [line["images"] for line in lines(log)] == [*kept, 50] and os.listdir(tmp_path) == ["log.jsonl"]


@pytest.mark.parametrize("cut", ['{"images": 2', '{"images', "7", '{"loss": 1.0}', '{"images": "2"}', "\0\0"])
def test_truncated_last_line_is_dropped(tmp_path, cut):
    log = tmp_path / "log.jsonl"
    log.write_text('{"images": 10}\n' + cut)
    Telemetry(log, total=100, start=90).close()
    assert lines(log) == [{"images": 10}]


def test_throughput_is_logged_in_total_and_per_gpu(tmp_path):
    telemetry = Telemetry(tmp_path / "log", total=100, world_size=4, flops_per_image=3e9, peak=1e12)
    time.sleep(0.05)
    entry = telemetry.log(40, {"loss": 1.0, "data_wait": 0.02})
    assert entry["images_per_second_per_gpu"] == pytest.approx(entry["images_per_second"] / 4)
    assert entry["mfu"] == pytest.approx(entry["images_per_second"] / 4 * 3e9 / 1e12)
    assert entry["data_wait"] == pytest.approx(0.02 * entry["images_per_second"] / 40) and entry["data_wait"] < 0.4
    assert telemetry.log(80, {"data_wait": 1000.0})["data_wait"] == 1.0
    telemetry.close()
    assert lines(tmp_path / "log")[0].keys() == entry.keys()


@pytest.mark.parametrize("known", [{}, {"flops_per_image": 1e9}, {"peak": 1e12}, {"flops_per_image": 0, "peak": 1e12}])
def test_no_mfu_without_peak_or_flops(known):
    entry = Telemetry(None, total=10, **known).log(10, {"loss": 1.0})
    assert "mfu" not in entry and "data_wait" not in entry


def test_memory_is_the_peak_of_the_process_on_a_cpu():
    block = b"x" * 300_000_000
    entry = Telemetry(None, total=10, device=torch.device("cpu")).log(10, {})
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert pages * os.sysconf("SC_PAGE_SIZE") / 1e9 <= entry["memory_gb"] * 1.01 < 64 and len(block) == 300_000_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_is_the_peak_of_the_gpu_since_the_last_line():
    telemetry = Telemetry(None, total=10, device=torch.device("cuda"))
    torch.empty(2_000_000_000, dtype=torch.uint8, device="cuda")
    assert telemetry.log(5, {})["memory_gb"] >= 2 > telemetry.log(10, {})["memory_gb"]


def test_small_numbers_keep_their_digits_and_non_finite_ones_are_left_out(tmp_path):
    telemetry = Telemetry(tmp_path / "log", total=10)
    telemetry.log(10, {"lr": 1.23456789e-8, "loss_q1": math.nan, "grad_norm": math.inf, "skipped": 3})
    (line,) = lines(tmp_path / "log")
    assert line["lr"] == 1.23457e-8 and line["skipped"] == 3 and not {"loss_q1", "grad_norm"} & line.keys()


def test_time_of_saving_does_not_count_for_the_throughput():
    telemetry = Telemetry(None, total=100)
    time.sleep(0.05)
    with telemetry.excluded():
        time.sleep(1.0)
    assert telemetry.log(10, {"loss": 1.0})["images_per_second"] > 15  # 10 in 1.05 s would be 9.5
    time.sleep(0.5)
    assert telemetry.log(20, {"loss": 1.0})["images_per_second"] < 20.1
    telemetry.close()


def test_progress_is_printed_as_lines_without_a_terminal(capfd):
    telemetry = Telemetry(None, total=2000, start=1000, label="demo/stage1")
    time.sleep(0.01)
    telemetry.log(1500, {"loss": 0.25})
    telemetry.log(1600, {"loss": 0.25})  # not printed: less than ten seconds later
    telemetry.log(2000, {"loss": 0.2})
    telemetry.close()
    said = capfd.readouterr().out.splitlines()
    assert (
        len(said) == 2
        and said[0].startswith("demo/stage1: 1,500 of 2,000 images, ")
        and "loss 0.2500, 0:00 left" in said[0]
    )
    quiet = Telemetry(None, total=10, quiet=True)
    quiet.log(10, {"loss": 1.0})
    quiet.close()
    assert capfd.readouterr().out == ""


def test_event_is_logged_and_printed(tmp_path, capfd):
    telemetry = Telemetry(tmp_path / "log", total=10, label="demo")
    telemetry.note(1000, "rolled back", position=1200, reason="loss is nan", loss=math.nan)
    telemetry.note(2000, "skipped a step")
    assert lines(tmp_path / "log") == [
        {"images": 1000, "position": 1200, "event": "rolled back", "reason": "loss is nan"},
        {"images": 2000, "event": "skipped a step"},
    ]
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "demo: 1,000 images: rolled back, reason loss is nan, loss nan" and len(said) == 2
    Telemetry(None, total=10, quiet=True).note(5, "skipped a step")
    assert capfd.readouterr().out == ""


def test_rollback_removes_metrics_and_keeps_events(tmp_path):
    telemetry = Telemetry(tmp_path / "log", total=100)
    for images in (10, 20, 30):
        telemetry.log(images, {"loss": 1.0})
    telemetry.note(30, "skipped a step")
    telemetry.rewind(10)
    assert telemetry.log(20, {"loss": 2.0}, position=40)["images_per_second"] > 0
    found = [(line["images"], line.get("position"), line.get("loss")) for line in lines(tmp_path / "log")]
    assert found == [(10, None, 1.0), (30, None, None), (20, 40, 2.0)]
    Telemetry(None, total=10).rewind(0)  # a rank that writes no file


MEASURED = {"images_per_second", "images_per_second_per_gpu", "memory_gb"}


class Killed(Exception):
    """Raised to end a training between two of its actions."""


def train(log: Path, saved: dict, budget: int) -> None:
    """Train 100 images in steps of 10 and raise Killed after `budget` actions; `saved` is its checkpoint.

    It saves every 20 images. Data at positions 50..70 and 110..130 give no finite loss; after two such steps in a row
    it returns to its checkpoint and continues with the following data.
    """
    state = copy.deepcopy(saved)
    telemetry = Telemetry(log, total=100, start=state["images"], position=state["position"])
    telemetry.quiet = True

    def act(function, *arguments, **options):
        nonlocal budget
        budget -= 1
        if budget < 0:
            with log.open("a") as file:
                file.write('{"images": 4')  # cut
            raise Killed
        function(*arguments, **options)

    while state["images"] < 100:
        state["images"] += 10
        state["position"] += 10
        where = {"position": state["position"]}
        bad = state["position"] in (50, 60, 70, 110, 120, 130)
        state["in_a_row"] = state["in_a_row"] + 1 if bad else 0
        if bad:
            act(telemetry.note, state["images"], "skipped a step", **where)
        if state["in_a_row"] == 2:
            act(telemetry.rewind, saved["images"])
            act(telemetry.note, saved["images"], "rolled back", **where)
            state |= {"images": saved["images"], "in_a_row": 0}
            continue
        act(telemetry.log, state["images"], {"loss": state["position"] / 7}, **where)
        if state["images"] % 20 == 0:
            act(saved.update, state)
    telemetry.close()


def what_is_logged(folder: Path, budgets: list[int]) -> tuple[list[dict], int]:
    """Return the log of a training that is killed after each of these numbers of actions, and the number of kills."""
    folder.mkdir()
    saved, kills = {"images": 0, "position": 0, "in_a_row": 0}, 0
    for budget in [*budgets, 10**9]:
        try:
            train(folder / "log", saved, budget)
            break
        except Killed:
            kills += 1
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(folder / "log")], kills


def test_killed_training_has_the_same_log_as_an_uninterrupted_one(tmp_path):
    whole, _ = what_is_logged(tmp_path / "whole", [])
    metrics = [line for line in whole if "event" not in line]
    assert [line["images"] for line in metrics] == [*range(10, 110, 10)]  # each image once, as trained last
    events = [
        (line["event"], line["images"], line.get("position", line["images"])) for line in whole if "event" in line
    ]
    back = [event[1:] for event in events if event[0] == "rolled back"]
    assert back == [(40, 60), (80, 120)] and len(events) == 2 + 6
    budget = 0
    while True:
        found, kills = what_is_logged(tmp_path / f"{budget}", [budget, 7, 5])
        assert found == whole, f"killed after {budget} actions"
        if not kills:
            break
        budget += 1
    assert budget > 25


# ---------------------------------------------------------------- model FLOPs
@pytest.fixture
def unet(tiny_unet_params):
    return diffusers.UNet2DConditionModel(**tiny_unet_params)


@pytest.mark.parametrize(("side", "gflops"), [(32, 537), (64, 2407)])
def test_flops_of_stable_diffusion_have_the_known_values(side, gflops):
    params = OmegaConf.load(ROOT / "configs/sd-v1.yaml").model.unet.params
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**OmegaConf.to_container(params))
    assert training_flops(unet, (4, side, side), (77, 768)) / 1e9 == pytest.approx(gflops, rel=1e-3)


def test_attention_is_counted_forward_and_backward(unet):
    """One more text token adds its keys and values (with weight gradients) and its share of the attention, 3 times."""
    places = [(16, 64)] * 3 + [(32, 16)]  # channels and pixels of the cross-attentions
    expected = sum(4 * 2 * 32 * c + 3 * 2 * 2 * pixels * c for c, pixels in places)
    assert training_flops(unet, (4, 8, 8), (17, 32)) - training_flops(unet, (4, 8, 8), (16, 32)) == expected


def test_flops_do_not_depend_on_kernel_checkpointing_or_precision(unet):
    plain = training_flops(unet, (4, 8, 8), (16, 32))
    unet.enable_gradient_checkpointing()
    unet.set_attn_processor(XFormersAttnProcessor())
    unet.to(memory_format=torch.channels_last, dtype=torch.bfloat16).compile()
    unet.down_blocks[0].compile()
    assert training_flops(unet, (4, 8, 8), (16, 32)) == plain
    assert unet.is_gradient_checkpointing and unet.device.type == "cpu" and unet.conv_in.weight.grad is None
    assert all(isinstance(p, XFormersAttnProcessor) for p in unet.attn_processors.values())


def test_flops_exclude_gradients_of_frozen_weights(unet):
    full = training_flops(unet, (4, 8, 8), (16, 32))
    unet.requires_grad_(False).add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert 0.6 < training_flops(unet, (4, 8, 8), (16, 32)) / full < 0.8  # a forward pass and half of a backward pass


def test_flops_that_cannot_be_counted_are_a_warning(tiny_unet_params):
    more = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    unet = diffusers.UNet2DConditionModel(**tiny_unet_params, **more)
    with pytest.warns(UserWarning, match=r"no mfu is logged: the FLOPs of this UNet cannot be counted \(.+\)"):
        assert training_flops(unet, (4, 8, 8), (16, 32)) == 0


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA A10G", 70, 35, 35),
        ("NVIDIA H100 80GB HBM3", 989, 494, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H100 NVL", 835, 417, 60),
        ("NVIDIA H200", 989, 494, 67),
        ("NVIDIA GH200 480GB", 989, 494, 67),
        ("NVIDIA B200", 2250, 1125, 75),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("Tesla V100-SXM2-32GB", 125, 15.7, 15.7),
        ("Tesla V100-PCIE-16GB", 112, 14, 14),
        ("NVIDIA GeForce RTX 4090", 165, 82.6, 82.6),
    ],
)
def test_peaks_of_known_devices(monkeypatch, name, bf16, tf32, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    assert peak_flops(device, True) == bf16 * 1e12
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert peak_flops(device, False) == tf32 * 1e12
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert peak_flops(device, False) == fp32 * 1e12
    assert peak_flops(device, True, 42.5) == 42.5e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM2e",
        "NVIDIA A40-48Q",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_unknown_device_has_no_peak(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), True) is None and peak_flops(torch.device("cuda"), True, 10) == 1e13


def test_cpu_has_a_peak_only_if_it_is_configured():
    assert peak_flops(torch.device("cpu"), False) is None and peak_flops(torch.device("cpu"), False, 0.5) == 5e11


# ---------------------------------------------------------------- wandb
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Set an environment without wandb key, mode and network, and without earlier wandb settings."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.setenv(name, "")  # so that it is restored after the code under test sets it
        monkeypatch.delenv(name)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # the server is closed from here on
    settings = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_INIT_TIMEOUT": "2", "HOME": str(tmp_path / "home")}
    settings |= {"NETRC": str(tmp_path / "home/netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "home/config")}
    (tmp_path / "home").mkdir()
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def stage(folder, **wandb):
    experiment = {"log_dir": str(folder), "project": "p", "name": "n", "num_examples_to_see": 10}
    return load_config(
        schema.StageConfig, values={"wandb": wandb, "experiment": experiment, "dataset": {"params": {"path": "x"}}}
    )


def assert_not_written(folder: Path) -> None:
    """Assert that no file below a folder contains the key."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files and not [file for file in files if SECRET.encode() in file.read_bytes()]


def records(folder: Path) -> list:
    """Return the records of an offline run, stored as a LevelDB log in blocks of 32 KiB after a header."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a complete record, or its last part
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def history(folder: Path) -> list[dict]:
    """Return the log entries of an offline run."""
    rows = [record.history for record in records(folder) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def test_an_offline_run_is_written_without_the_key(tmp_path, environment):
    environment.setenv("WANDB_MODE", "offline")
    environment.setattr("sys.argv", ["train.py", f"wandb.api_key={SECRET}", "config=x.yaml"])
    run = start_wandb(stage(tmp_path, api_key=SECRET), tmp_path, "abc123")
    assert (run.id, run.settings.resume, run.settings.mode) == ("abc123", "allow", "offline")
    telemetry = Telemetry(tmp_path / "log.jsonl", total=10, wandb=run)
    telemetry.log(5, {"loss": 0.5})
    telemetry.close()
    (binary,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert "abc123" in binary.name and b"num_examples_to_see" in binary.read_bytes()
    assert b"config=x.yaml" in b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert_not_written(tmp_path)


def test_wandb_run_has_the_configured_entity_project_and_name(tmp_path, environment):
    run = start_wandb(stage(tmp_path, entity="team", mode="offline"), tmp_path, "abc")
    assert (run.settings.entity, run.settings.project, run.settings.run_name) == ("team", "p", "n")
    run.finish()


def test_wandb_receives_entries_by_images_seen_and_pictures(tmp_path, environment):
    telemetry = Telemetry(None, total=30, wandb=start_wandb(stage(tmp_path), tmp_path, "abc"))
    for images in (10, 20):
        telemetry.log(images, {"loss": 0.5, "loss_q1": math.nan})
    telemetry.rewind(10)
    telemetry.note(10, "rolled back", position=20)
    telemetry.log(20, {"loss": 0.25}, position=30)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "grid.png")
    telemetry.log_image(20, tmp_path / "grid.png")
    telemetry.close()
    rows = history(tmp_path)
    assert [(row["images"], row.get("loss")) for row in rows] == [
        (10, 0.5),
        (20, 0.5),
        (10, None),
        (20, 0.25),
        (20, None),
    ]
    assert rows[2]["event"] == "rolled back" and "loss_q1" not in rows[0]
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/*.png")
    assert "samples/path" in rows[4] and Image.open(picture).getpixel((0, 0)) == (255, 0, 0)
    (axis,) = [r.metric for r in records(tmp_path) if r.WhichOneof("record_type") == "metric"]
    assert (axis.glob_name, axis.step_metric) == ("*", "images")


def test_wandb_is_offline_without_a_key_and_off_if_disabled(tmp_path, environment):
    assert start_wandb(stage(tmp_path, mode="disabled"), tmp_path, "x") is None
    run = start_wandb(stage(tmp_path), tmp_path, "y")
    assert run.settings.mode == "offline"
    run.finish()


@pytest.mark.parametrize("where", ["configuration", "environment", "netrc"])
def test_wandb_is_online_with_a_key_and_a_missing_server_is_an_error(tmp_path, environment, where):
    cfg = stage(tmp_path, **({"api_key": SECRET} if where == "configuration" else {}))
    if where == "environment":
        environment.setenv("WANDB_API_KEY", SECRET)
    if where == "netrc":
        host = os.environ["WANDB_BASE_URL"].removeprefix("http://")
        Path(os.environ["NETRC"]).write_text(f"machine {host}\n  login user\n  password {SECRET}\n")
    with pytest.raises(ConfigError) as error:
        start_wandb(cfg, tmp_path / "run", "abc")
    message = str(error.value)
    assert message.startswith("wandb.mode=online: ") and "set wandb.mode=offline" in message and "\n" not in message
    assert "connection refused" in message
    assert SECRET not in message
    if where != "netrc":
        assert_not_written(tmp_path)


def test_wandb_online_without_a_key_is_an_error(tmp_path, environment):
    with pytest.raises(
        ConfigError, match=r"^wandb.mode=online: no key is known: run wandb login, or set WANDB_API_KEY"
    ):
        start_wandb(stage(tmp_path, mode="online"), tmp_path, "abc")


@pytest.mark.parametrize(
    "bad", [{"WANDB_API_KEY": "short"}, {"WANDB_API_KEY": f" {SECRET}"}, {"WANDB_MODE": "sideways"}]
)
def test_settings_that_wandb_refuses_are_an_error(tmp_path, environment, bad):
    for name, value in bad.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        start_wandb(stage(tmp_path), tmp_path, "abc")
    message = str(error.value)
    assert (
        message.startswith("wandb.mode=") and "\n" not in message and "short" not in message and SECRET not in message
    )


def test_training_continues_if_the_process_of_wandb_ends(tmp_path, environment):
    telemetry = Telemetry(tmp_path / "log", total=20, wandb=start_wandb(stage(tmp_path), tmp_path, "abc"))
    telemetry.log(10, {"loss": 1.0})
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"wandb-core") and str(os.getpid()).encode() in words:
                os.kill(int(process.name), signal.SIGKILL)
    with pytest.warns(UserWarning, match="wandb stopped .*Connection.*; the training continues"):
        while telemetry.wandb:
            telemetry.log(20, {"loss": 0.5})
    telemetry.close()
    assert {line["images"] for line in lines(tmp_path / "log")} == {10, 20}
    with contextlib.suppress(OSError):
        wandb.teardown()
