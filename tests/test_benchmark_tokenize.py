"""benchmarks/tokenize.py has the name of a module of the standard library: it must harm nobody."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)


@pytest.mark.parametrize("script", ["tokenize.py", "packing.py"])
def test_scripts_beside_it_start(script: str) -> None:
    done = run(str(BENCHMARKS / script), "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_neighbour_that_imports_tokenize_gets_the_standard_library() -> None:
    code = (
        "import tokenize, inspect, linecache, sys\n"
        "assert callable(tokenize.generate_tokens) and tokenize.open and tokenize.TokenError\n"
        "assert tokenize.__file__ == tokenize.__spec__.origin, tokenize.__spec__\n"
        "assert linecache.tokenize is tokenize is sys.modules['tokenize']\n"
        "print(tokenize.__file__)\n"
    )
    done = run("-c", code)  # the working folder is first in the path, as a script's own is
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent != BENCHMARKS
    assert Path(done.stdout.strip()).name == "tokenize.py"


def test_the_benchmark_itself_finds_the_standard_library() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['tokenize.py', '--help']; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(BENCHMARKS / 'tokenize.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    import tokenize\n"
        "    print(tokenize.__file__)\n"
    )
    done = run("-P", "-c", code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).parent != BENCHMARKS
