"""Sizes that an operator gives the roles of a run while it goes on: `rayrl scale RUN generators=4`."""

from dataclasses import dataclass

from rayrl.errors import ConfigError

ROLES = ("generators", "embedders", "evaluators", "entailment", "oracle")
"""Roles of fleets, and the oracle. "evaluators" stands for the role that serves the evaluator: generators if the
evaluator is generative, embedders if it is scalar."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bounds of a fleet's replicas, or of the questions that the oracle is asked at once; None is the config's."""

    least: int | None
    most: int | None


def parse_sizes(arguments: list[str]) -> dict[str, Size]:
    """Parse sizes by role from `ROLE=N`, `ROLE=MIN-MAX` or `ROLE=auto`.

    Raises:
        ConfigError: names what is wrong with an argument.
    """
    return dict(_parse(argument) for argument in arguments)


def _parse(argument: str) -> tuple[str, Size]:
    role, equals, text = argument.partition("=")
    if role not in ROLES or not equals:
        raise ConfigError(f"a size must be ROLE=N with a ROLE of {', '.join(ROLES)}, got {argument!r}")
    if text == "auto":
        return role, Size(least=None, most=None)
    least, dash, most = text.partition("-")
    if not dash:
        most = least
    are_positive = all(bound.isdecimal() and int(bound) > 0 for bound in (least, most))
    if not are_positive or int(least) > int(most):
        raise ConfigError(
            f"the size of {role} must be a number above 0 ({role}=4), a range ({role}=2-8), or auto for the "
            f"size that the config gives, got {text!r}"
        )
    if role == "oracle" and dash:
        raise ConfigError(
            f"the size of oracle must be one number (oracle=8), got {text!r}: it is the most questions asked at once, "
            "and fewer are asked when fewer wait"
        )
    return role, Size(least=int(least), most=int(most))
