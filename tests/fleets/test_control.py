"""The control as a plain class; what it is shown remembers how it was resized."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError

from rayrl.errors import StageTimeout
from rayrl.fleets import control as controls
from rayrl.fleets.control import Control
from rayrl.fleets.sizes import Size


class Call:
    """What Ray makes of a method."""

    def __init__(self, method):
        self.remote = method


class Shown:
    """A router or an oracle pool."""

    def __init__(self, name, error=None):
        self.name, self.error, self.sizes = name, error, []
        self.resize, self.state = Call(self._resize), Call(self._state)

    async def _resize(self, least, most):
        self.sizes.append((least, most))
        return await self._state()

    async def _state(self):
        if self.error is not None:
            raise self.error
        return {"name": self.name, "sizes": list(self.sizes)}


def size(least, most=None):
    return Size(least=least, most=least if most is None else most)


def test_a_role_is_resized_wherever_it_is_up():
    control, mean, last, generators = Control("generators"), Shown("mean"), Shown("last"), Shown("generators")

    async def scenario():
        await control.show("embedders", "mean", mean)
        await control.show("embedders", "last", last)
        await control.show("generators", "generators", generators)
        resized = await control.scale({"embedders": size(1, 4)})
        assert [state["name"] for state in resized] == ["mean", "last"]
        await control.scale({"evaluators": size(3)})
        assert [state["name"] for state in await control.states()] == ["mean", "last", "generators"]

    asyncio.run(scenario())
    assert (mean.sizes, last.sizes, generators.sizes) == ([(1, 4)], [(1, 4)], [(3, 3)])


def test_a_size_waits_for_its_role_to_come_up_and_for_it_to_come_again():
    control, first, again = Control("embedders"), Shown("embedders"), Shown("embedders")

    async def scenario():
        assert await control.scale({"evaluators": size(2)}) == []
        await control.show("embedders", "embedders", first)
        await control.show("embedders", "embedders", again)
        await control.scale({"embedders": Size(least=None, most=None)})

    asyncio.run(scenario())
    assert (first.sizes, again.sizes) == ([(2, 2)], [(2, 2), (None, None)])


def test_what_was_released_is_left_out_and_other_errors_are_not():
    control = Control("generators")

    async def scenario():
        await control.show("embedders", "gone", Shown("gone", ActorDiedError()))
        await control.show("generators", "generators", Shown("generators"))
        assert [state["name"] for state in await control.states()] == ["generators"]
        await control.show("oracle", "oracle", Shown("oracle", RuntimeError("unknown")))
        with pytest.raises(RuntimeError, match="unknown"):
            await control.states()

    asyncio.run(scenario())


def test_the_driver_hears_of_a_stop_and_who_asked_for_it_hears_nothing():
    async def scenario():
        control = Control("generators")
        driver = asyncio.create_task(control.follow({}, {}))
        await asyncio.sleep(0)
        assert not driver.done()
        operator = asyncio.create_task(control.stop())
        assert await asyncio.wait_for(driver, 5) is None
        assert await asyncio.wait_for(control.follow({}, {}), 5) is None
        assert not operator.done()
        operator.cancel()

    asyncio.run(scenario())


def test_a_control_that_was_started_again_has_what_the_driver_tells_it(monkeypatch):
    monkeypatch.setattr(controls, "FOLLOW_S", 0.01)
    generators, embedders, again = Shown("generators"), Shown("embedders"), Shown("embedders")

    async def scenario():
        shown = {"generators": ("generators", generators), "embedders": ("embedders", embedders)}
        control = Control("embedders")
        await control.show("embedders", "embedders", embedders)
        await control.scale({"evaluators": size(3)})
        sizes = await control.follow(shown, {})
        assert sizes == {"embedders": size(3)}
        control = Control("embedders")
        assert await control.follow(shown, sizes) == sizes
        assert [state["name"] for state in await control.states()] == ["generators", "embedders"]
        await control.show("embedders", "embedders", again)
        await control.scale({"embedders": size(5)})
        assert await control.follow(shown, sizes) == {"embedders": size(5)}, "the operator's last word"

    asyncio.run(scenario())
    assert generators.sizes == [] and again.sizes == [(3, 3), (5, 5)]
    assert embedders.sizes[-1] == (5, 5) and (3, 3) in embedders.sizes, "told again: a router may have lost it"


def test_a_router_that_says_nothing_is_named_and_keeps_no_driver_waiting(monkeypatch):
    monkeypatch.setattr(controls, "FOLLOW_S", 0.01)
    monkeypatch.setattr(controls, "_ROUTER_TIMEOUT_S", 0.05)

    class Hung(Shown):
        async def _state(self):
            await asyncio.sleep(60)

    async def scenario():
        control = Control("generators")
        hung = {"fleet": ("generators", Hung("fleet"))}
        assert await asyncio.wait_for(control.follow(hung, {"generators": size(2)}), 5) == {"generators": size(2)}
        with pytest.raises(StageTimeout, match="fleet has not answered"):
            await asyncio.wait_for(control.states(), 5)

    asyncio.run(scenario())
