"""Tests of DDP and FSDP on two ranks: the same training, and a sharded state."""

from __future__ import annotations

import diffusers
import pytest
import torch
from ranks import run_ranks

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.distributed import DistError
from sdtrain.training import checkpoint, parallel
from sdtrain.training.ema import Ema, trainable
from sdtrain.training.optimizer import build_optimizer, state_by_name

CPU = torch.device("cpu")


def network(params: dict, seed: int = 0) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(**params)


def images(step: int, rows: slice) -> tuple[torch.Tensor, ...]:
    """Return the inputs of a step: latents, timesteps, text states and target."""
    g = torch.Generator().manual_seed(step)
    x, goal = torch.randn(2, 4, 4, 16, 16, generator=g)
    return x[rows], torch.tensor([0, 300, 600, 900])[rows], torch.randn(4, 16, 32, generator=g)[rows], goal[rows]


def backward(model, step: int, rows: slice, share: int = 1) -> None:
    x, t, text, goal = images(step, rows)
    ((model(x, t, encoder_hidden_states=text).sample - goal).square().mean() / share).backward()


class Training:
    """A UNet with optimizer, EMA and checkpoints."""

    def __init__(self, folder, strategy: str, size: int, params: dict, seed: int = 0):
        self.unet = network(params, seed)
        self.model = parallel.spread(self.unet, strategy, size, CPU)
        self.optimizer = build_optimizer(self.unet, load_config(schema.OptimizerConfig))
        self.ema = Ema(self.unet, 0.5)
        state = {"unet": trainable(self.unet), "optimizer": state_by_name(self.optimizer, self.unet)}
        state |= {"ema": self.ema.weights}
        self.saves = checkpoint.Checkpoints(
            folder, state, main=distributed.world().is_main, group=distributed.cpu_group()
        )

    def step(self, number: int, rows: slice) -> float:
        """Take one optimizer step; return the gradient norm."""
        with parallel.reduce_gradients(self.model, now=True):
            backward(self.model, number, rows)
        norm = parallel.clip_gradients(self.unet, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.unet, number + 1)
        return norm

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the unsharded weights, raw and averaged."""
        raw = parallel.plain_unet(self.unet, main=True).state_dict()
        with self.ema.applied(self.unet):
            averaged = parallel.plain_unet(self.unet, main=True).state_dict()
        return {**raw, **{f"ema.{name}": w for name, w in averaged.items()}}


def learn(rank: int, folder, strategy: str, params: dict, start: int, stop: int, save: bool):
    """Train a rank from the checkpoint at step `start` to `stop`; return weights, norms and sizes."""
    training = Training(folder, strategy, 2, params, seed=0 if start == 0 else 9)
    if start:
        training.saves.load(start)
    norms = [training.step(number, slice(2 * rank, 2 * rank + 2)) for number in range(start, stop)]
    if save:
        training.saves.save(stop)
        training.saves.finish()
    elements = sum(
        (p.to_local() if hasattr(p, "to_local") else p).numel()
        for tensors in (training.ema.weights, *training.saves.state["optimizer"].values())
        for p in tensors.values()
    )
    return {name: w.clone() for name, w in training.weights().items()}, norms, elements


def alone(params: dict, folder, start: int, stop: int) -> tuple[dict, list[float]]:
    """Train in one process, with all four images at once."""
    training = Training(folder, "ddp", 1, params, seed=0 if start == 0 else 9)
    if start:
        training.saves.load(start)
    norms = [training.step(number, slice(0, 4)) for number in range(start, stop)]
    return training.weights(), norms


def close(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 1e-4, "atol": 2e-5}))


@pytest.fixture(scope="module")
def trained(tiny_unet_params, tmp_path_factory):
    """Return strategy -> (folder with a checkpoint at step 2, results of each rank)."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        folder = tmp_path_factory.mktemp(strategy)
        found[strategy] = folder, run_ranks(learn, 2, folder, strategy, tiny_unet_params, 0, 2, True)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_give_the_same_weights_as_one_process(trained, tiny_unet_params, tmp_path, strategy):
    expected, norms = alone(tiny_unet_params, tmp_path, 0, 2)
    for weights, found, _ in trained[strategy][1]:
        close(weights, expected)
        assert found == pytest.approx(norms, rel=1e-4)


def test_each_of_two_sharded_ranks_holds_half_of_the_state(trained):
    replicated, sharded = (trained[strategy][1][0][2] for strategy in ("ddp", "fsdp"))
    assert 0.5 * replicated <= sharded < 0.55 * replicated


@pytest.mark.parametrize(("saved_by", "read_by"), [("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")])
def test_each_strategy_resumes_from_checkpoints_of_the_other(trained, tiny_unet_params, saved_by, read_by):
    folder = trained[saved_by][0]
    (weights, _, _), _ = run_ranks(learn, 2, folder, read_by, tiny_unet_params, 2, 4, False)
    close(weights, alone(tiny_unet_params, folder, 2, 4)[0])
    (same, _, _), _ = run_ranks(learn, 2, folder, read_by, tiny_unet_params, 2, 2, False)
    close(same, trained[saved_by][1][0][0], rtol=0, atol=0)


def accumulate(rank: int, strategy: str, params: dict):
    """Return a gradient after the first of two micro-batches, and after both."""
    unet = network(params)
    model = parallel.spread(unet, strategy, 2, CPU)
    with parallel.reduce_gradients(model, now=False):
        backward(model, 0, slice(rank, rank + 1), 2)
    name, weight = next((n, p) for n, p in unet.named_parameters() if p.dim() == 4)
    first = weight.grad
    lone = None if first is None else parallel.whole(first).clone()
    with parallel.reduce_gradients(model, now=True):
        backward(model, 0, slice(2 + rank, 3 + rank), 2)
    return lone, parallel.whole(dict(unet.named_parameters())[name].grad).clone()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_reduced_only_after_the_last_micro_batch(tiny_unet_params, strategy):
    unet = network(tiny_unet_params)
    backward(unet, 0, slice(0, 4))
    expected = next(p.grad for p in unet.parameters() if p.dim() == 4)
    (lone0, both0), (lone1, both1) = run_ranks(accumulate, 2, strategy, tiny_unet_params)
    torch.testing.assert_close(both0, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(both0, both1)
    if strategy == "ddp":
        assert not torch.allclose(lone0, lone1, rtol=0.1)
    else:
        assert lone0 is None and lone1 is None  # sharded gradients exist only after the reduction


@pytest.mark.parametrize("max_norm", [0.5, 2.0, None])
def test_gradients_are_clipped_to_the_largest_norm(max_norm):
    module = torch.nn.Linear(1, 1)
    module.weight.grad, module.bias.grad = torch.full((1, 1), 0.6), torch.full((1,), 0.8)
    assert parallel.clip_gradients(module, max_norm).item() == pytest.approx(1.0)
    scale = 0.5 if max_norm == 0.5 else 1.0
    found = [module.weight.grad.item(), module.bias.grad.item()]
    assert found == pytest.approx([0.6 * scale, 0.8 * scale], rel=1e-5)


def start_average(rank: int, params: dict):
    """Return the UNet's unsharded weights while a sharded EMA of other weights is applied, and afterwards."""
    unet = network(params)
    parallel.spread(unet, "fsdp", 2, CPU)
    ema = Ema(unet, 0.5)
    ema.load(dict(network(params, seed=5).named_parameters()))
    with ema.applied(unet):
        inside = parallel.plain_unet(unet, main=True).state_dict()
    return inside, parallel.plain_unet(unet, main=True).state_dict()


def test_sharded_ema_can_start_from_other_weights(tiny_unet_params):
    for inside, after in run_ranks(start_average, 2, tiny_unet_params):
        close(inside, network(tiny_unet_params, seed=5).state_dict(), rtol=0, atol=0)
        close(after, network(tiny_unet_params).state_dict(), rtol=0, atol=0)


def test_fsdp_needs_more_than_one_rank(tiny_unet_params):
    with pytest.raises(DistError, match="distributed.strategy: fsdp needs more than one rank"):
        parallel.spread(network(tiny_unet_params), "fsdp", 1, CPU)


@pytest.mark.parametrize("how", ["model", "blocks"])
def test_compiled_unet_gives_the_same_gradients(tiny_unet_params, how):
    torch._dynamo.config.suppress_errors = False
    plain, compiled = network(tiny_unet_params), network(tiny_unet_params)
    with pytest.MonkeyPatch.context() as patch:
        # the eager backend traces like the others; generating code takes minutes on a CPU
        compile_of = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda module, **how: compile_of(module, backend="aot_eager", **how))
        parallel.compile_model(compiled, how)
    for unet in (plain, compiled):
        backward(unet, 0, slice(0, 4))
    for (name, a), (other, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_blocks_are_resnets_and_transformers(tiny_unet_params):
    kinds = {type(block).__name__ for block in parallel.blocks(network(tiny_unet_params))}
    assert kinds == {"ResnetBlock2D", "Transformer2DModel"}


# ---------------------------------------------------------------- micro-batches that fit
@pytest.fixture
def gpu(monkeypatch):
    """Simulate the memory of a GPU of 100 bytes: gpu(images) uses 12 bytes per image."""
    used = [0]
    properties = type("Properties", (), {"total_memory": 100})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: used.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def attempt(images: int, each: int = 12) -> None:
        if images * each > 100:
            raise torch.OutOfMemoryError
        used[0] = images * each

    return attempt


@pytest.mark.parametrize(("share", "found"), [(64, 4), (6, 6), (7, 7), (1, 1), (9, 3), (16, 4)])
def test_auto_batch_size_is_the_largest_divisor_that_leaves_a_tenth_free(gpu, share, found):
    assert parallel.largest_that_fits(share, gpu, CPU) == found  # 8 would fill 96 of 100


def test_one_image_that_does_not_fit_is_an_error(gpu):
    with pytest.raises(DistError, match="not even one image fits the GPU; set model.gradient_checkpointing=true"):
        parallel.largest_that_fits(8, lambda images: gpu(images, 200), CPU)
