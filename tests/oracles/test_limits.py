"""Rate limits keep to their share from the first request on; slots let in so many at once."""

import asyncio

from rayrl.oracles.limits import RateLimit, Slots


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


def test_slots_let_so_many_in_and_may_change():
    async def run():
        slots, inside, most = Slots(2), 0, []

        async def ask():
            nonlocal inside
            async with slots:
                inside += 1
                most.append(inside)
                await asyncio.sleep(0.01)
                inside -= 1

        asked = [asyncio.create_task(ask()) for _ in range(4)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (slots.num_used, slots.num_waiting) == (2, 2)
        await asyncio.gather(*asked)
        assert max(most) == 2
        slots.resize(8)
        await asyncio.gather(*(ask() for _ in range(20)))
        assert max(most) == 8
        most.clear()
        slots.resize(1)
        await asyncio.gather(*(ask() for _ in range(5)))
        assert max(most) == 1 and (slots.num_used, slots.num_waiting) == (0, 0)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_more_slots_admit_waiting_callers_and_fewer_interrupt_none():
    async def run():
        slots, done = Slots(1), asyncio.Event()

        async def ask():
            async with slots:
                await done.wait()

        asked = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0)
        slots.resize(3)
        assert slots.num_used == 3
        slots.resize(1)
        assert slots.num_used == 3
        done.set()
        await asyncio.gather(*asked)
        assert slots.num_used == 0

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_slot_is_not_lost_with_who_waited_for_it():
    async def run():
        slots = Slots(1)
        await slots.__aenter__()
        gone, given = asyncio.create_task(slots.__aenter__()), asyncio.create_task(slots.__aenter__())
        await asyncio.sleep(0)
        gone.cancel()  # while it waits
        await asyncio.sleep(0)
        await slots.__aexit__()
        given.cancel()  # when it has just been let in
        await asyncio.gather(gone, given, return_exceptions=True)
        assert (slots.num_used, slots.num_waiting) == (0, 0)
        await slots.__aenter__()

    asyncio.run(asyncio.wait_for(run(), 10))
