"""Type of a setting that names a Python function of the user's."""

import re
from typing import Annotated

from pydantic import AfterValidator


def _named(name: str) -> str:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        guess = re.sub(r"[./]py$|\.py(?=[:.])", "", name).replace("/", ".").replace(":", ".").strip(".")
        module, _, function = guess.rpartition(".")
        is_guess = re.fullmatch(r"\w+(\.\w+)*", module) and function
        remedy = f'write "{module}:{function}"' if is_guess else 'write it as "judges:helpful", for judges.py here'
        raise ValueError(f'must be "module:function", with dots between packages, got "{name}"; {remedy}')
    return name


FunctionName = Annotated[str, AfterValidator(_named)]
""""module:function", importable from the working directory."""
