"""Files that commands write: over what they wrote before, and over nothing else."""

from pathlib import Path

import orjson
import pytest

from srft_prep.errors import ConfigError
from srft_prep.output_files import CALIBRATION, DISAGREEMENTS, PAGE, will_replace
from srft_prep.pages import document
from tests.stages import srft_prep, trajectory, write_trajectories

ROW = {"trajectory_id": "a", "step_index": 0, "labels": {"x": "good"}, "gold": None}
OURS = {
    PAGE: document("title", "<p>ours</p>").encode(),
    DISAGREEMENTS: orjson.dumps(ROW) + b"\n",
    CALIBRATION: orjson.dumps(
        dict.fromkeys(["schema", "kind", "members", "threshold", "fitted_on"])
    ),
}


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
def test_only_a_file_of_the_kind_is_replaced(tmp_path: Path, kind) -> None:
    path = tmp_path / "file"
    assert not will_replace(None, kind, option="-o", others=())
    assert not will_replace(path, kind, option="-o", others=[tmp_path / "other"])
    for content in (b"", OURS[kind]):
        path.write_bytes(content)
        assert will_replace(path, kind, option="-o", others=())
    gold = b'{"trajectory_id": "a", "step_index": 0, "label": "good"}\n'
    others = [content for each, content in OURS.items() if each is not kind]
    for content in (gold, b"\xff\x00", b"[]", b"<!DOCTYPE html>\n<p>mine</p>", *others):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"expected {kind.name} or nothing there"):
            will_replace(path, kind, option="-o", others=())
    with pytest.raises(ConfigError, match="choose another, or delete it"):
        will_replace(tmp_path, kind, option="-o", others=())


def test_an_input_is_known_by_any_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "gold").write_bytes(b"")
    (tmp_path / "link").symlink_to("gold")
    (tmp_path / "hard").hardlink_to(tmp_path / "gold")
    for name in ("gold", "link", "hard", "../" + tmp_path.name + "/gold"):
        with pytest.raises(ConfigError, match="which this command reads or writes"):
            will_replace(
                tmp_path / name, DISAGREEMENTS, option="-o", others=[None, tmp_path / "gold"]
            )


def test_inspect_and_stats_write_no_page_over_a_file_of_others(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", [trajectory("run-1", num_steps=2)])
    page = tmp_path / "page.html"
    command = ("inspect", runs, "--id", "run-1", "--html")
    first = srft_prep(*command, page)
    assert (first.status, first.stderr) == (0, "")
    again = srft_prep(*command, page)
    assert (again.status, again.stderr) == (0, f"{page}: replaced an earlier page\n")
    manifest = (runs / "manifest.json").read_bytes()
    for words in (command, ("stats", runs, "--html")):
        found = srft_prep(*words, runs / "manifest.json")
        assert found.status == 2
        assert "expected a page that srft-prep wrote or nothing there" in found.stderr
        assert not found.stdout
    assert (runs / "manifest.json").read_bytes() == manifest
