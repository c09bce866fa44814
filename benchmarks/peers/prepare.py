"""Prepare chats by TRL or axolotl, as their users would, inside the tool's own environment.

    .venv-peers/TOOL/bin/python benchmarks/peers/prepare.py TOOL ROWS TOKENIZER TEMPLATE CORES

ROWS holds a JSON object a line: `id`, `messages` (tool arguments as objects), `tools` or null.
Speaks the protocol of `serving`; start-up and loading are not in its seconds.

- trl: `SFTTrainer._prepare_dataset`, `assistant_only_loss=True`, no length limit, no packing.
- axolotl: `TokenizedPromptDataset`, `chat_template` strategy, `roles_to_train: [assistant]`,
  `train_on_eos: turn` and `message_field_training: train`; a message has that field only where
  ROWS gives it. No packing either.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from serving import Pass, Passed, Row, runs, serve

Chat = dict[str, Any]
Prepare = Callable[[], Any]
"""Makes one pass and returns its dataset, with columns `input_ids` and `labels`."""


def main(tool: str, rows: str, tokenizer: str, template: str, cores: str) -> None:
    """Serve passes until stdin ends."""

    def load() -> tuple[dict[str, Any], Pass]:
        with Path(rows).open(encoding="utf-8") as lines:
            chats = [json.loads(line) for line in lines]
        loader = {"trl": _load_trl, "axolotl": _load_axolotl}[tool]
        source = Path(template).read_text(encoding="utf-8")
        prepare = loader(chats, tokenizer, source, int(cores) if int(cores) > 1 else None)
        names = (tool, "transformers", "tokenizers", "datasets")
        versions = {name: version(name) for name in names}
        return {"versions": versions}, lambda: _pass(prepare, chats)

    serve(load)


def _pass(prepare: Prepare, chats: list[Chat]) -> Passed:
    start = time.perf_counter()
    prepared = prepare()
    seconds = time.perf_counter() - start
    tokens = sum(len(row["input_ids"]) for row in prepared)

    def rows() -> Iterator[Row]:
        for chat, row in zip(chats, prepared, strict=True):
            yield {"id": chat["id"], "ids": row["input_ids"], "trained": list(runs(row["labels"]))}

    return {"seconds": seconds, "tokens": tokens}, rows


def _load_trl(chats: list[Chat], tokenizer: str, template: str, cores: int | None) -> Prepare:
    """Return TRL's dataset preparation. It asks nothing else of its trainer than what is here."""
    datasets, trl = _module("datasets"), _module("trl")
    datasets.disable_caching()
    loaded = _module("transformers").AutoTokenizer.from_pretrained(tokenizer)
    json_type, text = datasets.Json(), datasets.Value("string")
    features = datasets.Features(
        {"id": text, "messages": datasets.List(json_type), "tools": json_type}
    )
    rows = [{name: chat[name] for name in features} for chat in chats]
    dataset = datasets.Dataset.from_list(rows, features=features)  # no schema is inferred: no nulls
    arguments = trl.SFTConfig(
        assistant_only_loss=True,
        max_length=None,
        dataset_num_proc=cores,
        shuffle_dataset=False,
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    trainer: Any = SimpleNamespace(chat_template=template, completion_only_loss=False)
    prepare = trl.SFTTrainer._prepare_dataset
    return lambda: prepare(trainer, dataset, loaded, arguments, False, None, "train")


def _load_axolotl(chats: list[Chat], tokenizer: str, template: str, cores: int | None) -> Prepare:
    """Return axolotl's dataset preparation."""
    datasets, axolotl = _module("datasets"), _module("axolotl.datasets")
    new_settings = _module("axolotl.utils.dict").DictDefault
    datasets.disable_caching()
    config = new_settings(
        {"chat_template": "jinja", "chat_template_jinja": template, "sequence_len": 1 << 24}
    )
    source = new_settings(
        {
            "path": "rows",
            "type": "chat_template",
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
            "message_field_training": "train",
        }
    )
    strategy = _module("axolotl.prompt_strategies.chat_template").load(
        _module("transformers").AutoTokenizer.from_pretrained(tokenizer), config, source
    )
    fields = ("messages", "tools")
    rows = [{name: json.dumps(chat[name] or []) for name in fields} for chat in chats]
    dataset = datasets.Dataset.from_list(rows)  # as text: no schema is inferred, no nulls
    return lambda: axolotl.TokenizedPromptDataset(
        strategy, dataset, process_count=cores, keep_in_memory=True
    )


def _module(name: str) -> Any:
    """Return a module that only the tool's own environment has."""
    return import_module(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
