"""`train` as a user runs it: what it writes, what it refuses, and that others load the result."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from srft_prep.manifest import read_manifest
from srft_prep.train.metrics import read_metrics
from srft_prep.verification import verify
from tests.stages import Examples, srft_prep
from tests.tiny_models import EXAMPLE_TOKENIZER, QWEN_TOKENIZER, make_tiny_model

TINY = ("--tiny", "--max-steps", 3, "--batch-sequences", 2)


@pytest.fixture(scope="module")
def trained(short_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    done = srft_prep("train", short_shards, *TINY, "-o", output, "--json")
    assert done.status == 0, done.stderr
    document = orjson.loads(done.stdout.splitlines()[-1])
    assert document["stage"] == "train"
    assert document["steps"] == 3
    assert document["sequences"] == 6
    assert document["loss_tokens"] < document["tokens"]
    assert "self-test passed" in done.stderr
    assert "the trim leaves out" in done.stderr
    return output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with the tokenizer of the shards."""
    folder = tmp_path_factory.mktemp("models") / "base"
    return make_tiny_model(folder, tokenizer=EXAMPLE_TOKENIZER)


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_the_directory_is_a_finished_stage(trained: Path, short_shards: Path) -> None:
    manifest = read_manifest(trained, stage="train")
    names = {file["name"] for file in manifest.files}
    assert {"model/model.safetensors", "model/config.json", "model/tokenizer.json"} <= names
    assert manifest.data["inputs"][0] == read_manifest(short_shards).as_input()
    assert verify(trained).problems == ()
    assert not (trained / ".progress").exists()
    weights = trained / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert len(verify(trained).problems) == 1
    weights.write_bytes(whole)


def test_the_same_command_again_does_nothing(trained: Path, short_shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    done = srft_prep("train", short_shards, *TINY, "-o", trained)
    assert done.status == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_the_result_generates_in_transformers_with_its_tokenizer(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == ids["input_ids"].shape[1] + 5
    original = AutoTokenizer.from_pretrained(EXAMPLE_TOKENIZER)
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


def test_other_settings_are_refused_taken_up_or_begun_anew(
    short_shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = ("train", short_shards, "--tiny", "--batch-sequences", 2, "-o", output)
    assert srft_prep(*words, "--max-steps", 2, "--schedule", "constant").status == 0
    first = [line["loss"] for line in read_metrics(output)]
    longer = (*words, "--max-steps", 3, "--schedule", "constant")
    refused = srft_prep(*longer)
    assert refused.status == 2
    said = " ".join(refused.stderr.split())
    assert "holds a finished train with other settings or inputs (max_steps: 2 before, 3" in said
    assert said.index("--resume") < said.index("another -o") < said.index("--overwrite")

    resumed = srft_prep(*longer, "--resume")
    assert resumed.status == 0, resumed.stderr
    assert "--resume: max_steps: 2 before, 3 now" in resumed.stderr
    assert "goes on after step 2" in resumed.stderr
    steps = [(line["step"], line["loss"]) for line in read_metrics(output)]
    assert [loss for _, loss in steps[:2]] == first
    assert [step for step, _ in steps] == [1, 2, 3]
    assert read_manifest(output).counts["steps"] == 3
    assert verify(output).problems == ()

    anew = srft_prep(*words, "--max-steps", 2, "--seed", 7, "--overwrite")
    assert anew.status == 0, anew.stderr
    assert "goes on" not in anew.stderr
    assert [line["step"] for line in read_metrics(output)] == [1, 2]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "plan.json",
        "step-00000002",
    ]


def test_resume_without_anything_to_resume_begins(short_shards: Path, tmp_path: Path) -> None:
    done = srft_prep("train", short_shards, *TINY, "-o", tmp_path / "run", "--resume")
    assert done.status == 0, done.stderr


def test_resume_with_another_kind_of_weights_is_refused(
    trained: Path, short_shards: Path, tmp_path: Path
) -> None:
    done = srft_prep("train", short_shards, *TINY, "--lora", "-o", trained, "--resume")
    assert done.status == 2
    assert "lora_rank was 0, got 32" in done.stderr
    assert read_manifest(trained).counts["steps"] == 3


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.fixture
def other_shards(examples: Examples, tmp_path: Path) -> Path:
    """Shards of the same tokens that hold nothing out."""
    folder = tmp_path / "other"
    words = ("pack", examples.tokens, "--labels", examples.labels, "-o", folder)
    done = srft_prep(*words, "--seq-len", 1024, "--overlong", "windows")
    assert done.status == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-steps", 1), "--resume goes on after step 3, but --max-steps is 1"),
        (("--batch-sequences", 3), "batch_sequences was 2, got 3: a step's place in the data"),
        (("--seed", 5), "seed was 0, got 5: the order of the data"),
    ],
)
def test_resume_leaves_out_no_data_and_repeats_none(
    words: tuple[object, ...], message: str, trained: Path, short_shards: Path
) -> None:
    before = contents(trained)
    done = srft_prep("train", short_shards, *TINY, *words, "-o", trained, "--resume")
    assert done.status == 2
    assert message in " ".join(done.stderr.split())
    assert contents(trained) == before


def test_resume_with_other_shards_is_refused(
    trained: Path, other_shards: Path, short_shards: Path
) -> None:
    before = contents(trained)
    done = srft_prep("train", other_shards, *TINY, "-o", trained, "--resume")
    assert done.status == 2
    assert f"the shards were {short_shards}, got {other_shards}" in " ".join(done.stderr.split())
    assert contents(trained) == before


def test_what_turns_out_wrong_late_leaves_a_finished_run_as_it_was(
    trained: Path, other_shards: Path, short_shards: Path, examples: Examples, tmp_path: Path
) -> None:
    settings = (*TINY, "--learning-rate", 0.5)
    held_out = ("--held-out", examples.tokens)
    for shards, words in (
        (short_shards, (*settings, "--held-out", examples.labels)),
        (short_shards, (*settings, *held_out, "--labels", examples.tokens)),
        (other_shards, (*settings, *held_out)),
    ):
        before = contents(trained)
        done = srft_prep("train", shards, *words, "-o", trained, "--overwrite")
        assert done.status == 2, done.stderr
        assert contents(trained) == before, words
        new = tmp_path / "new"
        assert srft_prep("train", shards, *words, "-o", new).status == 2
        assert not new.exists(), words


def test_resume_with_a_model_of_another_shape_leaves_the_run_as_it_was(
    trained: Path, base: Path, short_shards: Path
) -> None:
    before = contents(trained)
    words = ("--model", base, *TINY[1:], "-o", trained)
    done = srft_prep("train", short_shards, *words, "--learning-rate", 1e-2, "--resume")
    assert done.status == 2
    assert "it is of another model" in " ".join(done.stderr.split())
    assert contents(trained) == before


def test_resume_with_another_weight_decay_decays(short_shards: Path, tmp_path: Path) -> None:
    norms = []
    for decay in (0.0, 50.0):
        output = tmp_path / str(decay)
        words = ("train", short_shards, "--tiny", "--schedule", "constant", "-o", output)
        assert srft_prep(*words, "--max-steps", 2).status == 0
        done = srft_prep(*words, "--max-steps", 4, "--weight-decay", decay, "--resume")
        assert done.status == 0, done.stderr
        weights = load_file(output / "model" / "model.safetensors")
        norms.append(weights["model.layers.0.mlp.up_proj.weight"].norm().item())
    assert norms[1] < 0.6 * norms[0]


def test_checkpoints_of_an_unknown_run_are_never_removed(
    short_shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = ("train", short_shards, *TINY, "-o", output)
    assert srft_prep(*words).status == 0
    (output / "checkpoints" / "plan.json").unlink()
    (output / "model" / "model.safetensors").unlink()
    before = contents(output)
    for more in ((), ("--overwrite", "--seed", 3), ("--resume", "--learning-rate", 0.1)):
        done = srft_prep(*words, *more)
        assert done.status == 2
        assert "holds step-00000003, but no plan.json" in " ".join(done.stderr.split())
        assert contents(output) == before


def test_what_a_killed_export_left_is_swept_and_the_run_goes_on(
    short_shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = ("train", short_shards, *TINY, "-o", output)
    assert srft_prep(*words).status == 0
    plan = {key: read_manifest(output).data[key] for key in PLAN_KEYS}
    (output / ".progress").mkdir()
    (output / ".progress" / "plan.json").write_bytes(orjson.dumps(plan))
    (output / "manifest.json").unlink()
    (output / "model").rename(output / ".model.tmp")
    done = srft_prep(*words)
    assert done.status == 0, done.stderr
    assert "goes on after step 3" in done.stderr
    assert not (output / ".model.tmp").exists()
    assert verify(output).problems == ()


PLAN_KEYS = ("schema_version", "package_version", "stage", "config", "inputs")


def test_a_model_with_other_weights_is_another_model(
    base: Path, short_shards: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    words = ("train", short_shards, "--model", model, "--max-steps", 1, "-o", tmp_path / "run")
    assert srft_prep(*words).status == 0
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = srft_prep(*words)
    assert done.status == 2
    assert "(its content changed)" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "model.layers.1.mlp.up_proj.weight is missing"),
        ("shape", "model.layers.1.mlp.up_proj.weight: expected (256, 128), got (2, 128)"),
        ("cut", "expected a causal language model"),
    ],
)
def test_a_model_that_would_be_partly_random_is_refused(
    how: str, message: str, base: Path, short_shards: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    file, name = model / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    weight = weights.pop(name)
    if how == "shape":
        weights[name] = weight[:2].clone()
    save_file(weights, file, metadata={"format": "pt"})
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    done = srft_prep("train", short_shards, "--model", model, "-o", tmp_path / "run")
    assert done.status == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_an_evaluation_counts_where_it_is_of_the_last_step(
    short_shards: Path, examples: Examples, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = ("train", short_shards, "--tiny", "--batch-sequences", 2, "-o", output)
    done = srft_prep(*words, "--max-steps", 2, "--held-out", examples.tokens)
    assert done.status == 0, done.stderr
    assert read_manifest(output).counts["held_out"]["step"] == 2
    assert read_manifest(output).data["held_out"]["labels"] is None
    assert srft_prep(*words, "--max-steps", 3, "--resume").status == 0
    assert "held_out" not in read_manifest(output).counts
    assert read_manifest(output).data["held_out"] is None


def test_a_model_is_trained_from_its_own_weights(
    base: Path, short_shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = ("--model", base, "--max-steps", 1, "--learning-rate", 1e-30, "-o", output)
    done = srft_prep("train", short_shards, *words)
    assert done.status == 0, done.stderr
    ids = list(range(5, 40))
    torch.testing.assert_close(logits_of(output / "model", ids), logits_of(base, ids))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_are_saved_alone_and_merged_and_both_compute_the_same(
    base: Path, short_shards: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output = tmp_path / "run"
    words = ("--model", base, "--lora", "--lora-rank", 4, "--lora-alpha", 8, "--max-steps", 3)
    done = srft_prep("train", short_shards, *words, "--learning-rate", 0.02, "-o", output)
    assert done.status == 0, done.stderr
    ids = list(range(5, 40))
    merged = logits_of(output / "model", ids)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, output / "adapter")
    with torch.no_grad():
        alone = adapted(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(merged, alone, rtol=1e-3, atol=1e-4)
    assert (merged - logits_of(base, ids)).abs().max() > 0.01
    assert verify(output).problems == ()


def test_bfloat16_is_written_as_such(short_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = srft_prep("train", short_shards, *TINY, "--precision", "bfloat16", "-o", output)
    assert done.status == 0, done.stderr
    weights = load_file(output / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    config = orjson.loads((output / "model" / "config.json").read_bytes())
    assert config["dtype"] == "bfloat16"


def test_a_model_with_another_tokenizer_is_refused_before_anything_is_written(
    shared_data: Path, short_shards: Path, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", tokenizer=QWEN_TOKENIZER)
    done = srft_prep("train", short_shards, "--model", other, "-o", tmp_path / "run")
    assert done.status == 2
    assert "its tokenizer is not the one that the shards were made with (example)" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --model PATH_OR_ID, or --tiny"),
        (("--tiny", "--model", "x"), "give --model PATH_OR_ID, or --tiny"),
        (("--tiny", "--labels", "."), "--labels is for the evaluation of --held-out"),
        (("--tiny", "--lora-rank", "8"), "--lora-rank is for adapters: give --lora"),
        (("--tiny", "--resume", "--overwrite"), "choose one"),
        (("--tiny", "--sequence-parallel", "2"), "expected a divisor of the 1 processes"),
        (("--model", "no/such/model"), "no/such/model"),
    ],
)
def test_wrong_settings_are_told_and_nothing_is_written(
    words: tuple[str, ...], message: str, short_shards: Path, tmp_path: Path
) -> None:
    done = srft_prep("train", short_shards, *words, "-o", tmp_path / "run")
    assert done.status == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_no_output_of_pack_is_refused(examples: Examples, tmp_path: Path) -> None:
    done = srft_prep("train", examples.tokens, "--tiny", "-o", tmp_path / "run")
    assert done.status == 2
    assert "expected the output of pack, this is one of tokenize" in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from srft_prep.cli import cli;"
        "assert CliRunner().invoke(cli, ['train', '--help']).exit_code == 0;"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_torchrun_runs_it(short_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "srft_prep", "train", str(short_shards)]
    command += [*map(str, TINY), "-o", str(output), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"stage":"train"') == 1
    assert "on 2 x cpu" in done.stderr
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3]


@pytest.mark.vllm
@pytest.mark.slow
def test_the_result_generates_in_vllm(short_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    train = [sys.executable, "-m", "srft_prep", "train", str(short_shards), "-o", str(output)]
    for command in ([*train, *map(str, TINY)], [sys.executable, "-c", GENERATE, output / "model"]):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=500, env=environment
        )
        assert done.returncode == 0, done.stderr
    assert "generated 5 tokens" in done.stdout


GENERATE = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(
        sys.argv[1],
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
    )
    said = model.chat(
        [{"role": "user", "content": "hello"}],
        SamplingParams(max_tokens=5, min_tokens=5, temperature=0),
    )
    print("generated", len(said[0].outputs[0].token_ids), "tokens")
"""
