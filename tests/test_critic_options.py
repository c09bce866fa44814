import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import pytest

from tests.stages import srft_prep, trajectory, write_trajectories

MODEL = "tiny/coder"
CONTEXT_TOKENS = 8192
PRICES = f"""
["{MODEL}"]
input = 1.0
output = 10.0
"""
RUNS = (
    trajectory("solved", resolved=True),
    trajectory("failed", resolved=False, num_steps=8),
    trajectory("unknown", resolved=None, num_steps=4),
)


class Models(BaseHTTPRequestHandler):
    """Lists one model, and notes whatever else is asked."""

    def do_GET(self):
        body = {"data": [{"id": MODEL, "object": "model", "max_model_len": CONTEXT_TOKENS}]}
        self.answer(200 if self.path.endswith("/models") else 404, body)

    def do_POST(self):
        self.server.questions.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(400, {"error": {"message": "no question was expected"}})

    def answer(self, status, body):
        data = orjson.dumps(body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    server.questions = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def runs(tmp_path):
    return write_trajectories(tmp_path / "runs", RUNS)


@pytest.fixture
def prices(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    return path


def refused(runs, *options):
    """Run `label`; return what it says where it refuses, having written nothing."""
    output = runs.parent / "labels"
    run = srft_prep("label", runs, "-o", output, *options)
    assert run.status == 2, (run.stdout, run.stderr)
    assert not output.exists()
    assert "Traceback" not in run.stderr
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("Error: ")]
    return error


FOREIGN = {
    "--prompt": ("rules", "scripted"),
    "--rationale": ("rules", "scripted"),
    "--votes": ("rules", "scripted"),
    "--reasoning": ("rules", "scripted"),
    "--context": ("scripted",),
    "--max-input-tokens": ("rules", "scripted"),
    "--base-url": ("rules", "scripted", "vllm", "transformers"),
    "--tokenizer": ("rules", "scripted", "vllm", "transformers"),
    "--concurrency": ("rules", "scripted", "vllm", "transformers"),
    "--timeout": ("rules", "scripted", "vllm", "transformers"),
    "--batch": ("rules", "scripted", "vllm", "transformers"),
    "--prices": ("rules", "scripted", "vllm", "transformers"),
    "--gpus": ("rules", "scripted", "openai", "anthropic", "transformers"),
    "--engine-arg": ("rules", "scripted", "openai", "anthropic", "transformers"),
    "--gpu-usd-per-hour": ("rules", "scripted", "openai", "anthropic"),
    "--budget-usd": ("rules", "scripted"),
    "--model": ("rules",),
}
VALUES = {
    "--prompt": __file__,
    "--votes": "2",
    "--reasoning": "low",
    "--context": "outcome",
    "--max-input-tokens": "8192",
    "--base-url": "http://127.0.0.1:1/v1",
    "--tokenizer": "example",
    "--concurrency": "4",
    "--timeout": "5",
    "--prices": __file__,
    "--gpus": "1",
    "--engine-arg": "seed=1",
    "--gpu-usd-per-hour": "2",
    "--budget-usd": "1",
    "--model": "m",
}


@pytest.mark.parametrize(
    ("option", "critic"), [(option, name) for option, names in FOREIGN.items() for name in names]
)
def test_an_option_that_the_critic_has_no_use_for_is_refused(runs, option, critic):
    value = [VALUES[option]] if option in VALUES else []
    model = [] if critic == "rules" else ["--model", "m"]
    error = refused(runs, "--critic", critic, *model, option, *value)
    assert error.startswith(f"Error: {option}: the {critic} critic takes none; those that do: ")


def test_an_option_at_its_default_is_refused_too_where_it_is_given(runs):
    assert "--votes: the rules critic takes none" in refused(runs, "--votes", "1")


@pytest.mark.parametrize(
    "critic",
    ["vllm", "transformers", "openai", "anthropic", "scripted"],
    ids=lambda name: f"critic {name}",  # `vllm` by itself is taken for the marker
)
def test_a_critic_without_its_model_is_refused(runs, critic):
    assert "with --model" in refused(runs, "--critic", critic)


def openai(server, *options):
    return ("--critic", "openai", "--model", MODEL, "--base-url", server.url, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--votes", "0"), "Invalid value for '--votes'"),
        (("--votes", "101"), "Invalid value for '--votes'"),
        (("--reasoning", "extreme"), "Invalid value for '--reasoning'"),
        (("--context", "everything"), "Invalid value for '--context'"),
        (("--max-input-tokens", "0"), "Invalid value for '--max-input-tokens'"),
        (("--concurrency", "0"), "Invalid value for '--concurrency'"),
        (("--timeout", "0"), "Invalid value for '--timeout'"),
        (("--timeout", "nan"), "Invalid value for '--timeout': expected a number, got nan"),
        (("--budget-usd", "-1"), "Invalid value for '--budget-usd'"),
        (("--budget-usd", "nan"), "Invalid value for '--budget-usd': expected a number, got nan"),
        (("--budget-usd", "inf"), "Invalid value for '--budget-usd': expected a number, got inf"),
        (("--prompt", "none.md"), "Invalid value for '--prompt'"),
        (("--prompt", __file__), "expected YAML front matter between two lines"),
        (("--prices", __file__), "expected a table of prices in TOML"),
        (("--budget-usd", "1"), f"--budget-usd: the price of {MODEL} is not known"),
        (("--max-input-tokens", "300"), "with one step needs"),
        (("--tokenizer", "./none"), "--tokenizer ./none: there is no such folder"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_a_sentence(server, runs, options, message):
    assert message in refused(runs, *openai(server, *options))


@pytest.mark.parametrize("argument", ["seed", "=1", " =1"])
def test_an_engine_argument_is_key_and_value(runs, argument):
    error = refused(runs, "--critic", "vllm", "--model", "m", "--engine-arg", argument)
    assert error == f"Error: --engine-arg {argument}: expected KEY=VALUE"


def test_the_rules_read_no_patch(runs):
    assert "the rules critic reads no patch" in refused(runs, "--context", "patch")


def test_the_rules_are_told_the_outcome_where_that_is_asked_for(runs, tmp_path):
    ids = []
    for context in ("none", "outcome"):
        run = srft_prep("label", runs, "-o", tmp_path / context, "--context", context)
        assert run.status == 0, run.stderr
        config = orjson.loads((tmp_path / context / "manifest.json").read_bytes())["config"]
        ids.append(config["prompt_hash"])
    assert ids[0] != ids[1]


def test_a_model_that_the_server_does_not_have_is_named_with_those_it_has(server, runs):
    options = ("--critic", "openai", "--model", "other", "--base-url", server.url)
    error = refused(runs, *options)
    assert "other" in error
    assert MODEL in error


def dry_run(server, runs, output, *options):
    files = sorted(path for path in output.rglob("*")) if output.exists() else None
    run = srft_prep("label", runs, "-o", output, *openai(server, "--dry-run", "--json", *options))
    assert run.status == 0, run.stderr
    assert (sorted(output.rglob("*")) if output.exists() else None) == files
    assert server.questions == []
    *lines, document = run.stdout.splitlines()
    return lines, orjson.loads(document)


def test_a_dry_run_prints_numbers_and_neither_asks_nor_writes(server, runs, prices, tmp_path):
    lines, found = dry_run(server, runs, tmp_path / "labels", "--prices", prices)
    assert found["dry_run"] is True
    assert (found["requests"], found["trajectories"], found["steps"]) == (2, 2, 12)
    assert found["prompt_tokens"] > 1000
    assert found["usd"] == pytest.approx(
        (found["prompt_tokens"] * 1.0 + found["completion_tokens"] * 10.0) / 1e6
    )
    assert lines[0].startswith("to ask: 2 requests about 2 trajectories, 12 steps (0 of the")
    assert lines[1].startswith(f"tokens: about {found['prompt_tokens']:,} input, about ")
    assert lines[2].startswith("cost: about $0.0")
    assert "the paper's critic: $132" in lines[2]


def test_a_dry_run_without_a_price_says_that_the_cost_is_not_known(server, runs, tmp_path):
    lines, found = dry_run(server, runs, tmp_path / "labels")
    assert found["usd"] is None
    assert lines[2].startswith("cost: not known")


@pytest.mark.parametrize(
    ("options", "requests"),
    [
        (("--only", "all"), 3),
        (("--only", "resolved"), 1),
        (("--votes", "3"), 6),
        (("--only", "all", "--votes", "2"), 6),
    ],
)
def test_a_dry_run_counts_what_the_options_ask_for(server, runs, tmp_path, options, requests):
    _, found = dry_run(server, runs, tmp_path / "labels", *options)
    assert found["requests"] == requests


def test_a_dry_run_with_a_tokenizer_is_exact_and_with_rationales_longer(server, runs, tmp_path):
    lines, found = dry_run(server, runs, tmp_path / "labels", "--tokenizer", "example")
    assert lines[1].startswith(f"tokens: {found['prompt_tokens']:,} input")
    _, longer = dry_run(server, runs, tmp_path / "labels", "--rationale")
    assert longer["completion_tokens"] > found["completion_tokens"]


def test_a_dry_run_leaves_a_directory_of_labels_as_it_is(server, runs, tmp_path):
    output = tmp_path / "labels"
    assert srft_prep("label", runs, "-o", output).status == 0
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    dry_run(server, runs, output)
    assert {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("critic", ["rules", "scripted"])
def test_a_dry_run_of_a_critic_that_asks_no_model_says_what_and_that_it_costs_nothing(
    runs, tmp_path, critic
):
    listed = tmp_path / "listed.jsonl"
    listed.write_text('{"trajectory_id": "a", "step_index": 0, "label": "good"}\n')
    words = ("--critic", critic, *(("--model", listed) if critic == "scripted" else ()))
    run = srft_prep("label", runs, "-o", tmp_path / "labels", *words, "--dry-run", "--json")
    assert run.status == 0, run.stderr
    *lines, document = run.stdout.splitlines()
    assert lines == [
        "to ask: 2 requests about 2 trajectories, 12 steps",
        "cost: $0.00, no model is asked",
    ]
    found = orjson.loads(document)
    assert (found["requests"], found["trajectories"], found["steps"]) == (2, 2, 12)
    assert (found["usd"], found["prompt_tokens"]) == (0, 0)
    assert not (tmp_path / "labels").exists()
    assert srft_prep("label", runs, "-o", tmp_path / "labels", *words).status in (0, 1)
    again = srft_prep("label", runs, "-o", tmp_path / "labels", *words, "--dry-run")
    assert again.stdout.startswith("to ask: 0 requests about 0 trajectories, 0 steps\n")


def test_the_shipped_prompt_is_the_default(server, runs, tmp_path):
    shipped = Path(__file__).resolve().parents[1] / "prompts" / "step_critic.md"
    assert (
        dry_run(server, runs, tmp_path / "labels")
        == dry_run(server, runs, tmp_path / "labels", "--prompt", shipped)
    )  # fmt: skip
