"""Settings of the policy to align: its weights, context and prompt format."""

from typing import Literal

from pydantic import Field, field_validator

from rayrl.config.table import Place, Table

Dtype = Literal["auto", "float32", "bfloat16"]
RENDERING_NAMES = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding", "truncation"),
        *("max_length", "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
        *("return_tensors", "return_dict", "tokenizer_kwargs", "strftime_now"),
    )
)
"""Arguments of the rendering of a chat that are not the user's to set."""


class PolicyConfig(Table):
    """The policy to align, M0."""

    path: Place
    """A local folder or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; None is its main branch."""
    dtype: Dtype = "auto"
    """"auto" is bfloat16 on GPUs that have it, else float32: models made in bfloat16 overflow in float16."""
    prompt_format: Literal["auto", "plain", "chat"] = "auto"
    """"auto" is chat when the tokenizer has a chat template."""
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Variables that the chat template reads, such as `enable_thinking = false`."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Context in tokens; None is the model's own."""
    trust_remote_code: bool = False
    """Run model and tokenizer code that comes with the weights."""

    def resolved_dtype(self, *, on_gpu: bool, has_bfloat16: bool = True) -> Literal["float32", "bfloat16"]:
        """Return the dtype of engines and trainings.

        Args:
            on_gpu: whether they run on GPUs.
            has_bfloat16: whether all of these GPUs compute in bfloat16.
        """
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if on_gpu and has_bfloat16 else "float32"

    @field_validator("chat_template_kwargs")
    @classmethod
    def _names_are_free(cls, kwargs: dict[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
        taken = sorted(RENDERING_NAMES & kwargs.keys())
        if taken:
            raise ValueError(f"must name variables of the chat template's own, got {', '.join(taken)}; leave them out")
        return kwargs
