"""How every job starts: `--config FILE.yaml`, typed dotted overrides, one clear line for a user's mistake.

    jobs/x.py --config FILE.yaml --actors.max_size 4
        |  defaults (config/)  <-  FILE.yaml  <-  command line
        v
    one validated config tree, printed as YAML  ->  main(config)

Exit status: 0 done, 1 the run failed, 2 the user has something to mend, 130 interrupted (Ctrl-C or SIGTERM).
Environment variables are never read as configuration.
"""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TextIO, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from tqdm import tqdm

from introspect_ray.config import Config, resolved
from introspect_ray.config_file import bare, hint, problems, read_yaml, yaml_value
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.interruption import sigterm_interrupts

C = TypeVar("C", bound=Config)
SUBMITTED_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the entry point of a submitted job."""
LINES_EVERY_S = 10.0
"""Seconds between lines of progress where no terminal shows a bar."""


def run_job(
    config_class: type[C],
    main: Callable[[C], None],
    description: str,
    arguments: Sequence[str] | None = None,
    positional: str | None = None,
    switches: Mapping[str, str] = MappingProxyType({}),
) -> NoReturn:
    """Parse the command line, print the resolved config, call `main(config)`; always ends in `SystemExit`.

    `arguments` stands in for `sys.argv[1:]`. `positional` names the key whose value may stand without its option, and
    `switches` options without a value that make a key true: {"plan": "plan.show"}.
    """
    words = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(config_class, main, description, words, positional, switches))


def _run(
    config_class: type[C],
    main: Callable[[C], None],
    description: str,
    arguments: Sequence[str],
    positional: str | None,
    switches: Mapping[str, str],
) -> int:
    try:
        with sigterm_interrupts():
            config = parse(config_class, description, arguments, positional, switches)
            sys.stdout.write(as_yaml(config))
            sys.stdout.flush()
            _check_output_stays(config)
            main(config)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except RunFailed as error:
        sys.stderr.write(f"failed: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"failed: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues\n")
        return 130
    return 0


def _check_output_stays(config: Config) -> None:
    """Refuse to write under the working directory of a submitted job: a copy, on one node, that Ray deletes."""
    output = getattr(config, "output", None)
    if SUBMITTED_VARIABLE not in os.environ or not isinstance(output, str) or "://" in output:
        return
    if not Path(output).expanduser().is_absolute():
        raise UserError(
            f"output is {output!r}, which a submitted job would write into a temporary copy of its working directory:"
            " expected a URL such as s3://BUCKET/NAME, or the absolute path of a folder that all nodes share"
        )


class _Lines:
    """A stream for a bar where there is no terminal: every state is a line, so that logs can be read as they grow."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        state = text.strip()
        if state:
            self._stream.write(f"{state}\n")

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr with rate and time left, fed by `show(done, total, note)`; it appears with the first call.

    Where stderr is no terminal it is a line every `LINES_EVERY_S` seconds and one at the end. What is done at the
    first call, by an earlier run, does not count towards the rate.
    """
    bar: tqdm[None] | None = None

    def show(done: int, total: int, note: str) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc=label, total=total, initial=done, unit=unit, **_style(sys.stderr))
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _style(stream: TextIO) -> dict[str, Any]:
    if stream.isatty():
        return {"file": stream, "mininterval": 0.1, "dynamic_ncols": True}
    text = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    # In one place: bars that are open side by side would move the cursor.
    return {"file": _Lines(stream), "mininterval": LINES_EVERY_S, "miniters": 1, "bar_format": text, "position": 0}


def as_yaml(config: Config) -> str:
    """The whole resolved tree as YAML, one line per innermost section."""
    return yaml.dump(
        resolved(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=1000
    )


class _Dumper(yaml.SafeDumper):
    """Writes text with line breaks as one quoted line."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


def parse(
    config_class: type[C],
    description: str,
    arguments: Sequence[str],
    positional: str | None = None,
    switches: Mapping[str, str] = MappingProxyType({}),
) -> C:
    """The config that a command line describes. Raises UserError; `--help` prints and exits with status 0."""
    flags = {flag.name: flag for flag in _flags(config_class, defaults=config_class())}
    found = vars(_parser(config_class, description, flags, positional, switches).parse_args(list(arguments)))
    config_file = found.pop("config")
    tree = read_yaml(config_file) if config_file is not None else {}
    overrides = {name: flags[name].read(words) for name, words in found.items() if words is not None}
    for name, value in overrides.items():
        _set(tree, name.split("."), value)
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        raise UserError(problems(error, config_class, config_file, set(overrides))) from None


@dataclass(frozen=True)
class _Flag:
    """One leaf of a config tree as a command-line option."""

    name: str
    field: FieldInfo
    default: Any

    @property
    def annotation(self) -> Any:
        """The field's type without `Optional` and `Annotated`."""
        return bare(self.field.annotation)

    @property
    def is_sequence(self) -> bool:
        return typing.get_origin(self.annotation) in (tuple, list)

    @property
    def is_optional(self) -> bool:
        return type(None) in typing.get_args(self.field.annotation)

    @property
    def choices(self) -> str:
        """What may be written, for people."""
        annotation = bare(typing.get_args(self.annotation)[0]) if self.is_sequence else self.annotation
        if typing.get_origin(annotation) is typing.Literal:
            kind = "|".join(map(str, typing.get_args(annotation)))
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            kind = "'{" + ", ".join(f"{name}: ..." for name in annotation.model_fields) + "}'"
        else:
            kind = getattr(annotation, "__name__", str(annotation))
        return kind + ("|none" if self.is_optional else "")

    def read(self, words: str | list[str]) -> Any:
        """The value that was typed; pydantic checks it afterwards."""
        if not isinstance(words, list):
            return self._scalar(words, self.annotation)
        element = bare(typing.get_args(self.annotation)[0])
        if len(words) == 1 and words[0].lstrip().startswith("["):
            return yaml_value(words[0], self.name)
        return [self._scalar(word, element) for word in words]

    def _scalar(self, word: str, annotation: Any) -> Any:
        if self.is_optional and word.lower() in ("none", "null"):
            return None
        if annotation is str or typing.get_origin(annotation) is typing.Literal:
            return word
        return yaml_value(word, self.name)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _flags(model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[_Flag]:
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        if _is_section(field.annotation):
            yield from _flags(typing.cast(type[BaseModel], field.annotation), f"{prefix}{name}.", default)
        else:
            yield _Flag(prefix + name, field, default)


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage."""

    names: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every option")

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            key = unknown[0].split("=")[0]
            sections = [name for name in self.names if name.startswith(f"{key[2:]}.")]
            if sections:
                raise UserError(f"config key {key[2:]!r} is a section; set one of {', '.join(sections)}")
            if not key.startswith("--"):
                raise UserError(f"argument {key!r} was not expected; options are written --section.field value")
            raise UserError(f"config key {key[2:]!r} is not known{hint(key[2:], self.names)}")
        return found


def _parser(
    config_class: type[Config],
    description: str,
    flags: Mapping[str, _Flag],
    positional: str | None,
    switches: Mapping[str, str],
) -> _Parser:
    alone = f"[{positional.upper()}] " if positional else ""
    parser = _Parser(
        usage=f"%(prog)s {alone}[--config FILE.yaml] [--section.field VALUE ...]",
        description=description,
        epilog="Later wins: defaults, then FILE.yaml, then the command line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.names = tuple(flags)
    if positional:
        # Suppressed, because an absent positional would otherwise put its default over the option's value.
        parser.add_argument(
            positional,
            nargs="?",
            default=argparse.SUPPRESS,
            metavar=positional.upper(),
            help=f"the same as --{positional}",
        )
    for switch, name in switches.items():
        parser.add_argument(
            f"--{switch}", dest=name, action="store_const", const="true", help=f"the same as --{name} true"
        )
    parser.add_argument("--config", metavar="FILE.yaml", help="read the config from a YAML file")
    for section, members in _by_section(flags).items():
        group = parser.add_argument_group(section or "top level", _section_text(config_class, section))
        for flag in members:
            group.add_argument(
                f"--{flag.name}",
                dest=flag.name,
                default=None,
                nargs="+" if flag.is_sequence else None,
                metavar=flag.choices,
                help=_help(flag),
            )
    return parser


def _by_section(flags: Mapping[str, _Flag]) -> dict[str, list[_Flag]]:
    sections: dict[str, list[_Flag]] = {}
    for flag in flags.values():
        sections.setdefault(flag.name.rpartition(".")[0], []).append(flag)
    return sections


def _section_text(config_class: type[BaseModel], section: str) -> str:
    model = config_class
    for name in filter(None, section.split(".")):
        model = typing.cast(type[BaseModel], model.model_fields[name].annotation)
    return " ".join((model.__doc__ or "").split())


def _help(flag: _Flag) -> str:
    default = flag.default
    if isinstance(default, tuple):
        default = " ".join(
            yaml.safe_dump(item.model_dump(), default_flow_style=True).strip()
            if isinstance(item, BaseModel)
            else f"{item}"
            for item in default
        )
    text = " ".join((flag.field.description or "").split())
    shown = "none" if default is None else repr(default) if isinstance(default, str) else default
    return f"{text} [default: {shown}]".strip().replace("%", "%%")


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Overwrite one leaf; a section that the file gives as something else than a mapping is replaced."""
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value
