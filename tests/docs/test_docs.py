"""The documents are current: their settings, results, links, commands, errors, and the tests they name.

``python tests/docs/test_docs.py --write`` renders anew the tables of docs/configuration.md, and the part of
docs/results.md that is made of the files in docs/results.
"""

import ast
import inspect
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest import mock

import pytest

from fedsmooth_core import config
from fedsmooth_core.config import RunConfig, Section, TrainingPlan, to_nested
from fedsmooth_core.data import dataset_names
from fedsmooth_core.models import registry
from server import configuration
from server.cli import parse, parser
from server.reproduction.figures import figures_named
from server.reproduction.page import page_of
from server.reproduction.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = ROOT / "docs" / "configuration.md"
DOCUMENTS = sorted([*ROOT.glob("README.md"), *(ROOT / "docs").rglob("*.md")])

# --------------------------------------------------------------------------------------------------
# The tables of docs/configuration.md


def render_settings() -> str:
    """Every setting, one table a section, from the dataclasses and the composed default run."""
    parts = [_settings_table("Top level", RunConfig, "")]
    for item in fields(RunConfig):
        section = get_type_hints(RunConfig)[item.name]
        if isinstance(section, type) and issubclass(section, Section):
            parts.append(_settings_table(f"`{item.name}`", section, f"{item.name}."))
    return "\n\n".join(parts)


def render_groups() -> str:
    """Every Hydra group with its options, the default one in bold."""
    defaults = {}
    for line in (configuration.CONF / "config.yaml").read_text().splitlines():
        if match := re.fullmatch(r"  - (\w+): (\w+)", line):
            defaults[match[1]] = match[2]
    rows = []
    for group in sorted(configuration._groups() - {"experiment"}):
        options = sorted(path.stem for path in (configuration.CONF / group).glob("*.yaml"))
        shown = [f"**`{name}`**" if name == defaults[group] else f"`{name}`" for name in options]
        rows.append(f"| `{group}` | {', '.join(shown)} |")
    return "\n".join(["| Group | Options (default in bold) |", "|---|---|", *rows])


def render_experiments() -> str:
    """Every experiment with what it stands for, from the composed configurations."""
    lines = [
        "| `experiment=` | Data set | Model | Clients | Rounds | sigma | epsilon | n | Images |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    files = (configuration.CONF / "experiment").glob("*.yaml")
    for name in sorted((path.stem for path in files), key=_natural):
        run = _composed([f"experiment={name}"])
        images = run.certification.num_images or "all"
        lines.append(
            f"| `{name}` | {run.dataset.name} | {run.model.name} | {run.partition.num_clients} "
            f"| {run.federation.num_rounds} | {run.smoothing.sigma:g} | {255 * run.attack.l2_budget:g}/255 "
            f"| {run.certification.n} | {images} |"
        )
    return "\n".join(lines)


def render_results() -> str:
    """The figures of the paper, from what was measured for them."""
    return page_of(ROOT / "docs" / "results").strip()


RENDERED: dict[Path, dict[str, Callable[[], str]]] = {
    CONFIGURATION: {
        "settings": render_settings,
        "groups": render_groups,
        "experiments": render_experiments,
    },
    ROOT / "docs" / "results.md": {"figures": render_results},
}


def refreshed(path: Path) -> str:
    """Return a document with every generated part rendered anew."""
    text = path.read_text()
    for name, render in RENDERED[path].items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        head, found_begin, rest = text.partition(begin)
        _, found_end, tail = rest.partition(end)
        assert found_begin, f"{path.name} lacks the line {begin}"
        assert found_end, f"{path.name} lacks the line {end}"
        text = f"{head}{begin}\n\n{render()}\n\n{end}{tail}"
    return text


def _settings_table(title: str, section: type[Section], prefix: str) -> str:
    is_sent = prefix.removesuffix(".") in get_type_hints(TrainingPlan)
    whose = "Part of the training plan: sent to the clients." if is_sent else "The server's alone."
    about = inspect.getdoc(section) if prefix else "`seed` is part of the training plan."
    lines = [
        f"### {title}",
        f"{_markdown(about)} {whose}" if prefix else _markdown(about),
        "| Setting | Default | Allowed | Meaning |\n|---|---|---|---|",
    ]
    default_run, documented = to_nested(_composed([])), _docstrings(section)
    for item in fields(section):
        hint = get_type_hints(section)[item.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            continue
        key = f"{prefix}{item.name}"
        # What a user gets; the dataclass's own default only where it is another one.
        value = (default_run[prefix.removesuffix(".")] if prefix else default_run)[item.name]
        default = f"`{_yaml(value)}`"
        if value != item.default:
            default += f" (library: `{_yaml(item.default)}`)"
        meaning = documented[item.name]
        lines[-1] += (
            f"\n| `{key}` | {default} | {_allowed(key, item, hint)} | {_markdown(meaning)} |"
        )
    return "\n\n".join(lines)


def _allowed(key: str, item: Any, hint: Any) -> str:
    registered = {"dataset.name": dataset_names(), "model.name": sorted(registry._ARCHITECTURES)}
    if key in registered:
        return f"one of {', '.join(registered[key])}"
    if "allowed" not in item.metadata:
        return config._type_name(hint)
    text = str(item.metadata["allowed"].text)
    options = get_args(hint) or (hint,)
    if int in options:
        text = text.replace("a number", "an integer", 1)
    return f"{text}, or null" if type(None) in options else text


def _docstrings(section: type[Section]) -> dict[str, str]:
    """The string below each field of a section and of the sections that it extends."""
    found = {}
    for cls in reversed([c for c in section.__mro__ if c.__module__ == config.__name__]):
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[field.target.id] = ast.literal_eval(after.value)  # type: ignore[union-attr]
    return found


def _composed(overrides: list[str]) -> RunConfig:
    with mock.patch.dict(os.environ):
        os.environ.pop("FEDSMOOTH_DATA", None)
        return configuration.compose(overrides)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _markdown(text: str | None) -> str:
    """A docstring as one line of a Markdown table; what is not code is escaped."""
    parts = " ".join((text or "").replace("``", "`").split()).replace("|", "\\|").split("`")
    return "`".join(
        part if i % 2 else re.sub(r"([*<])", r"\\\1", part) for i, part in enumerate(parts)
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)
    ]


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.name)
def test_what_is_generated_is_current(path):
    assert path.read_text() == refreshed(path), "run: python tests/docs/test_docs.py --write"


# --------------------------------------------------------------------------------------------------
# Links, paths and names

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MACHINE_PATH = re.compile(
    r"(?<![\w.~/:-])/(?:work|root|home|Users|tmp|var|opt|mnt|usr|etc)(?:/|\b)"
)


def _prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text())


def _links(path: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "code", _prose(path))
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def _anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.+?) *$", _prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    for link in _links(path):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT), f"{path.name} links out of the repository: {link}"
        assert target.exists(), f"{path.name} links to what is not there: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{path.name} links to no heading: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_path_of_somebodys_machine(path):
    assert not _MACHINE_PATH.findall(path.read_text())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_tests_exist(path):
    sources = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    existing = set(re.findall(r"^ *def (test_\w+)\(", sources, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", path.read_text()))
    assert named <= existing, f"{path.name} names tests that are not there: {named - existing}"


# --------------------------------------------------------------------------------------------------
# Commands


def _commands(path: Path) -> Iterator[list[str]]:
    """Every simple command in the document's shell blocks, as words, without its environment."""
    for language, block in _FENCE.findall(path.read_text()):
        if language not in ("bash", "sh", "shell", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("();<>|&"):
                    if words:
                        yield words
                    words = []
                elif words or not re.match(r"[A-Z_]+=", word):
                    words.append(word)


def _ours() -> list[Any]:
    """The documents' commands that take settings, each as a test parameter."""
    return [
        pytest.param(words, id=f"{path.stem}: {' '.join(words)}")
        for path in DOCUMENTS
        for words in _commands(path)
        if Path(words[0]).name in ("fedsmooth", "flwr", "make")
    ]


@pytest.mark.parametrize("words", _ours())
def test_commands_are_accepted(words, tmp_path):
    program, arguments = Path(words[0]).name, words[1:]
    if program == "fedsmooth":
        _check_fedsmooth(arguments, tmp_path)
    elif program == "make":
        for word in arguments:
            if word.startswith("ARGS="):
                _check_fedsmooth(["simulate", *shlex.split(word.removeprefix("ARGS="))], tmp_path)
    elif arguments[:1] == ["run"] and "--run-config" in arguments:
        settings = arguments[arguments.index("--run-config") + 1]
        match = re.fullmatch(r'overrides="(.*)"', settings)
        assert match, f"the app declares overrides alone: {settings}"
        configuration.compose(shlex.split(match[1]))


def _check_fedsmooth(arguments: list[str], tmp_path: Path) -> None:
    if arguments in (["--help"], [arguments[0], "--help"]):
        arguments = [word for word in arguments if word != "--help"]
        assert not arguments or arguments[0] in parser().format_help()
        return
    options = parse(arguments)  # exits on what it does not know
    overrides = list(getattr(options, "overrides", []))
    command = arguments[0]
    if command == "certify":
        configuration.with_overrides(to_nested(RunConfig()), overrides, "checkpoint")
        return
    if command == "reproduce":
        names = [word for word in options.words if "=" not in word]
        settings = [word for word in options.words if "=" in word]
        make_plan(figures_named(names), options.scale, options.seeds, settings, tmp_path)
        return
    if "resume=true" in overrides:
        # A run of the default settings stands in for the one to continue.
        configuration.save(configuration.compose([]), tmp_path / "config.yaml")
        overrides = [word for word in overrides if not word.startswith("run_dir=")]
        overrides.append(f"run_dir={tmp_path}")
    elif command == "centralized":
        overrides.insert(0, "training=centralized")
    several = configuration.sweep(overrides) if getattr(options, "multirun", False) else [overrides]
    for combination in several:
        configuration.compose(combination)


def _errors() -> list[Any]:
    """The documents' examples of ``fedsmooth config`` commands and the sentences they end with."""
    pattern = re.compile(r"^\$ fedsmooth config (.*)\nError: (.*)$", re.MULTILINE)
    return [
        pytest.param(shlex.split(overrides), said, id=overrides)
        for path in DOCUMENTS
        for overrides, said in pattern.findall(path.read_text())
    ]


@pytest.mark.parametrize(("overrides", "said"), _errors())
def test_errors_are_as_shown(overrides, said):
    with pytest.raises(config.ConfigError) as refused:
        configuration.compose(overrides)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    "words",
    [
        ["simulate", "smoothing.sgima=0.5"],
        ["simulate", "experiment=fig12"],
        ["simulate", "smoothing.sigma=0.25,0.5"],
        ["simulate", "-m", "smoothing.sigma=0.25,-1"],
        ["simulate", "run_dir=runs/one", "resume=true", "seed=1"],
        ["certify", "runs/one", "certification.m=1"],
        ["report", "--yaml", "runs/one"],
        ["train"],
        ["reproduce", "fig12"],
        ["reproduce", "fig1", "smoothing.sigma=0.5"],
        ["reproduce", "fig1", "--scale=large"],
    ],
)
def test_commands_that_do_not_work_are_noticed(words, tmp_path):
    with pytest.raises((SystemExit, config.ConfigError)):
        _check_fedsmooth(words, tmp_path)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {sys.argv[0]} --write")
    for document in RENDERED:
        document.write_text(refreshed(document))
