"""Who may ask the server what; no browser here, so that every header can be anything."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import orjson
import pytest
from starlette.testclient import TestClient

from srft_prep.gold import read_gold
from srft_prep.review.app import MAX_BODY_BYTES, review_app
from srft_prep.review.catalogue import Catalogue
from srft_prep.review.session import Session, Settings
from tests.review.serving import ReviewServer
from tests.stages import srft_prep, trajectory, write_trajectories

RUN = trajectory("run-1", num_steps=3)
LABEL = {"row": 0, "step": 1, "label": "harmful"}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trajectories(tmp_path_factory.mktemp("review") / "trajectories", [RUN])


@pytest.fixture(scope="module")
def server(trajectories: Path) -> Iterator[ReviewServer]:
    with ReviewServer(trajectories, "--annotator", "ada") as running:
        yield running


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=120) as opened:
        yield opened


def given(server: ReviewServer, **more: str) -> dict[str, str]:
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    return {"x-review-token": server.token} | headers


def test_the_page_itself_may_ask(server: ReviewServer, client: httpx.Client) -> None:
    page = client.get(server.address)
    assert page.status_code == 200
    assert "srft-prep review" in page.text
    for name in ("app.js", "review.css", "page_style.css"):
        assert client.get(server.address + name).status_code == 200
    headers = given(server, origin=server.origin, sec_fetch_site="same-origin")
    found = client.get(f"{server.address}api/trajectories/0", headers=headers)
    assert found.json()["trajectory_id"] == "run-1"


@pytest.mark.parametrize("path", ["", "app.js", "api/session"])
def test_a_request_without_the_token_is_refused(
    server: ReviewServer, client: httpx.Client, path: str
) -> None:
    wrong = server.token[:-1] + ("A" if server.token[-1] != "A" else "B")
    for prefix in ("", f"{wrong}/", "x/", f"x/../{wrong}/"):
        answer = client.get(f"{server.origin}/{prefix}{path}", headers={"x-review-token": wrong})
        assert answer.status_code == 403
        assert server.token not in answer.text


def test_data_needs_the_token_in_the_header_too(server: ReviewServer, client: httpx.Client) -> None:
    assert client.get(f"{server.address}api/session").status_code == 403
    answer = client.post(f"{server.address}api/labels", json=LABEL)
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "https://127.0.0.1"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost@evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_a_request_from_another_site_or_for_another_name_is_refused(
    server: ReviewServer, client: httpx.Client, headers: dict[str, str]
) -> None:
    gold = Path(server.said.split("labels of ada go to ")[1].splitlines()[0])
    before = gold.read_bytes() if gold.exists() else b""
    for method, path in (("GET", "api/session"), ("POST", "api/labels"), ("OPTIONS", "api/labels")):
        answer = client.request(
            method, f"{server.address}{path}", headers=given(server, **headers), json=LABEL
        )
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert (gold.read_bytes() if gold.exists() else b"") == before


def test_a_tunnel_may_use_another_port(server: ReviewServer, client: httpx.Client) -> None:
    headers = given(server, host="localhost:9000", origin="http://localhost:9000")
    assert client.get(f"{server.address}api/session", headers=headers).status_code == 200


def test_every_answer_forbids_storing_framing_and_loading(
    server: ReviewServer, client: httpx.Client
) -> None:
    for address in (server.address, f"{server.address}api/session", f"{server.origin}/x"):
        headers = client.get(address, headers=given(server)).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "set-cookie" not in headers
        assert "server" not in headers


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[]",
        b"{}",
        orjson.dumps(LABEL | {"label": "bad"}),
        orjson.dumps(LABEL | {"step": 3}),
        orjson.dumps(LABEL | {"step": -1}),
        orjson.dumps(LABEL | {"row": 1}),
        orjson.dumps(LABEL | {"row": "0"}),
        orjson.dumps(LABEL | {"row": True}),
        b" " * (1 << 17),
    ],
)
def test_a_body_that_is_no_label_is_refused(
    server: ReviewServer, client: httpx.Client, body: bytes
) -> None:
    answer = client.post(f"{server.address}api/labels", headers=given(server), content=body)
    assert answer.status_code in (400, 413)
    assert answer.json()["error"]


def test_a_long_body_that_does_not_tell_its_length_is_refused_before_it_is_read(
    trajectories: Path, tmp_path: Path
) -> None:
    received = 0
    answers: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b" " * 1024, "more_body": received < 10_000}

    async def send(message: dict[str, object]) -> None:
        answers.append(message)

    settings = Settings(annotator="ada", gold=tmp_path / "gold.jsonl")
    app = review_app(Session(Catalogue(trajectories), [], settings), "token")
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/token/api/labels",
        "headers": [(b"host", b"127.0.0.1"), (b"x-review-token", b"token")],
        "query_string": b"",
    }
    with ThreadPoolExecutor(1) as pool:  # this thread may have a loop: the browser tests'
        pool.submit(lambda: asyncio.run(app(scope, receive, send))).result()
    assert answers[0]["status"] == 413
    assert received == (MAX_BODY_BYTES >> 10) + 1


@pytest.mark.parametrize(
    "path",
    [
        "api/trajectories/99",
        "api/trajectories/-1",
        "api/trajectories/..%2f..%2fetc%2fpasswd",
        "api/trajectories/0/text?message=9",
        "api/trajectories?offset=x",
        "api/trajectories?outcome=maybe",
        "api/nothing",
        "../review/app.py",
        "%2e%2e/app.py",
    ],
)
def test_what_is_not_there_is_said(server: ReviewServer, client: httpx.Client, path: str) -> None:
    answer = client.get(server.address + path, headers=given(server))
    assert answer.status_code in (400, 403, 404)


def test_a_label_that_cannot_be_written_is_not_called_saved(
    trajectories: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    settings = Settings(annotator="ada", gold=folder / "gold.jsonl")
    session = Session(Catalogue(trajectories), [], settings)
    with TestClient(review_app(session, "token"), base_url="http://127.0.0.1") as client:
        answer = client.post("/token/api/labels", headers={"x-review-token": "token"}, json=LABEL)
    assert answer.status_code == 500
    assert "not saved" in answer.json()["error"]
    assert session.num_labelled() == 0


def test_ctrl_c_ends_it_with_the_command_that_measures(trajectories: Path, tmp_path: Path) -> None:
    gold = tmp_path / "gold.jsonl"
    with ReviewServer(trajectories, "--annotator", "ada", "--gold", gold) as server:
        address, headers = f"{server.address}api/labels", given(server)
        answer = httpx.post(address, headers=headers, json=LABEL, timeout=120)
        assert answer.json()["progress"]["labelled_steps"] == 1
        assert server.stop(signal.SIGINT) == 0
    assert "1 steps labelled by ada" in server.said
    assert f"srft-prep critic-eval --labels DIR --gold {gold}" in server.said
    assert read_gold([gold]).labels == {("run-1", 1): "harmful"}


def test_only_the_loopback_address_is_listened_on(server: ReviewServer) -> None:
    port = int(server.origin.rsplit(":", 1)[1])
    opened = set()
    for each in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a connection that ends meanwhile
            opened.add(str(each.readlink()))
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    lines += Path("/proc/net/tcp6").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in opened]
    assert listening == [f"0100007F:{port:04X}"]


def test_usage_errors_say_what_to_do(trajectories: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--labels", tmp_path / "none"], "is no directory"),
        (["--labels", tmp_path, "--labels", f"{tmp_path.name}={tmp_path}"], "NAME=DIR"),
        (["--gold", tmp_path / "no" / "gold.jsonl"], "does not exist"),
        (["--annotator", " "], "expected a name"),
        (["--read-only", "--adjudicate"], "leave out --adjudicate"),
        (["--read-only", "--gold", tmp_path / "none.jsonl"], "none.jsonl: expected a gold file"),
        (["--labels", tmp_path], "expected srft-prep label output"),
    ):
        run = srft_prep("review", trajectories, "--no-browser", *words)
        assert run.status == 2
        assert message in run.stderr


def test_a_port_in_use_is_an_error(server: ReviewServer, trajectories: Path) -> None:
    port = server.origin.rsplit(":", 1)[1]
    run = srft_prep("review", trajectories, "--no-browser", "--port", port)
    assert run.status == 2
    assert f"--port {port}: Address already in use" in run.stderr


def test_without_the_extra_the_error_is_the_line_that_installs_it(trajectories: Path) -> None:
    program = (
        "import sys; from importlib.abc import MetaPathFinder\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'uvicorn' else find(name, *a)\n"
        f"sys.argv = ['srft-prep', 'review', {str(trajectories)!r}]\n"
        "from srft_prep.cli import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 2
    assert "pip install 'srft-prep[review]'" in run.stderr
