"""The real tools on exported folders, each in an environment of its own; all read what we wrote."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from srft_prep.export.stage import export
from tests.export.shards_fixture import (
    SEQ_LEN,
    Document,
    code_of,
    flat,
    ordinary,
    packs_of,
    positions,
    write_shards,
)
from tests.tiny_models import EXAMPLE_TOKENIZER, REPOSITORY, make_tiny_model

WEIGHTS = (1.0, 0.0, 1.0)
PACKS = packs_of(ordinary(WEIGHTS))
SCRIPTS = Path(__file__).parent / "peers"

pytestmark = pytest.mark.peers


def test_axolotl_loads_the_documents_and_keeps_them_apart(tmp_path: Path) -> None:
    folder = exported(tmp_path, "axolotl")
    config = tmp_path / "axolotl.yaml"
    prepared = f"dataset_prepared_path: {tmp_path / 'prepared'}\nseed: 1\ndataset_num_proc: 1\n"
    config.write_text(code_of(folder, "yaml") + prepared, encoding="utf-8")
    answer = ask("axolotl", config, EXAMPLE_TOKENIZER)
    trained = {key(each): each for pack in PACKS for each in pack if each.weights.any()}
    for collator, batches in answer.items():
        seen = []
        for batch in batches:
            (ids,), (labels,), (places,) = (
                batch[name] for name in ("input_ids", "labels", "position_ids")
            )
            mask = batch["attention_mask"][0]
            starts = [i for i, place in enumerate(places) if place == 0]
            for number, (start, end) in enumerate(
                zip(starts, [*starts[1:], len(ids)], strict=True)
            ):
                if not any(mask[start:end]):
                    continue  # padding
                each = trained[tuple(ids[start:end])]
                assert labels[start:end] == each.labels, collator
                assert places[start:end] == list(range(len(each.ids))), collator
                if collator.startswith("V2"):
                    assert set(mask[start:end]) == {number + 1}
                seen.append(key(each))
        assert sorted(seen) == sorted(trained), collator


def test_llama_factory_loads_the_packs_and_keeps_documents_apart(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.export.test_trl import loss_alone

    folder = exported(tmp_path, "llama-factory")
    model = make_tiny_model(tmp_path / "model", tokenizer=EXAMPLE_TOKENIZER)
    config = tmp_path / "train.yaml"
    changes = (("TEMPLATE", "qwen"), ("fa2", "disabled"))
    config.write_text(code_of(folder, "yaml", *changes), encoding="utf-8")
    answer = ask("llamafactory", config, model, tmp_path / "run")
    assert answer["block_diag_attn"] is True
    student = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    rows = zip(answer["flash_attention_2"], answer["eager"], answer["losses"], PACKS, strict=True)
    for flash, eager, loss, pack in rows:
        assert flash["input_ids"] == [flat(each.ids.tolist() for each in pack)]
        assert flash["labels"] == [flat(each.labels for each in pack)]
        assert flash["position_ids"] == [positions(pack)]
        assert len(eager["input_ids"][0]) == SEQ_LEN + 8
        num_trained = sum(int((each.weights > 0).sum()) for each in pack)
        assert loss == pytest.approx(loss_alone(student, pack) / num_trained, rel=1e-5)


def test_megatron_bridge_reads_the_packs_and_predicts_what_is_trained(tmp_path: Path) -> None:
    folder = exported(tmp_path, "megatron")
    specs: dict[str, Any] = {}
    code = code_of(folder, "python").split("offline_packing_specs=PackedSequenceSpecs(")[1]
    exec(f"specs = dict({code.split('),')[0]})", specs)
    answer = ask("megatron", json.dumps(specs["specs"]))
    for name in ("batches", "fixed"):
        for batch, pack in zip(answer[name], PACKS, strict=True):
            inputs = flat(each.ids[:-1].tolist() for each in pack)
            length = len(inputs)
            assert batch["tokens"][0][:length] == inputs
            assert batch["labels"][0][:length] == flat(each.ids[1:].tolist() for each in pack)
            assert batch["position_ids"][0][:length] == flat(
                range(len(each.ids) - 1) for each in pack
            )
            trained = flat((each.weights[1:] > 0).astype(int).tolist() for each in pack)
            assert batch["loss_mask"][0] == trained + [0] * (len(batch["tokens"][0]) - length)
            bounds = batch["cu_seqlens_q"][0]
            ends = [sum(len(each.ids) - 1 for each in pack[: n + 1]) for n in range(len(pack))]
            assert bounds[: len(pack) + 1] == [0, *ends]
    lengths = {len(batch["cu_seqlens_q"][0]) for batch in answer["fixed"]}
    assert len(lengths) == 1
    assert {len(batch["tokens"][0]) for batch in answer["fixed"]} == {SEQ_LEN}


def key(each: Document) -> tuple[int, ...]:
    return tuple(each.ids.tolist())


def exported(tmp_path: Path, target: str) -> Path:
    return export(
        write_shards(tmp_path / "shards", ordinary(WEIGHTS)), tmp_path / "out", target
    ).path


def ask(tool: str, *arguments: object) -> dict[str, Any]:
    """Return what a script says in the tool's environment."""
    folder = REPOSITORY / ".venv-peers" / tool
    if not (folder / "requirements.sha256").is_file():  # written when it is whole
        pytest.skip(f"python benchmarks/peers/environments.py {tool} makes what this test needs")
    script = SCRIPTS / f"{tool}_batches.py"
    done = subprocess.run(
        [str(folder / "bin" / "python"), str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
