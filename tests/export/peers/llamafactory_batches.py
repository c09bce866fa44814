"""What LLaMA-Factory makes of an exported folder, in its own environment; prints a JSON document.

    .venv-peers/llamafactory/bin/python llamafactory_batches.py CONFIG.yaml MODEL OUTPUT

Its reading of settings, its loading of data sets and its collator, for each kind of attention; and
the loss of every batch that a real model gives, with attention that needs no GPU.
"""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import yaml


def main(config: str, model: str, output: str) -> None:
    """Print batches by kind of attention, and the sum of losses of each under eager attention."""
    audio = types.ModuleType("torchaudio")  # is imported, and used for sound alone
    audio.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = audio
    import torch
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from transformers import AutoModelForCausalLM

    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    settings |= {
        "model_name_or_path": model,
        "output_dir": output,
        "do_train": True,
        "finetuning_type": "full",
        "use_cpu": True,
        "report_to": "none",
    }
    model_args, data_args, training_args, _, _ = get_train_args(settings)
    tokenizer = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
    rows: Any = get_dataset(
        template, model_args, data_args, training_args, stage="sft", **tokenizer
    )["train_dataset"]
    student = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    answer: dict[str, Any] = {"block_diag_attn": model_args.block_diag_attn}
    for attention in ("eager", "flash_attention_2"):
        collate = SFTDataCollatorWith4DAttentionMask(
            template=template,
            model=student,
            pad_to_multiple_of=8,
            label_pad_token_id=-100,
            block_diag_attn=model_args.block_diag_attn,
            neat_packing=data_args.neat_packing,
            attn_implementation=attention,
            compute_dtype=torch.float32,
            **tokenizer,
        )
        batches = [collate([dict(row)]) for row in rows]
        answer[attention] = [
            {
                name: value.tolist()
                for name, value in batch.items()
                if value is not None and name != "attention_mask"
            }
            for batch in batches
        ]
        if attention == "eager":
            with torch.no_grad():
                answer["losses"] = [student(**batch).loss.item() for batch in batches]
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
