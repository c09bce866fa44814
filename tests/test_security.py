"""What SECURITY.md promises: no secret in a file, no code from data, no file outside the output.

Bombs are in tests/faults/test_bombs.py, checkpoints with code in tests/train/test_checkpoints.py.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest

import srft_prep
from srft_prep.manifest import read_manifest
from srft_prep.verification import verify
from tests.critic.api_server import MODEL, ApiServer, Reaction, Turn, answer, problem
from tests.stages import Run, make_examples
from tests.stages import srft_prep as run_here
from tests.tiny_models import EXAMPLE_TOKENIZER

PACKAGE = Path(srft_prep.__file__).parent

CANARIES = {
    "OPENAI_API_KEY": "sk-canary-1f6b0c",
    "ANTHROPIC_API_KEY": "sk-ant-canary-77e2a9",
    "HF_TOKEN": "hf_canary4d1c",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-90d3",
}
PASSWORD = "canary-password-52ab"


def everything_in(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the bytes of all files, those of tables also as they read: pages are compressed."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                yield path, repr(table.to_pylist()).encode()
                yield path, repr(pq.read_schema(path).metadata).encode()


def secrets_in(turn: Turn) -> dict[str, str]:
    names = ("authorization", "x-api-key")
    return {name: text for name, text in turn.headers.items() if name.lower() in names}


def telling(turn: Turn) -> Reaction:
    """Answer, or now and then fail with a message that repeats what the client sent in secret."""
    secrets = secrets_in(turn)
    kind = int(turn.share("kind") * 6)
    if kind == 0:
        return problem(400, f"cannot do this for {secrets}")
    if kind == 1 and not turn.asked:
        return problem(500, f"down for {secrets}")
    if kind == 2:
        return answer(turn, f"I was given {secrets}")
    return answer(turn)


@pytest.mark.parametrize("user", ["", f"someone:{PASSWORD}@"])
@pytest.mark.parametrize("critic", ["openai", "anthropic"])
def test_no_secret_is_in_any_file_or_on_any_stream(
    critic: str, user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    runs = PACKAGE / "examples" / "runs"
    said: list[Run] = [run_here("ingest", runs, "--outcomes", runs, "-o", tmp_path / "runs")]
    with ApiServer(telling) as server:
        url = server.openai_url if critic == "openai" else server.anthropic_url
        url = url.replace("://", f"://{user}")
        model = ("--critic", critic, "--model", MODEL, "--base-url", url)
        labels = ("label", tmp_path / "runs", "--only", "all", *model, "-o", tmp_path / "labels")
        said += [run_here(*labels, "--json"), run_here(*labels, "--retry-failed")]
        sent = {text for each in server.turns for text in secrets_in(each.turn).values()}
    assert said[1].status in (0, 1), said[1].stderr
    assert sent, "nothing secret was sent"
    said.append(run_here("label", tmp_path / "runs", *model, "-o", tmp_path / "none"))  # is gone
    said.append(run_here("stats", tmp_path / "runs", "--labels", tmp_path / "labels"))
    words = ("tokenize", tmp_path / "runs", "--tokenizer", "example", "-o", tmp_path / "tokens")
    said.append(run_here(*words))
    labelled = ("--labels", tmp_path / "labels")
    said.append(run_here("pack", tmp_path / "tokens", *labelled, "-o", tmp_path / "shards"))
    secrets = [*CANARIES.values(), PASSWORD, *(text.split()[-1] for text in sent)]
    for run in said:
        assert not [secret for secret in secrets if secret in run.stdout + run.stderr]
    for path, data in everything_in(tmp_path):
        assert not [secret for secret in secrets if secret.encode() in data], path


HOSTILE_IDS = (
    "../../../../tmp/srft-escaped",
    "/tmp/srft-escaped",
    "..",
    ".",
    "",
    "a/../../b",
    "nul\0byte",
    "new\nline",
    "\x1b]0;title\x07\x1b[2J",
    "\u202eright-to-left",
    "C:\\windows\\x",
    "~root/x",
    "$(touch srft-escaped)",
    "; touch srft-escaped",
    "%s%n{0}{{ 7 * 7 }}",
    "x" * 100_000,
    "🙂" * 300,
)


def test_no_id_leads_out_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lines = []
    for number, name in enumerate(HOSTILE_IDS * 2):
        messages = [
            {"role": "user", "content": f"task {number}"},
            {"role": "assistant", "content": f"```bash\nls {number}\n```"},
            {"role": "user", "content": "README.md"},
            {"role": "assistant", "content": f"done {number}"},
        ]
        lines.append({"trajectory_id": name, "instance_id": name, "messages": messages})
    (tmp_path / "here" / "runs.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    for words in (
        ("ingest", "runs.jsonl", "-o", "out/runs"),
        ("label", "out/runs", "--only", "all", "-o", "out/labels"),
        ("tokenize", "out/runs", "--tokenizer", "example", "-o", "out/tokens"),
        *(
            ("pack", "out/tokens", "--labels", "out/labels", *more)
            for more in (("--hold-out", "0.3", "-o", "out/shards"),)
        ),
        *(
            ("export", "out/shards", "--to", target, "-o", f"out/{target}")
            for target in ("trl", "axolotl", "llama-factory", "megatron", "hf")
        ),
    ):
        run = run_here(*words)
        assert run.status == 0, run.stderr
        assert "Traceback" not in run.stderr
    for folder in (tmp_path / "here" / "out").iterdir():
        assert verify(folder).problems == ()
        named = {file["name"] for file in read_manifest(folder).files} | {"manifest.json"}
        assert {str(path.relative_to(folder)) for path in _files_in(folder)} == named
    parts = [pq.read_table(part) for part in read_manifest(Path("out/runs")).parts]
    kept = {name for part in parts for name in part["trajectory_id"].to_pylist()}
    assert {name for name in HOSTILE_IDS if name} <= kept
    for name in sorted(kept):
        run = run_here("inspect", "out/runs", "--id", name)
        assert run.status == 0, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"runs.jsonl", "out"}
    assert not list(Path("/tmp").glob("srft-escaped*"))


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_manifest_that_names_files_elsewhere_is_refused_and_deletes_none(tmp_path: Path) -> None:
    examples = make_examples(tmp_path)
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    file = examples.tokens / "manifest.json"
    sound = orjson.loads(file.read_bytes())
    for name in ("../precious.txt", str(precious), "a/../../precious.txt", "", "..", "x\0y"):
        files = [*sound["files"], {"name": name, "bytes": 4, "sha256": "00"}]
        file.write_bytes(orjson.dumps({**sound, "files": files}))
        tokenizer = ("--tokenizer", "example", "--history", "full")
        words = ("tokenize", examples.trajectories, *tokenizer, "-o", examples.tokens)
        run = run_here(*words, "--overwrite")
        assert run.status == 2
        assert run.stderr.startswith(f"Error: {file}: damaged: files: ")
        assert precious.read_text() == "mine"


def test_a_journal_that_is_a_link_is_refused_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".progress").symlink_to(tmp_path / "home")
    runs = PACKAGE / "examples" / "runs"
    run = run_here("ingest", runs, "-o", tmp_path / "out", "--overwrite")
    assert run.status == 2
    assert "expected a folder of this run's, got a link" in run.stderr
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["precious.txt"]


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ messages[0].keys.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('touch srft-escaped') }}",
    "{{ cycler.__init__.__globals__.os.system('touch srft-escaped') }}",
    "{{ self._TemplateReference__context.environment.loader }}{{ self.__init__.__globals__ }}",
    "{% set _ = messages.append(1) %}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__code__ }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{{ ('%s' | attr('format'))('x') }}{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% for x in range(1000000000) %}{% endfor %}",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_examples(tmp_path_factory.mktemp("security")).trajectories


def tokenize_with(template: str, trajectories: Path, folder: Path) -> Run:
    (folder / "template.jinja").write_text(template)
    words = ("tokenize", trajectories, "--tokenizer", "example", "-o", folder / "out")
    return run_here(*words, "--chat-template", folder / "template.jinja")


@pytest.fixture(scope="module")
def plain(trajectories: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The tokens of the template without anything behind it."""
    folder = tmp_path_factory.mktemp("plain")
    assert tokenize_with(TEMPLATE, trajectories, folder).status == 0
    return (folder / "out" / "part-00000.parquet").read_bytes()


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_that_reaches_for_python_is_refused_in_words_or_gets_nothing(
    escape: str,
    trajectories: Path,
    plain: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tokenize_with(TEMPLATE + escape, trajectories, tmp_path)
    texts = run.stdout + run.stderr
    assert "Traceback" not in texts
    assert "<class" not in texts.replace(escape, "")
    if run.status != 2:
        assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == plain
    assert {path.name for path in tmp_path.iterdir()} <= {"template.jinja", "out"}


PLANTED = """
from pathlib import Path
Path({place!r}).write_text("ran")
"""


def test_code_beside_a_tokenizer_or_a_model_is_never_run(
    trajectories: Path, tmp_path: Path
) -> None:
    place = tmp_path / "ran"
    model = shutil.copytree(EXAMPLE_TOKENIZER, tmp_path / "model")
    for name in ("tokenization_evil", "configuration_evil", "modeling_evil"):
        (model / f"{name}.py").write_text(PLANTED.format(place=str(place)))
    about = orjson.loads((model / "tokenizer_config.json").read_bytes())
    about |= {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]},
    }
    (model / "tokenizer_config.json").write_bytes(orjson.dumps(about))
    config = {
        "model_type": "evil",
        "architectures": ["EvilForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
        },
    }
    (model / "config.json").write_bytes(orjson.dumps(config))
    for words in (
        ("tokenize", trajectories, "--tokenizer", model, "-o", tmp_path / "tokens"),
        ("train", trajectories, "--model", model, "-o", tmp_path / "trained"),
        *(
            (*("label", trajectories, "--critic", "transformers"), "--model", model, "-o", out)
            for out in (tmp_path / "labels",)
        ),
    ):
        command = [sys.executable, "-m", "srft_prep", *map(str, words)]
        run = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert not place.exists(), words
        assert "Traceback" not in run.stderr, run.stderr
        assert run.returncode in (0, 2)


MODULES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_bytes()) for path in PACKAGE.rglob("*.py")
}


def uses_of(*names: str) -> set[str]:
    """Return the modules that name something, as a name, an attribute or an import."""
    found = set()
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            named = set()
            if isinstance(node, ast.Name):
                named = {node.id}
            elif isinstance(node, ast.Attribute):
                named = {node.attr}
            elif isinstance(node, ast.Import):
                named = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                named = {alias.name for alias in node.names} | {
                    (node.module or "").partition(".")[0]
                }
            if named & {*names}:
                found.add(module)
    return found


def test_nothing_is_unpickled_but_the_metadata_of_checkpoints() -> None:
    names = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "read_pickle")
    assert uses_of(*names) == {"train/checkpoints.py"}
    unpickler = next(
        node
        for node in ast.walk(MODULES["train/checkpoints.py"])
        if isinstance(node, ast.ClassDef) and node.name == "_MetadataUnpickler"
    )
    assert "find_class" in {
        each.name for each in unpickler.body if isinstance(each, ast.FunctionDef)
    }


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Yield all calls with their module and the words of what is called."""
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield module, node, ast.unparse(node.func)


def test_no_text_is_run_as_code_and_no_shell_is_started() -> None:
    for module, call, name in calls():
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), (
            module
        )
        assert not name.startswith(("yaml.load", "yaml.unsafe", "yaml.full")), module
        assert name not in ("torch.load", "np.load", "numpy.load", "torch.jit.load"), module
        for keyword in call.keywords:
            text = ast.unparse(keyword.value)
            assert (keyword.arg, text) != ("shell", "True"), module
            assert (keyword.arg, text) != ("allow_pickle", "True"), module
            assert (keyword.arg, text) != ("weights_only", "False"), module
            assert (keyword.arg, text) != ("trust_remote_code", "True"), module


def test_a_shell_runs_only_where_examples_are_recorded() -> None:
    started = {
        module
        for module, call, name in calls()
        if name.startswith("subprocess.")
        and any(word in ast.unparse(call) for word in ("'bash'", "'sh'", "'/bin/sh'", "'-c'"))
    }
    assert started <= {"examples/sandbox.py"}


def test_only_the_review_page_listens() -> None:
    """Its own tests show that it is bound to loopback and answers nobody without the token."""
    listeners = uses_of(
        "listen",
        "create_server",
        "start_server",
        "serve_forever",
        "HTTPServer",
        "ThreadingHTTPServer",
        "socketserver",
        "uvicorn",
    )
    assert {module.partition("/")[0] for module in listeners} <= {"review", "review_commands.py"}


def test_templates_are_compiled_by_the_sandbox_alone() -> None:
    makers = {
        module
        for module, _, name in calls()
        if name.rpartition(".")[2]
        in ("Environment", "NativeEnvironment", "from_string", "Template")
    }
    assert makers <= {"render.py", "sandbox.py", "marks.py", "evaluate/plots.py"}
