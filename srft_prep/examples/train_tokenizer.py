"""Train the example tokenizer: a byte-level BPE over the recorded runs, with a ChatML template.

It encodes any text without loss and loads with `AutoTokenizer`. It exists so that the quickstart
and the tests need no download; it suits the example runs and little else. The same runs and the
same `tokenizers` release give the same bytes. Training takes 0.2 s.

    python -m srft_prep.examples.train_tokenizer -o DIR
"""

import json
from pathlib import Path
from typing import Final

import click
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from srft_prep.examples.record import RUNS_DIR

TOKENIZER_DIR: Final = Path(__file__).parent / "tokenizer"
VOCAB_SIZE: Final = 4096
"""An upper bound: the runs are so few that no pair is left to merge after 3,790 tokens."""
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE: Final = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content %}
        {{- message.content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set function = call.function or call %}
        {%- set arguments = function.arguments %}
        {%- if arguments is not string %}
            {%- set arguments = arguments | tojson %}
        {%- endif %}
        {%- if message.content or not loop.first %}
            {{- '\\n' }}
        {%- endif %}
        {{- '<tool_call>\\n{"name": ' + function.name | tojson }}
        {{- ', "arguments": ' + arguments + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Plain ChatML: renders each message by itself, so a longer conversation only appends."""


def read_training_texts(runs_dir: Path = RUNS_DIR) -> list[str]:
    """Return the distinct message texts of all runs, in the order of files and messages."""
    texts: dict[str, None] = {}
    for path in sorted(runs_dir.rglob("*.traj.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        texts.update(dict.fromkeys(message["content"] for message in document["messages"]))
    return list(texts)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE trained on `texts`; ids 0 to 2 are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    texts = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=TOKENIZER_DIR,
    show_default="the package's own tokenizer/",
    help="Folder for the tokenizer.",
)
def main(output: Path) -> None:
    """Train the example tokenizer on the package's own recorded runs."""
    tokenizer = train_tokenizer(read_training_texts())
    save_tokenizer(tokenizer, output)
    click.echo(f"{output}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
