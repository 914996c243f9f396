"""Judge prompt of the generative evaluator, as the policy's tokenizer reads it."""

from rayrl.config import PolicyConfig
from rayrl.data.tokenizing import ChatTemplate, renderer_of, resolve_format
from rayrl.models.judge_prompt import Rubric, Scoring, evaluator_prompt


def render_judge_prompt(
    tokenizer: ChatTemplate, policy: PolicyConfig, rubric: Rubric, prompt: str, response: str, scoring: Scoring
) -> str:
    """Render the prompt of one judgement, for `encode_prompt`; in a chat, the cue to write opens the assistant's turn.

    Args:
        tokenizer: has the chat template.
        policy: its format, and variables of the template.
        rubric: the judge prompt and its scale.
        prompt: the whole conversation, `Prompt.text`.
        response: the text to judge.
        scoring: where the evaluator writes the score.
    """
    text = evaluator_prompt(rubric, prompt, response, scoring)
    if resolve_format(tokenizer, policy.prompt_format) == "plain":
        return text
    # The cue is the beginning of the answer, which the chat template must not close.
    question, _, cue = text.rpartition("\n")
    return renderer_of(tokenizer, policy)(question) + cue
