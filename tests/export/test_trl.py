"""TRL's own trainer on an exported folder, loaded by the lines of its README.md."""

from typing import Any

import datasets
import pytest
import torch
from torch.nn.functional import cross_entropy

from srft_prep.export.stage import export
from tests.export.shards_fixture import (
    Documents,
    code_of,
    flat,
    ordinary,
    packs_of,
    positions,
    write_shards,
)
from tests.tiny_models import EXAMPLE_TOKENIZER, make_tiny_model

WEIGHTS = (1.0, 0.0, 1.0)

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
"""TRL 1.16 sets what transformers 5.24 calls by another name."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The SFTTrainer that the README.md makes, but for what a CPU asks of it."""
    folder = tmp_path_factory.mktemp("trl")
    export(write_shards(folder / "shards", ordinary(WEIGHTS)), folder / "out", "trl")
    model = make_tiny_model(folder / "model", tokenizer=EXAMPLE_TOKENIZER, hidden=128, layers=2)
    for_cpu = (
        f'SFTConfig(output_dir="{folder / "run"}", use_cpu=True, bf16=False, report_to="none", '
    )
    code = code_of(
        folder / "out",
        "python",
        ("MODEL", str(model)),
        ("flash_attention_2", "eager"),
        ("SFTConfig(\n", for_cpu),
        ("SFTTrainer(", "trainer = SFTTrainer("),
        (".train()", ""),
    )
    made: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        exec(compile(code, "README.md", "exec"), made)
    made["trainer"].model.eval()
    return made["trainer"]


@pytest.fixture(scope="module")
def batches(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """What the trainer's own collator makes of each row, in order."""
    return [trainer.data_collator([row]) for row in trainer.train_dataset]


def test_a_real_batch_holds_the_tokens_labels_and_positions_of_the_shards(
    batches: list[dict[str, torch.Tensor]],
) -> None:
    packs = packs_of(ordinary(WEIGHTS))
    assert len(batches) == len(packs)
    for batch, pack in zip(batches, packs, strict=True):
        assert batch["input_ids"].tolist() == [flat(each.ids.tolist() for each in pack)]
        assert batch["labels"].tolist() == [flat(each.labels for each in pack)]
        assert batch["position_ids"].tolist() == [positions(pack)]
        assert batch["cu_seq_lens_q"].diff().tolist() == [len(each.ids) for each in pack]
        assert "attention_mask" not in batch


def test_the_trainers_data_loader_gives_every_pack_once(trainer: Any) -> None:
    seen = sorted(batch["input_ids"][0].tolist() for batch in trainer.get_train_dataloader())
    packs = packs_of(ordinary(WEIGHTS))
    assert seen == sorted(flat(each.ids.tolist() for each in pack) for pack in packs)


def test_the_trainers_loss_of_a_pack_is_that_of_its_documents_alone(
    trainer: Any, batches: list[dict[str, torch.Tensor]]
) -> None:
    """Sum over trained tokens, divided by their number: no document sees another."""
    packs = packs_of(ordinary(WEIGHTS))
    total = sum(int((each.weights > 0).sum()) for pack in packs for each in pack)
    theirs = sum(
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=total).item()
        for batch in batches
    )
    ours = sum(loss_alone(trainer.model, pack) for pack in packs) / total
    assert theirs == pytest.approx(ours, rel=1e-5)


def loss_alone(model: Any, pack: Documents) -> float:
    """Return the weighted sum of the losses of a pack's documents, each by itself."""
    total = 0.0
    for each in pack:
        ids = torch.tensor(each.ids.tolist())[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses = cross_entropy(logits.float(), ids[0, 1:], reduction="none")
        total += float((losses * torch.from_numpy(each.weights[1:])).sum())
    return total
