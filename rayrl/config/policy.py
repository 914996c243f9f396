"""Settings of the policy to align: its weights, context and prompt format."""

from typing import Literal

from pydantic import Field

from rayrl.config.table import Table

Dtype = Literal["auto", "float32", "bfloat16"]


class PolicyConfig(Table):
    """The policy to align, M0."""

    path: str
    """A local folder or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; None is its main branch."""
    dtype: Dtype = "auto"
    """"auto" is bfloat16 where the accelerator has it, else float32."""
    prompt_format: Literal["auto", "plain", "chat"] = "auto"
    """"auto" is chat when the tokenizer has a chat template."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Context in tokens; None is the model's own."""
    trust_remote_code: bool = False
    """Run model and tokenizer code that comes with the weights."""
