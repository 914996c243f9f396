"""Generation replica: samples responses, writes judgements, and reads log-probabilities. A Ray actor's plain class.

Prompts and continuations are token ids. Rendering a conversation and reading a score out of a text are the callers'.
"""

import asyncio
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayrl.data.tokenizing import end_of_turn
from rayrl.engines.serving import LOADING
from rayrl.engines.vllm_engine import EngineSpec, ServedEngine
from rayrl.engines.weight_folder import TextReading
from rayrl.metrics import meters
from rayrl.records import Checkpoint

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

CONTEXT_TOKENS = 4
"""Tokens of the prompt that are decoded together with a continuation, for the space before its first word."""

NUM_CANDIDATES = 20
"""Likeliest tokens that `write` reports at each position."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the sampling of a continuation."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """One sampled continuation."""

    text: str
    token_ids: list[int]
    logprob: float
    """Sum of `token_logprobs`."""
    token_logprobs: list[float]
    """Log-probability of each token at temperature 1, nats."""
    finish_reason: str
    versions: list[str]
    """Versions of the weights that wrote it: one, or those of its first and of its last token."""
    candidates: list[dict[int, float]]
    """Log-probabilities of the likeliest tokens at each position; empty unless `write` asked for them."""


class Generator(ServedEngine):
    """One vLLM generation engine."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        self._tokenizer = self.engine.get_tokenizer()
        # vLLM's type of a tokenizer is wider than the transformers tokenizers that policies have.
        self._end_of_turn = end_of_turn(self._tokenizer, spec.prompt_format)  # type: ignore[arg-type]

    async def generate(
        self, checkpoint: Checkpoint, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> list[list[Continuation]]:
        """Sample one continuation per prompt and seed; it depends on nothing else in the batch."""
        async with self.serving(checkpoint):
            return await self._sample_all(prompts, seeds, sampling, num_candidates=0)

    async def write(
        self, checkpoint: Checkpoint, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> list[list[Continuation]]:
        """Sample like `generate`, with the likeliest tokens at each position, to read a score inside the text."""
        async with self.serving(checkpoint):
            return await self._sample_all(prompts, seeds, sampling, num_candidates=NUM_CANDIDATES)

    async def next_token_logprobs(
        self, checkpoint: Checkpoint, prompts: list[list[int]], token_ids: list[int]
    ) -> list[list[float]]:
        """Read log p(token | prompt) of the given tokens, (num_prompts, num_tokens): one prefill per prompt."""
        async with self.serving(checkpoint):
            return await asyncio.gather(*(self._next_token(prompt, token_ids) for prompt in prompts))

    async def logprobs(
        self, checkpoint: Checkpoint, prompts: list[list[int]], continuations: list[list[int]]
    ) -> list[float]:
        """Read log p(continuation | prompt) at temperature 1, nats: one prefill each, no sampling."""
        pairs = zip(prompts, continuations, strict=True)
        async with self.serving(checkpoint):
            return await asyncio.gather(*(self._continuation(prompt, continuation) for prompt, continuation in pairs))

    async def _read_text(self, text: TextReading, checkpoint: Checkpoint) -> float | None:
        from vllm import SamplingParams

        tokens = text["token_ids"][: self.engine.model_config.max_model_len - 1]
        if "logprobs" not in text or len(tokens) < 2:
            return None
        output = await self._finish(
            tokens, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        )
        assert output.prompt_logprobs is not None
        differences: list[float] = []
        for position, token, expected in zip(output.prompt_logprobs[1:], tokens[1:], text["logprobs"], strict=False):
            assert position is not None  # only the first position of a prompt has none
            differences.append(abs(position[token].logprob - expected))
        return sum(differences) / len(differences)

    async def _sample_all(
        self, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling, *, num_candidates: int
    ) -> list[list[Continuation]]:
        # All requests start at once: vLLM batches them, and the order of the answers is that of the requests.
        rows = []
        for prompt, prompt_seeds in zip(prompts, seeds, strict=True):
            samples = [self._sample(prompt, seed, sampling, num_candidates) for seed in prompt_seeds]
            rows.append(asyncio.gather(*samples))
        return await asyncio.gather(*rows)

    async def _sample(self, prompt: list[int], seed: int, sampling: Sampling, num_candidates: int) -> Continuation:
        from vllm import SamplingParams

        first_version = self.version
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            # Besides the ends of sequence that the model's generation_config.json lists.
            stop_token_ids=[self._end_of_turn],
            seed=seed,
            logprobs=num_candidates,
            # vLLM decodes token by token, which is slow and only needed to find a stop string.
            detokenize=bool(sampling.stop),
        )
        output = await self._finish(prompt, params)
        (sampled,) = output.outputs
        assert sampled.logprobs is not None and sampled.finish_reason is not None
        token_ids = list(sampled.token_ids)
        assert len(sampled.logprobs) == len(token_ids)
        logprobs = [sampled.logprobs[number][token].logprob for number, token in enumerate(token_ids)]
        candidates: list[dict[int, float]] = []
        if num_candidates:
            for position in sampled.logprobs:
                candidates.append({token: candidate.logprob for token, candidate in position.items()})
        # During a swap the version has a prefix, and the last token was still written by the weights being loaded.
        last_version = self.version.removeprefix(LOADING)
        return Continuation(
            text=sampled.text if sampling.stop else self._text(prompt, token_ids),
            token_ids=token_ids,
            logprob=sum(logprobs),
            token_logprobs=logprobs,
            finish_reason=sampled.finish_reason,
            versions=list(dict.fromkeys([first_version, last_version])),
            candidates=candidates,
        )

    def _text(self, prompt: list[int], token_ids: list[int]) -> str:
        """Decode a continuation behind the prompt's last tokens: decoded alone, it would lose a leading space."""
        tail = prompt[-CONTEXT_TOKENS:]
        context = self._tokenizer.decode(tail, skip_special_tokens=True)
        both = self._tokenizer.decode(tail + token_ids, skip_special_tokens=True)
        return both[len(context) :]

    async def _next_token(self, prompt: list[int], token_ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        output = await self._finish(
            prompt, SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=token_ids, detokenize=False)
        )
        (sampled,) = output.outputs
        assert sampled.logprobs is not None
        position = sampled.logprobs[0]
        return [position[token].logprob for token in token_ids]

    async def _continuation(self, prompt: list[int], continuation: list[int]) -> float:
        from vllm import SamplingParams

        if not continuation:
            return 0.0
        # The last token is read as a next token, not as part of the prompt: vLLM always samples one token, and behind
        # a prompt that fills the context there is no room for it.
        *tokens, last = prompt + continuation
        output = await self._finish(
            tokens,
            SamplingParams(
                temperature=0.0, max_tokens=1, prompt_logprobs=0, logprob_token_ids=[last], detokenize=False
            ),
        )
        (sampled,) = output.outputs
        assert sampled.logprobs is not None and output.prompt_logprobs is not None
        total = 0.0
        for position, token in zip(output.prompt_logprobs[len(prompt) :], continuation, strict=False):
            assert position is not None  # only the first position of a prompt has none
            total += position[token].logprob
        return total + sampled.logprobs[0][last].logprob

    async def _finish(self, token_ids: list[int], params: "SamplingParams") -> "RequestOutput":
        """Run one request to its end."""
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY
        stream = self.engine.generate({"prompt_token_ids": token_ids}, params, request_id=uuid.uuid4().hex)
        (output,) = [item async for item in stream]
        meters.TOKENS.add(len(token_ids), **self.labels, kind="prompt")
        meters.TOKENS.add(len(output.outputs[0].token_ids), **self.labels, kind="generated")
        return output
