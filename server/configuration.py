"""Compose the configuration with Hydra; the one module that imports it.

Whatever Hydra or the core refuses comes out as a :class:`ConfigError` of one sentence.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import omegaconf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import fedsmooth_core
from fedsmooth_core.config import RunConfig, from_nested, to_nested, unknown_key
from fedsmooth_core.durable import write_atomically
from fedsmooth_core.errors import ConfigError

# Beside the packages, in a checkout as well as in Flower's app bundle.
CONF = Path(fedsmooth_core.__file__).resolve().parent.parent / "conf"

# What may differ between an interrupted run and its continuation: nothing that changes a finished round.
_FREE_ON_RESUME = (
    "run_dir",
    "resume",
    "name",
    "runtime",
    "certification",
    "service",
    "device_certification",
    "federation.num_rounds",
    "federation.deadline_seconds",
    "federation.connect_timeout_seconds",
    "federation.quorum",
    "federation.attempts",
    "federation.over_selection",
    "dataset.root",
)

# What may be set when a checkpoint is certified.
_OF_CERTIFICATION = ("certification.", "service.", "runtime.", "dataset.", "seed")


def compose(overrides: Sequence[str], defaults: Sequence[str] = ()) -> RunConfig:
    """Compose ``conf/`` with Hydra overrides (``key=value``, ``group=option``) and validate it.

    With ``resume=true`` and no group among the overrides, the interrupted run's own settings are the
    base instead, so that ``run_dir=... resume=true`` is enough. ``defaults`` are overrides of less
    weight, for new runs alone.

    Raises:
        ConfigError: for anything that is not a valid configuration.
    """
    parsed = _parse_settings(overrides)
    given = {override.key_or_group: override.value() for override in parsed}
    if not given.get("resume") or not given.get("run_dir"):
        return _compose([*defaults, *overrides])
    recorded = load(Path(str(given["run_dir"])))
    has_groups = bool(set(given) & _groups())
    config = _compose([*defaults, *overrides]) if has_groups else _updated(recorded, parsed)
    _refuse_differences(config, recorded)
    return config


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Expand ``a=1,2 b=3,4`` to the list of its combinations, as Hydra's own sweeper does."""
    choices: list[list[str]] = []
    for override in _parse(overrides):
        _check_key(override)
        key = override.get_key_element()
        if override.is_sweep_override():
            with _one_sentence():
                choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([f"{key}={override.get_value_element_as_str()}"])
    return [list(combination) for combination in itertools.product(*choices)]


def load(run_dir: Path) -> RunConfig:
    """Read the resolved configuration that a run recorded in its directory."""
    path = run_dir.expanduser() / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} holds no run: there is no config.yaml in it.")
    try:
        with _one_sentence():
            # Not resolved: what a file says may not reach for this machine's environment.
            values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is damaged: restore it from a copy, or start a new run."
        ) from error
    return _recorded(values, str(path))


def _recorded(values: Any, where: str) -> RunConfig:
    """Validate recorded settings; one that is missing must not turn into its default."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds no settings: restore it from a copy, or start a new run.")
    for key in _setting_keys():
        section, _, name = key.rpartition(".")
        part = values.get(section) if section else values
        if not isinstance(part, dict) or name not in part:
            raise ConfigError(
                f"{where} lacks the setting {key}: it is damaged, or of another version of this program."
            )
    return from_nested(RunConfig, values)


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    write_atomically(path, to_yaml(config).encode())


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_nested(config)))


def with_overrides(recorded: Any, overrides: Sequence[str], where: str) -> RunConfig:
    """Apply ``key=value`` overrides that concern certification to a checkpoint's own settings.

    Raises:
        ConfigError: for a setting that cannot matter any more, or recorded ones that are damaged.
    """
    parsed = _parse_settings(overrides)
    for override in parsed:
        if not override.key_or_group.startswith(_OF_CERTIFICATION):
            raise ConfigError(
                f"{override.input_line} does not concern the certification of a checkpoint: allowed are "
                f"{', '.join(_OF_CERTIFICATION)}."
            )
    base = _recorded(recorded, where)
    if any(item.key_or_group == "service.address" and item.value() is None for item in parsed):
        # That its training had a service certify models binds nobody who certifies one here.
        base = replace(base, certification=replace(base.certification, every=0))
    return _updated(base, parsed)


def _updated(recorded: RunConfig, overrides: Sequence[Override]) -> RunConfig:
    settings = to_nested(recorded)
    for override in overrides:
        section, _, name = override.key_or_group.rpartition(".")
        (settings[section] if section else settings)[name] = override.value()
    return from_nested(RunConfig, settings)


def _compose(overrides: Sequence[str]) -> RunConfig:
    with (
        _one_sentence(),
        hydra.initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        composed = hydra.compose("config", overrides=list(overrides))
        # The experiment group is merged into the others; its own name is no setting.
        return from_nested(RunConfig, _plain(composed))


def _plain(values: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for line in overrides:
        if "=" not in line:
            raise ConfigError(f"{line!r} is not a setting: allowed is key=value.")
        with _one_sentence():
            parsed += OverridesParser.create().parse_overrides([line])
    return parsed


def _parse_settings(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides that set one known key to one value each."""
    parsed = _parse(overrides)
    for override in parsed:
        _check_key(override)
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} gives several values: add -m to sweep over them, or quote a "
                "list as key=[a,b]."
            )
    return parsed


def _groups() -> set[str]:
    return {path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"}


def _check_key(override: Override) -> None:
    """Refuse what is no setting before Hydra does, whose message is several lines long."""
    key = override.key_or_group
    if override.is_delete() or override.is_add() or override.package is not None:
        raise ConfigError(
            f"{override.input_line} adds, deletes or moves a setting: allowed is key=value."
        )
    if key in _groups():
        options = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
        if not override.is_sweep_override() and override.value() not in options:
            raise ConfigError(
                f"{override.input_line} is unknown: allowed are {', '.join(options)}."
            )
        return
    known = _setting_keys()
    if key not in known:
        raise ConfigError(unknown_key(key, known))


def _setting_keys() -> list[str]:
    keys = []
    for key, value in to_nested(RunConfig()).items():
        keys += [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
    return keys


def _refuse_differences(config: RunConfig, recorded: RunConfig) -> None:
    new, old = _free_removed(config), _free_removed(recorded)
    different = [f"{key}={new[key]!r} (was {old[key]!r})" for key in new if new[key] != old[key]]
    if different:
        raise ConfigError(
            f"The run in {config.run_dir} was started with other settings: {', '.join(different)}; "
            "give run_dir and resume=true alone to continue it, or another run_dir to start anew."
        )


def _free_removed(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in to_nested(config).items():
        parts = (
            {f"{key}.{name}": part for name, part in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        flat.update(parts)
    return {
        key: value
        for key, value in flat.items()
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE_ON_RESUME)
    }


class _one_sentence:  # noqa: N801 - reads as the statement it is
    """Turn what Hydra and OmegaConf raise into a ConfigError of one line."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, omegaconf.errors.MissingMandatoryValue):
            key = str(error.full_key or "").strip()
            raise ConfigError(f"{key} must be given: add {key}=... to the command.") from None
        if isinstance(error, HydraException | OmegaConfBaseException):
            text = " ".join((str(error) or str(error.__cause__)).split())
            text = text.partition(" See https:")[0]
            raise ConfigError(f"The configuration was refused: {text.rstrip('.')}.") from None
