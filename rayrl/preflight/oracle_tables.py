"""Check of the tables that an oracle answers from: each is read whole, by the function that the run reads it with."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayrl.config import RunConfig
from rayrl.oracles.replay import key_of, read_answers
from rayrl.records import Prompt


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """One table of answers."""

    name: str
    """Its setting and path."""
    num_answers: int
    contradictions: Sequence[str]
    """Rows that give another score or preference than an earlier row about the same."""
    num_prompts: int
    """Prompts of the pool that were looked for."""
    num_found: int
    """Those of them that are in the table."""

    def warnings(self) -> list[str]:
        """Warn of answers that are not used, and of a table about other prompts."""
        found: list[str] = []
        if self.contradictions:
            found.append(
                f"{self.name}: {len(self.contradictions)} rows contradict an earlier row about the same, which counts "
                f"(the first: {self.contradictions[0]})"
            )
        if self.num_prompts and not self.num_found:
            found.append(
                f"{self.name}: none of the {self.num_prompts} prompts of the pool that were looked for is in the "
                "table, so that the oracle would abstain; name the table that was made of this pool, or write its "
                "prompts as the judge reads them"
            )
        return found


def inspect_oracle_tables(config: RunConfig, prompts: Sequence[Prompt]) -> list[TableFacts]:
    """Refuse tables that the oracle cannot answer from.

    Args:
        config: the run.
        prompts: of the pool, to look for; none are looked for if the oracle is asked about the seed data.

    Raises:
        DataError: a table is missing, empty or malformed, lacks a column, or a row holds no text or score.
    """
    asked = prompts if config.generate.source != "seed" else []
    facts: list[TableFacts] = []
    for table in config.oracle.tables():
        answers = read_answers(table)
        facts.append(
            TableFacts(
                name=f"{table.setting} {table.path}",
                num_answers=len(answers.by_question),
                contradictions=answers.contradictions,
                num_prompts=len(asked),
                num_found=sum(key_of(prompt.text) in answers.prompts for prompt in asked),
            )
        )
    return facts
