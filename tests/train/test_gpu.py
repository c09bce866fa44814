"""What holds on CPUs holds on a CUDA device: attention's kernel, gradients, loss, a killed run.

The kernel knows 16 bits only, so it is held against attention in float32 on the same values,
document by document; what must be equal to the bit (nothing leaks, a run goes on) is so in 16 bits.
"""

import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
import torch
from torch import Tensor, nn

from srft_prep.manifest import read_manifest
from srft_prep.train.attention import Layout, packed_attention
from srft_prep.train.leaks import check_leaks
from srft_prep.train.loss import Head, weighted_nll
from srft_prep.train.metrics import read_metrics
from srft_prep.train.model import (
    add_lora,
    checkpoint_activations,
    compile_layers,
    random_model,
    tiny_model,
)
from srft_prep.train.parallel import World, deterministic, shard_model, started
from srft_prep.verification import verify
from tests.gates import MANIFEST
from tests.tiny_models import EXAMPLE_TOKENIZER, make_tiny_model
from tests.train import runs
from tests.train.architectures import SUPPORTED, tiny_config
from tests.train.documents import batch_of, largest_difference, sum_weights, whole_difference
from tests.train.test_gradients import (
    SPLITS,
    batches_of,
    expected_gradients,
    loose_model,
    step,
    the_documents,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LENGTHS = (129, 1, 700, 64, 1030, 2)
"""Shorter and longer than the kernel's blocks, and cut by them."""
WITH_LONG = (4100, 130, 5, 4608, 5120, 700)
"""Some of them so long that they go alone."""
BFLOAT16 = 1e-2
"""How far a result in bfloat16 may be from the one in float32, as norms."""


def on_device(lengths: tuple[int, ...]) -> Layout:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return Layout(lengths=lengths, cu_seqlens=bounds, longest=max(lengths))


def difference(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()


@pytest.mark.parametrize("lengths", [LENGTHS, WITH_LONG], ids=["short", "long"])
@pytest.mark.parametrize("window", [None, 50, 800], ids=lambda window: f"window {window}")
@pytest.mark.parametrize(
    ("size", "value_size", "heads", "key_heads"),
    [(64, 64, 4, 2), (128, 128, 14, 2), (128, 128, 4, 4), (192, 128, 4, 4), (8, 8, 6, 1)],
)
def test_the_kernel_is_attention_of_each_document_in_float32(
    size: int,
    value_size: int,
    heads: int,
    key_heads: int,
    window: int | None,
    lengths: tuple[int, ...],
) -> None:
    tokens = sum(lengths)
    parts = [
        drawn(1, heads, tokens, size, seed=0),
        drawn(1, key_heads, tokens, size, seed=1),
        drawn(1, key_heads, tokens, value_size, seed=2),
    ]
    wide = [part.detach().float().requires_grad_() for part in parts]
    layer, layout = nn.Identity(), on_device(lengths)
    found, _ = packed_attention(layer, *parts, None, layout=layout, sliding_window=window)
    expected, _ = packed_attention(layer, *wide, None, layout=layout, sliding_window=window)
    assert found.shape == expected.shape == (1, tokens, heads, value_size)
    assert difference(found, expected) < BFLOAT16
    above = drawn(*found.shape, seed=3).detach()
    gradients = torch.autograd.grad(found, parts, above)
    wanted = torch.autograd.grad(expected, wide, above.float())
    for gradient, value in zip(gradients, wanted, strict=True):
        assert difference(gradient, value) < BFLOAT16


@pytest.mark.parametrize("lengths", [LENGTHS, WITH_LONG], ids=["short", "long"])
def test_no_document_has_a_gradient_in_another(lengths: tuple[int, ...]) -> None:
    parts = [drawn(1, heads, sum(lengths), 64, seed=seed) for seed, heads in enumerate((4, 2, 2))]
    output, _ = packed_attention(nn.Identity(), *parts, None, layout=on_device(lengths))
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for first, end in pairwise(bounds):
        inside = output[:, first:end].float().square().sum()
        for gradient in torch.autograd.grad(inside, parts, retain_graph=True):
            assert gradient[:, :, first:end].any() or end - first == 1  # its softmax is 1
            assert not gradient[:, :, :first].any()
            assert not gradient[:, :, end:].any()


@pytest.mark.parametrize("name", list(SUPPORTED))
def test_no_architecture_leaks_in_bfloat16(name: str) -> None:
    model = random_model(tiny_config(name, SUPPORTED[name])).to(DEVICE, torch.bfloat16)
    report = check_leaks(model, device=DEVICE)
    assert report.response > 0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A group of this process, with the device and NCCL."""
    with started() as world:
        assert world.device.type == DEVICE
        yield world


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("way", ["plain", "checkpointed", "lora", "compiled"])
def test_nothing_leaks_forward_or_backward_as_training_has_the_model(
    world: World, way: str
) -> None:
    model = tiny_model(97, max_position_embeddings=8192)
    if way == "lora":
        add_lora(model, rank=4, alpha=8)
    if way == "compiled":
        compile_layers(model)
    if way in ("checkpointed", "compiled"):
        checkpoint_activations(model)
    shard_model(model, world, param_dtype=torch.bfloat16)
    assert check_leaks(model, device=world.device).leak == 0
    documents = the_documents()
    first = len(documents[0].ids)
    batch = batch_of([documents], trim=False).to(DEVICE)
    inside = batch.positions < first
    chosen = replace(
        batch,
        positions=batch.positions[inside],
        targets=batch.targets[inside],
        weights=batch.weights[inside],
    )
    kept = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept.append(torch.zeros_like(output, requires_grad=True))
        return output + kept[0]

    embedding = next(each for each in model.modules() if isinstance(each, nn.Embedding))
    handle = embedding.register_forward_hook(keep)
    model(chosen).backward()
    handle.remove()
    assert kept[0].grad[0, :first].any()
    assert not kept[0].grad[0, first:].any()


@pytest.mark.parametrize(
    ("dtype", "compare", "limit"),
    [
        (torch.float64, largest_difference, 1e-6),  # rotary angles are float32, and rounded apart
        (torch.float32, whole_difference, 1e-5),
        (torch.bfloat16, whole_difference, 2e-2),
    ],
    ids=["float64", "float32", "bfloat16"],
)
def test_gradients_are_the_weighted_sums_however_a_step_is_split(
    world: World, dtype: torch.dtype, compare: object, limit: float
) -> None:
    """Through FSDP, as training does it; weights are float32 where the pass is bfloat16."""
    held = torch.float64 if dtype == torch.float64 else torch.float32
    model = shard_model(loose_model(dtype=held), world, param_dtype=dtype)
    total = sum_weights(the_documents())
    for split in SPLITS[1]:
        batches = [batch.to(DEVICE) for batch in batches_of(split[0])]
        _, gradients = step(model, batches, total)
        found = {name: value.cpu() for name, value in gradients.items()}
        assert compare(found, expected_gradients()) < limit  # type: ignore[operator]


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, BFLOAT16)], ids=str
)
def test_loss_and_its_gradients_are_the_formulas(
    dtype: torch.dtype, limit: float, softcap: float | None
) -> None:
    """With a real model's vocabulary, and more positions than a chunk."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(900, 64, generator=generator).to(DEVICE, dtype).requires_grad_()
    table = torch.randn(151_936, 64, generator=generator).mul_(0.3).to(DEVICE, dtype)
    table.requires_grad_()
    positions = torch.randperm(900, generator=generator)[:700].sort().values.to(DEVICE)
    targets = torch.randint(151_936, (700,), generator=generator).to(DEVICE)
    weights = torch.rand(700, generator=generator).to(DEVICE)
    loss = weighted_nll(hidden, Head(weight=table, softcap=softcap), positions, targets, weights)
    found = torch.autograd.grad(loss / 7, [hidden, table])

    states, rows = (each.detach().double().requires_grad_() for each in (hidden, table))
    logits = states[positions] @ rows.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (nll * weights).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=limit)
    for gradient, value in zip(
        found, torch.autograd.grad(expected / 7, [states, rows]), strict=True
    ):
        assert difference(gradient, value) < limit


def test_a_step_done_again_gives_the_same_bits_where_kernels_are_deterministic() -> None:
    """Documents long enough that many blocks add to one query's gradient."""
    with deterministic():
        parts = [drawn(1, heads, 8192, 128, seed=seed) for seed, heads in enumerate((8, 2, 2))]
        layout = on_device((6000, 2192))
        gradients = []
        for _ in range(5):
            output, _ = packed_attention(nn.Identity(), *parts, None, layout=layout)
            gradients.append(torch.autograd.grad(output.float().square().sum(), parts))
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


@pytest.mark.parametrize("way", [(), ("--activation-checkpointing",), ("--lora",)], ids=str)
def test_a_run_killed_on_a_gpu_goes_on_to_the_same_bits(
    short_shards: Path, tmp_path: Path, way: tuple[str, ...]
) -> None:
    words = ["train", short_shards, "--max-steps", 12, "--batch-sequences", 2, "--deterministic"]
    words += ["--checkpoint-every", 3, *way]
    if "--lora" in way:
        base = make_tiny_model(tmp_path / "base", tokenizer=EXAMPLE_TOKENIZER)
        words += ["--model", base, "--learning-rate", 1e-2]
    else:
        words += ["--tiny"]
    expected, output = tmp_path / "expected", tmp_path / "killed"
    runs.finish(expected, words)
    for steps in (4, 8):
        with runs.started(output, words, holds=MANIFEST) as run:
            run.wait_until(run.has_done(steps))
            assert run.ranks[0].is_alive(), run.said
            run.send(signal.SIGKILL)
            run.wait()
    runs.finish(output, words)
    assert runs.losses_of(output) == runs.losses_of(expected)
    name = "model/model.safetensors"
    assert (output / name).read_bytes() == (expected / name).read_bytes()
    losses = [loss for loss, _ in runs.losses_of(output).values()]
    assert losses[-1] < losses[0]
    manifest = read_manifest(output, stage="train")
    assert manifest.data["config"]["precision"] == "bfloat16"
    assert verify(output).problems == ()


def test_what_a_gpu_trained_loads_and_its_metrics_say_how_fast(
    short_shards: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "run"
    words = ("train", short_shards, "--tiny", "--max-steps", 3, "--compile", "--json")
    run = runs.finish(output, words)
    assert "documents are apart (self-test passed)" in run.said
    assert orjson.loads(run.said.splitlines()[-1])["steps"] == 3
    for line in read_metrics(output):
        assert line["peak_memory_bytes"] > 0
        assert line["mfu"] is None or 0 < line["mfu"] < 1
    model = AutoModelForCausalLM.from_pretrained(output / "model").to(DEVICE)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    ids = tokenizer("hello", return_tensors="pt").to(DEVICE)
    made = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape[1] == ids["input_ids"].shape[1] + 4
