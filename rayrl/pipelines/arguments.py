"""Arguments of a command that plans or runs a config: one TOML file, overrides and flags, in any order."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayrl.errors import ConfigError

FLAGS = {
    "--plan": "show the stages, what they need and what they cost; start nothing",
    "--wait": "where people are asked: wait for their answers, instead of ending with exit code 75",
    "--json": "with --plan: the resolved config and the plan as JSON",
    "--version": "show the version",
    "--help": "show this",
}
"""Flags, with what they do."""
_OTHER_NAMES = {"--dry-run": "--plan", "--dryrun": "--plan", "--check": "--plan", "-n": "--plan"}
"""Flags that other programs have for the same."""
USAGE = """usage: {command} CONFIG.toml [section.key=value ...] [--plan] [--json] [--wait]

CONFIG.toml        the run's settings; paths in it start at the working directory
section.key=value  another value of one setting, as TOML; a bare word is text: select.budget=64 dpo.loss=ipo
{flags}"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a command line asks for."""

    config: str = ""
    """The TOML file; empty where only help or the version is asked for."""
    overrides: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    """Names in `FLAGS`."""


def usage(command: str) -> str:
    """Describe the arguments of a command."""
    return USAGE.format(command=command, flags="\n".join(f"{flag:<19}{what}" for flag, what in FLAGS.items()))


def read_arguments(arguments: Sequence[str]) -> Arguments:
    """Sort a command line's arguments.

    Raises:
        ConfigError: an unknown flag, no config, or more than one.
    """
    flags = {_flag(argument) for argument in arguments if argument.startswith("-")}
    others = [argument for argument in arguments if not argument.startswith("-")]
    if "--help" in flags or "--version" in flags or not arguments:
        return Arguments(flags=frozenset(flags or {"--help"}))
    if "--json" in flags and "--plan" not in flags:
        raise ConfigError("--json shows a plan as JSON, and there is no --plan; add it, or leave --json out")
    # A path may hold an equals sign: what is a file is no override.
    files = [argument for argument in others if "=" not in argument or Path(argument).is_file()]
    overrides = [argument for argument in others if argument not in files]
    if "=" in others and "=" not in files:
        raise ConfigError(
            "an override must be one argument, got spaces around =; write section.key=value, or quote it: "
            "'section.key = value'"
        )
    if not files:
        got = f"got only {' '.join(others)}" if others else "got none"
        raise ConfigError(f"a TOML file must be named, {got}; jobs/configs/ holds examples")
    config, *more = files
    if more:
        raise ConfigError(_explain_more(config, more))
    return Arguments(config=config, overrides=tuple(overrides), flags=frozenset(flags))


def _flag(argument: str) -> str:
    """Return the flag of an argument.

    Raises:
        ConfigError: there is no such flag; the message names the nearest.
    """
    if argument in FLAGS:
        return argument
    if argument == "-h":
        return "--help"
    near = difflib.get_close_matches(argument, FLAGS, n=1)
    meant = _OTHER_NAMES.get(argument) or (near[0] if near else "")
    remedy = f"did you mean {meant}?" if meant else f"the flags are {', '.join(FLAGS)}"
    raise ConfigError(f"there is no flag {argument}; {remedy}")


def _explain_more(config: str, more: list[str]) -> str:
    """Say what is wrong with arguments that are neither an override nor the one config."""
    second = more[0]
    if second.endswith(".toml") or Path(second).exists():
        return (
            f"one config is run at a time, got {config} and {second}; run them one after the other, or write what "
            "differs as section.key=value"
        )
    return (
        f"override {second} must look like section.key=value, in one argument; quote it if it has spaces: "
        "'select.budget = 64'"
    )
