"""Settings of a run as YAML, in and out. A misspelt key is an error."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

from ckf.config import RunConfig

MAX_VALUES = 10_000


def own_configs() -> dict[str, Path]:
    """The runs to start from that ckf brings, by name: in a wheel inside the package, in a
    checkout beside it."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        found = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
        if "demo" in found:
            return found
    return {}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, or one of :func:`own_configs` by its name, and apply ``key.sub=value``
    overrides.

    Raises:
        ValueError: no such file, broken YAML, an unknown key (with the nearest known one), a value
            of the wrong kind.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        file = own_configs().get(str(path), file)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        hint = "" if file.exists() else f"; ckf brings {', '.join(own_configs())}: name one"
        raise ValueError(f"cannot read the config {path}: {error}{hint}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    _check_size(path, values)
    if not isinstance(values, dict):
        names = ", ".join(own_configs())
        raise ValueError(f"{path} holds no settings; start from one of ckf's: {names}")
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override!r} has no '='; write for example train.steps=20")
        try:
            _assign(values, key.split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ValueError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    return config_from_dict(values)


def _check_size(path: str | Path, values: Any) -> None:
    """ValueError above MAX_VALUES: YAML's aliases can make one kilobyte stand for gigabytes."""
    left, count = [values], 0
    while left:
        value, count = left.pop(), count + 1
        if count > MAX_VALUES:
            raise ValueError(
                f"{path} stands for more than {MAX_VALUES} settings; expected some dozens: write "
                "them out, without anchors and aliases"
            )
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value


def config_from_dict(values: dict) -> RunConfig:
    """A checked RunConfig from nested mappings."""
    return _build(RunConfig, values, "")


def config_to_dict(config: RunConfig) -> dict:
    """The resolved settings as nested plain values, for YAML."""
    return dataclasses.asdict(config)


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML."""
    import yaml

    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")


def _assign(values: dict, keys: list[str], value: object) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:  # also "lora:" with nothing behind it
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ValueError(f"--set {'.'.join(keys)}: {key} is a value, not a group of settings")
    values[keys[-1]] = value


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``: a dataclass, dict[str, dataclass], or a plain type, checked."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, value, where)
    if origin is dict and isinstance(value, dict):
        return {k: _build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], v, where) for v in value]
    expected = origin or kind
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    wrong_bool = isinstance(value, bool) and expected is int
    if expected is Any or (isinstance(value, expected) and not wrong_bool):
        return value
    raise ValueError(f"{where} is {value!r}; expected {getattr(expected, '__name__', expected)}")


def _build_union(kinds: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    for kind in (k for k in kinds if k is not type(None)):
        try:
            return _build(kind, value, where)
        except ValueError:
            continue
    names = " or ".join(str(getattr(k, "__name__", k)) for k in kinds)
    raise ValueError(f"{where} is {value!r}; expected {names}")


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; expected a group of settings")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            full = f"{where}.{key}".lstrip(".")
            near = difflib.get_close_matches(str(key), list(fields), 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown setting {full}; {hint}Known: {', '.join(fields)}")
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise ValueError(f"the setting {f'{where}.{name}'.lstrip('.')} is missing")
    built = {k: _build(hints[k], v, f"{where}.{k}".lstrip(".")) for k, v in value.items()}
    return kind(**built)
