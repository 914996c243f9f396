"""Generation replica: samples responses, writes judgements, and reads log-probabilities. A Ray actor's plain class."""

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

from rayrl.engines.serving import LOADING
from rayrl.engines.vllm_engine import EngineSpec, ServedEngine
from rayrl.metrics import meters
from rayrl.records import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a continuation is sampled."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """One sampled continuation."""

    text: str
    token_ids: list[int]
    logprob: float
    """Summed at temperature 1, nats."""
    token_logprobs: list[float]
    """Its terms, one per token."""
    finish_reason: str
    versions: list[str]
    """Of the weights that wrote it: one, or those of its first and of its last token."""
    candidates: list[dict[int, float]]
    """Per token, log-probabilities of the likeliest tokens; empty unless asked for."""


CONTEXT_TOKENS = 4


class Generator(ServedEngine):
    """One vLLM generation engine."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        self._tokenizer = self.engine.get_tokenizer()

    async def generate(
        self, checkpoint: Checkpoint, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> list[list[Continuation]]:
        """One continuation per prompt and seed; a seed's answer depends on nothing else in the batch."""
        async with self.serving(checkpoint):
            return await self._samples(prompts, seeds, sampling, num_candidates=0)

    async def write(
        self, checkpoint: Checkpoint, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> list[list[Continuation]]:
        """Like `generate`, with the 20 likeliest tokens at each position, to read a score inside the text."""
        async with self.serving(checkpoint):
            return await self._samples(prompts, seeds, sampling, num_candidates=20)

    async def next_token_logprobs(
        self, checkpoint: Checkpoint, prompts: list[list[int]], token_ids: list[int]
    ) -> list[list[float]]:
        """Read log p(token | prompt) of the given tokens, (num_prompts, num_tokens): one prefill each."""
        async with self.serving(checkpoint):
            return await asyncio.gather(*(self._next_token(prompt, token_ids) for prompt in prompts))

    async def logprobs(
        self, checkpoint: Checkpoint, prompts: list[list[int]], continuations: list[list[int]]
    ) -> list[float]:
        """Summed log p(continuation | prompt) at temperature 1, nats: one prefill each, no sampling."""
        async with self.serving(checkpoint):
            return await asyncio.gather(
                *(self._continuation(p, c) for p, c in zip(prompts, continuations, strict=True))
            )

    async def probe(self, expected: dict[str, Any], checkpoint: Checkpoint) -> float:
        answer = await self._next_token(expected["prompt_token_ids"], expected["token_ids"])
        return max(abs(a - b) for a, b in zip(answer, expected["logprobs"], strict=True))

    async def _samples(
        self, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling, *, num_candidates: int
    ) -> list[list[Continuation]]:
        return await asyncio.gather(
            *(
                asyncio.gather(*(self._sample(prompt, seed, sampling, num_candidates) for seed in prompt_seeds))
                for prompt, prompt_seeds in zip(prompts, seeds, strict=True)
            )
        )

    async def _sample(self, prompt: list[int], seed: int, sampling: Sampling, num_candidates: int) -> Continuation:
        from vllm import SamplingParams

        version = self.version
        output = await self._finish(
            prompt,
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                stop=list(sampling.stop),
                seed=seed,
                logprobs=num_candidates,
                detokenize=bool(sampling.stop),  # token by token, and only to look for a stop string
            ),
        )
        (sampled,) = output.outputs
        token_ids = list(sampled.token_ids)
        logprobs = [position[token].logprob for position, token in zip(sampled.logprobs, token_ids, strict=True)]
        return Continuation(
            text=sampled.text if sampling.stop else self._text(prompt, token_ids),
            token_ids=token_ids,
            logprob=sum(logprobs),
            token_logprobs=logprobs,
            finish_reason=sampled.finish_reason,
            versions=list(dict.fromkeys([version, self.version.removeprefix(LOADING)])),
            candidates=[{t: c.logprob for t, c in p.items()} for p in sampled.logprobs] if num_candidates else [],
        )

    def _text(self, prompt: list[int], token_ids: list[int]) -> str:
        """What the tokens say after the prompt's last ones: a tokenizer drops the space before a first word."""
        tail = prompt[-CONTEXT_TOKENS:]
        said, both = self._tokenizer.batch_decode([tail, tail + token_ids], skip_special_tokens=True)
        return both[len(said) :]

    async def _next_token(self, prompt: list[int], token_ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        output = await self._finish(
            prompt, SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=token_ids, detokenize=False)
        )
        position = output.outputs[0].logprobs[0]
        return [position[token].logprob for token in token_ids]

    async def _continuation(self, prompt: list[int], continuation: list[int]) -> float:
        """The last token is read as a next token: a prompt that fills the context leaves vLLM no room for one."""
        from vllm import SamplingParams

        if not continuation:
            return 0.0
        *tokens, last = prompt + continuation
        output = await self._finish(
            tokens,
            SamplingParams(
                temperature=0.0, max_tokens=1, prompt_logprobs=0, logprob_token_ids=[last], detokenize=False
            ),
        )
        inner = zip(output.prompt_logprobs[len(prompt) :], continuation, strict=False)
        return sum(position[token].logprob for position, token in inner) + output.outputs[0].logprobs[0][last].logprob

    async def _finish(self, token_ids: list[int], params: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY
        request = {"prompt_token_ids": token_ids}
        (output,) = [o async for o in self.engine.generate(request, params, request_id=uuid.uuid4().hex)]
        meters.TOKENS.add(len(token_ids), **self.labels, kind="prompt")
        meters.TOKENS.add(len(output.outputs[0].token_ids), **self.labels, kind="generated")
        return output
