"""Rate limits keep to their share from the first request on."""

import asyncio

from rayrl.oracles.limits import RateLimit


def seconds_for(limit, amounts, corrections=()):
    async def run():
        start = asyncio.get_running_loop().time()
        for amount in amounts:
            await limit.acquire(amount)
        for correction in corrections:
            limit.correct(correction)
        await limit.acquire(0)
        return asyncio.get_running_loop().time() - start

    return asyncio.run(asyncio.wait_for(run(), timeout=60))


def test_units_are_spaced():
    assert seconds_for(RateLimit(6000), [1] * 20) >= 0.199  # 0.01 s each; the clock is allowed its resolution


def test_concurrent_callers_share_one_limit():
    limit = RateLimit(6000)

    async def run():
        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(limit.acquire() for _ in range(21)))
        return asyncio.get_running_loop().time() - start

    assert asyncio.run(run()) >= 0.199


def test_correction_adds_what_was_used_on_top():
    assert seconds_for(RateLimit(6000), [1], corrections=[19]) >= 0.199


def test_none_is_no_limit():
    limit = RateLimit(None)
    assert seconds_for(limit, [10**9] * 1000) < 60  # a limit of any kind would take for ever, and time out
