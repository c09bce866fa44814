"""What a shell command or Python code does to files: reads, writes, removes, restores.

Whether it writes has three answers. `may write` is for programs whose code is not in sight: a rule
that needs "nothing was written in between" must treat it as a write, a rule that needs "this was
written" must not. Test runners read: they leave caches behind, not sources.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from srft_prep.critic.rules.shell import ASSIGNMENT, Command, word_set

Effect = Literal["reads", "may write", "writes"]

_WRITERS: Final = word_set(
    "rm rmdir unlink mv cp mkdir touch ln tee patch chmod chown truncate dd install rsync unzip "
    "tar gunzip gzip wget ed ex apt apt-get yum dnf apk conda mamba"
)
_READERS: Final = word_set("cat head tail nl less more sed bat")
_HARMLESS: Final = word_set(
    "cd pwd ls echo printf true false test [ [[ grep egrep fgrep rg ag ack find fd tree wc sort "
    "uniq cut awk tr diff cmp file stat which type whereis whoami id uname env export set source "
    ". date du df ps hexdump xxd od strings column jq basename dirname realpath readlink sleep "
    "seq yes for case in fi done esac man help history alias declare local read return exit wait "
    "kill"
)
_TESTERS: Final = word_set("pytest py.test nosetests unittest runtests.py tox ctest")
_PYTHONS: Final = re.compile(r"(?:.*/)?(?:python|pypy|ipython)[\d.]*$")
_GIT_READS: Final = word_set(
    "status diff log show blame grep ls-files ls-tree rev-parse rev-list describe cat-file branch "
    "remote shortlog reflog config tag help version fetch"
)
_WRITING_CODE: Final = (
    ".write(", "write_text(", "write_bytes(", ".writelines(", "'w'", '"w"', "'a'", '"a"', "'wb'",
    '"wb"', "'r+'", '"r+"',
)  # fmt: skip
_ACTING_CODE: Final = (
    "os.remove(", "os.rename(", "os.replace(", ".unlink(", "shutil.", "subprocess", "os.system(",
    "mkdir(", "makedirs(", "rmtree(", ".save(", "savefig(", ".to_csv(", "call_command(",
)  # fmt: skip
_PATH_IN_CODE: Final = re.compile(r"""['"]([\w./-]{1,300}\.\w{1,5})['"]""")


def effect_of(command: Command) -> Effect:
    """Return whether a command changes files."""
    name, operands = command.name, command.operands
    if command.targets or name in _WRITERS:
        return "writes"
    if name in ("sed", "perl"):
        return "writes" if in_place(command) else "reads"
    if name == "git":
        return _effect_of_git(*_git_verb(command.words))
    if name in ("pip", "pip3", "uv"):
        changes = {"install", "uninstall", "sync", "add", "remove"}
        return "writes" if changes & set(operands) else "reads"
    if name == "find":
        return "writes" if {"-delete", "-exec"} & set(command.words) else "reads"
    if _is_test_run(name, operands):
        return "reads"
    if _PYTHONS.match(name):
        return _effect_of_python(command)
    if name in _READERS or name in _HARMLESS or not name or ASSIGNMENT.match(name):
        return "reads"
    return "may write"


def effect_of_code(code: str) -> Effect:
    """Return whether Python code changes files, by the calls that it spells out."""
    if any(hint in code for hint in _WRITING_CODE):
        return "writes"
    return "may write" if any(hint in code for hint in _ACTING_CODE) else "reads"


def strongest(effects: Iterable[Effect]) -> Effect:
    """Return the effect of several things done together."""
    found = set(effects)
    if "writes" in found:
        return "writes"
    return "may write" if "may write" in found else "reads"


def read_files(commands: Iterable[Command]) -> tuple[str, ...] | None:
    """Return the files that are shown by commands that do nothing else; None for other commands."""
    paths: list[str] = []
    for command in commands:
        if command.name in ("cd", "echo", "pwd") and not command.targets:
            continue
        if command.name not in _READERS or effect_of(command) != "reads":
            return None
        paths += _sed_files(command) if command.name == "sed" else command.operands
    return tuple(path for path in dict.fromkeys(paths) if not path.isdigit())


def written_files(command: Command) -> tuple[str, ...]:
    """Return the files that a command writes, as far as its words or its code name them."""
    name, operands = command.name, command.operands
    if name in ("sed", "perl") and in_place(command):
        return command.targets + _sed_files(command)
    if name in ("cp", "mv"):
        return command.targets + operands[-1:]
    if name in ("touch", "tee", "truncate"):
        return command.targets + operands
    if _PYTHONS.match(name) and (code := python_code(command)) and effect_of_code(code) == "writes":
        return command.targets + tuple(dict.fromkeys(_PATH_IN_CODE.findall(code)))
    return command.targets


def removed_files(command: Command) -> tuple[str, ...]:
    """Return the files that a command removes."""
    if command.name in ("rm", "unlink"):
        return command.operands
    if command.name == "git" and command.operands[:1] == ("rm",):
        return command.operands[1:]
    return ()


def restored_files(command: Command) -> tuple[str, ...]:
    """Return the files that git puts back to their committed state; `.` for all of them."""
    if command.name != "git":
        return ()
    verb, rest = _git_verb(command.words)
    paths = tuple(word for word in rest if not word.startswith("-"))
    if verb == "restore":
        return () if "--staged" in rest and "--worktree" not in rest else paths
    if verb == "checkout" and not {"-b", "-B", "--orphan"} & set(rest):
        if "--" in rest:
            return rest[rest.index("--") + 1 :]
        return tuple(path for path in paths if path == "." or "." in path or "/" in path)
    if verb == "reset" and "--hard" in rest:
        return (".",)
    return ()


def stashes(commands: Sequence[Command]) -> int:
    """Return how many more times git stashes than it takes back."""
    depth = 0
    for command in commands:
        if command.name == "git":
            verb, rest = _git_verb(command.words)
            if verb == "stash":
                action = next((word for word in rest if not word.startswith("-")), "push")
                depth += {"push": 1, "save": 1, "pop": -1, "apply": -1}.get(action, 0)
    return depth


def in_place(command: Command) -> bool:
    """Return whether a sed or perl command edits files instead of printing."""
    return any(
        word.startswith("--in-place") or (word[:1] == "-" and word[1:2] != "-" and "i" in word[:4])
        for word in command.words[1:]
    )


def python_code(command: Command) -> str:
    """Return the Python code that a command carries: its heredoc, or the word after `-c`."""
    words = command.words
    if "-c" in words[1:-1]:
        return words[words.index("-c", 1) + 1]
    return command.body


def _sed_files(command: Command) -> tuple[str, ...]:
    words = command.words[1:]
    scripts = {at + 1 for at, word in enumerate(words) if word[:1] == "-" and word[-1:] == "e"}
    operands = [
        word for at, word in enumerate(words) if at not in scripts and not word.startswith("-")
    ]
    return tuple(operands if scripts else operands[1:])


def _git_verb(words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    rest = list(words[1:])
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in ("-C", "-c") and rest:
            rest.pop(0)
    return (rest[0], tuple(rest[1:])) if rest else ("", ())


def _effect_of_git(verb: str, rest: Sequence[str]) -> Effect:
    looks = verb in _GIT_READS or (verb == "stash" and {"list", "show"} & set(rest[:1]))
    return "reads" if looks or not verb else "writes"


def _effect_of_python(command: Command) -> Effect:
    if {"--version", "-V"} & set(command.words):
        return "reads"
    if code := python_code(command):
        return effect_of_code(code)
    if command.words[1:3] == ("-m", "pip"):
        return "writes" if {"install", "uninstall"} & set(command.words) else "reads"
    return "may write"


def _is_test_run(name: str, operands: Sequence[str]) -> bool:
    if name in _TESTERS:
        return True
    if _PYTHONS.match(name) or name in ("manage.py", "bin", "go", "cargo", "npm", "mvn", "make"):
        first = operands[0].rpartition("/")[2] if operands else ""
        return first in _TESTERS or first == "test" or operands[1:2] == ("test",)
    return False
