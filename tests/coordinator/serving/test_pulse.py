"""A beat comes when it was asked for, once, and when it asked for itself."""

from __future__ import annotations

import asyncio

from thinwire.coordinator.serving.pulse import Pulse


def test_it_comes_once_however_often_it_is_asked_for_and_not_when_it_rests_or_has_ended() -> None:
    async def body() -> None:
        beats: list[float | None] = [None, None, 0.0, None, 3600.0]

        def beat() -> float | None:
            return beats.pop(0)

        pulse = Pulse(beat)
        pulse.now()
        assert len(beats) == 4
        for _ in range(3):
            pulse.soon()
        assert len(beats) == 4
        await asyncio.sleep(0.01)
        assert len(beats) == 3
        pulse.soon()
        pulse.rest()
        await asyncio.sleep(0.01)
        assert len(beats) == 3
        pulse.now()
        await asyncio.sleep(0.05)
        assert len(beats) == 1, "it wanted to be called again at once"
        pulse.end()
        pulse.soon()
        await asyncio.sleep(0.01)
        assert len(beats) == 1

    asyncio.run(body())
