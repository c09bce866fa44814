"""The peers' own virtual environments under .venv-peers/, made when they are missing.

    python benchmarks/peers/environments.py [TOOL...]

Each takes about a minute and 1.5 GB, most of it torch. An environment is taken for whole when it
holds the requirements that it was made from.
"""

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".venv-peers"
REQUIREMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "trl": (("-r", "trl.txt"),),
    "axolotl": (("-r", "axolotl.txt"), ("--no-deps", "-r", "axolotl-alone.txt")),
    "llamafactory": (("-r", "llamafactory.txt"), ("--no-deps", "-r", "llamafactory-alone.txt")),
    "megatron": (
        ("-r", "megatron.txt"),
        ("--no-deps", "--ignore-requires-python", "-r", "megatron-alone.txt"),
    ),
}
"""The arguments of each `pip install`, by tool."""


class UnavailableError(Exception):
    """A peer could not be installed; says why."""


def python_of(tool: str) -> Path:
    """Return the interpreter of a peer's environment, which is made if need be.

    Raises:
        UnavailableError: it could not be made.
    """
    folder = ENVIRONMENTS / tool
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    wanted = _hash_of_requirements(tool)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for arguments in REQUIREMENTS[tool]:
        command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["pip says nothing"]
            raise UnavailableError(f"{tool} cannot be installed: {last[0]}")
    stamp.write_text(wanted)
    return python


def _hash_of_requirements(tool: str) -> str:
    digest = hashlib.sha256()
    for arguments in REQUIREMENTS[tool]:
        digest.update((HERE / arguments[-1]).read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    for name in sys.argv[1:] or REQUIREMENTS:
        print(python_of(name))
