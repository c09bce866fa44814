"""Does a model fit? Memory of one GPU in a training step, reckoned from the model's configuration.

    python benchmarks/train_memory.py [--config CONFIG_JSON] [--gpus 8] [--seq-len 32768]

By default Qwen2.5-Coder-32B. Reckoned, nothing is run (`srft_prep.train.memory` says what counts).
The last line of stdout is one JSON document.
"""

import json
from pathlib import Path
from typing import Any

import click
import orjson

from srft_prep.critic.flops import NoShape, shape_of
from srft_prep.train.memory import lora_params, memory_items

QWEN_32B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
"""Of Qwen/Qwen2.5-Coder-32B-Instruct's config.json, what memory depends on."""
LORA_RANK = 32


@click.command()
@click.option("--config", type=click.Path(exists=True, path_type=Path), help="A config.json.")
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=1), default=32_768, show_default=True)
def main(config: Path | None, gpus: int, seq_len: int) -> None:
    """Print a table: what is held, by sequence parallelism and with LoRA."""
    values = QWEN_32B if config is None else json.loads(config.read_bytes())
    shape = shape_of(values)
    if isinstance(shape, NoShape):
        raise click.ClickException(shape.reason)
    width = int(values["intermediate_size"])
    adapters = lora_params(shape, intermediate_size=width, rank=LORA_RANK)
    cases = {
        f"{'LoRA' if trained else 'all'}, SP {degree}": memory_items(
            shape,
            intermediate_size=width,
            num_ranks=gpus,
            seq_len=seq_len,
            sequence_parallel=degree,
            lora_params=trained,
        )
        for trained in (0, adapters)
        for degree in (1, 4)
    }
    print(f"P = {shape.total_params:,}, {gpus} GPUs, {seq_len:,} tokens, GB a GPU\n")
    print(f"| | | {' | '.join(cases)} |\n|---|---|{'--:|' * len(cases)}")
    for row in zip(*cases.values(), strict=True):
        numbers = " | ".join(f"{item.num_bytes / 1e9:.1f}" for item in row)
        print(f"| {row[0].name} | {row[0].formula} | {numbers} |")
    totals = {name: sum(item.num_bytes for item in items) for name, items in cases.items()}
    print(f"| **sum** | | {' | '.join(f'**{total / 1e9:.1f}**' for total in totals.values())} |")
    print(orjson.dumps({"params": shape.total_params, "lora_params": adapters, **totals}).decode())


if __name__ == "__main__":
    main()
