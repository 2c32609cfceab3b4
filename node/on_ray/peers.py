"""The actors of a run's peers, from the driver's side: started, looked after, and asked for their weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...compression.errors import ConfigError, SwarmUnreachable, ThinwireError, named_error
from .cluster import PeerGroup, give_back, is_placed

if TYPE_CHECKING:
    from .peer import PeerSpec

log = logging.getLogger("thinwire.ray")

CALL_S: Final = 60.0
"""An actor that is being started again answers within this time."""

LEAVE_S: Final = 15.0
LATE_S: Final = 120.0
"""After the last round: for peers that are on their way back."""

_PART_BYTES: Final = 2**26


@dataclass(slots=True)
class Peer:
    """`result`: of its node, once that has reached the last round."""

    name: str
    ranks: int
    placement: Any
    actor: Any
    outcome: Any
    result: dict[str, Any] | None = None
    is_over: bool = False


class Peers:
    """`restarts`: how often an actor is started again; -1: always."""

    def __init__(self, restarts: int) -> None:
        self._restarts = restarts
        self.all: list[Peer] = []
        self.first_error: ThinwireError | None = None
        self._news: tuple[Peer, Any] | None = None

    def start(
        self,
        groups: Sequence[PeerGroup],
        placements: Sequence[Any],
        spec: Callable[[str, PeerGroup], PeerSpec],
    ) -> None:
        """One in each placement."""
        kinds = [group for group in groups for _ in range(group.count)]
        for i, (group, placement) in enumerate(zip(kinds, placements, strict=True)):
            actor = self._started(spec(f"peer-{i}", group), placement)
            outcome = actor.outcome.options(max_task_retries=-1).remote()
            self.all.append(Peer(f"peer-{i}", group.ranks, placement, actor, outcome))

    def _started(self, spec: PeerSpec, placement: Any) -> Any:
        """The actor of rank 0, in the first bundle of its placement group."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from .peer import PeerActor

        return (
            ray.remote(PeerActor)
            .options(
                name=spec.name,
                namespace=spec.namespace,
                num_cpus=spec.cpus,
                num_gpus=spec.gpus,
                max_restarts=self._restarts,
                max_concurrency=8,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, 0),
            )
            .remote(spec)
        )

    @property
    def done(self) -> list[Peer]:
        """Those that have reached the last round."""
        return [peer for peer in self.all if peer.result is not None]

    @property
    def n_left(self) -> int:
        """How many have not ended."""
        return sum(not peer.is_over for peer in self.all)

    def collect(self) -> None:
        """Takes the results, or errors, of peers that have ended."""
        import ray

        waiting = {peer.outcome: peer for peer in self.all if not peer.is_over}
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if waiting else ([], [])
        for ref in done:
            peer = waiting[ref]
            peer.is_over = True
            try:
                outcome = ray.get(ref)
            except ray.exceptions.RayError as e:
                self._note(ThinwireError(f"{peer.name} is not started again any more: {_reason(e)}"))
                continue
            if "error" in outcome:
                kind, text, _ = outcome["error"]
                self._note(named_error(kind, f"{peer.name}: {text}"))
            else:
                peer.result = outcome["result"]

    def tell(self) -> None:
        """Logs what the first of those that have not ended says. To be called again and again: it waits for
        nobody."""
        import ray

        if self._news is None:
            first = next((peer for peer in self.all if not peer.is_over), None)
            self._news = None if first is None else (first, first.actor.news.remote())
            return
        peer, asked = self._news
        if not ray.wait([asked], timeout=0)[0]:
            return
        self._news = None
        with suppress(ray.exceptions.RayError):  # it is started again
            for level, text in ray.get(asked):
                log.log(level, "%s: %s", peer.name, text)

    def _note(self, error: ThinwireError) -> None:
        self.first_error = self.first_error or error
        log.error("%s", error)

    def are_done(self, is_late: bool) -> bool:
        """Whether nobody is to be waited for: of those that are on their way back, only who has a place."""
        left = [peer for peer in self.all if not peer.is_over]
        if not left:
            return True
        return bool(self.done) and (is_late or not any(is_placed(peer.placement) for peer in left))

    def fetch(self, output: Path) -> None:
        """The weights that a peer has written, to this machine. Raises ConfigError, or why there are none."""
        if not self.done:
            raise self.first_error or ThinwireError("no peer reached the last round")
        actor = self.done[0].actor
        try:
            for name, n_bytes in ask(actor.exported):
                path = output / name
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_name(f".{path.name}.part")
                with aside.open("wb") as file:
                    for start in range(0, n_bytes, _PART_BYTES):
                        file.write(ask(actor.read, name, start, _PART_BYTES))
                aside.replace(path)
        except OSError as e:
            raise ConfigError(f"{output} cannot be written: {e.strerror}") from e
        log.info("wrote the trained weights to %s", output)

    def clean(self) -> None:
        """Nothing of those that are done stays on their machines."""
        for peer in self.done:
            ask(peer.actor.clean)

    def leave(self) -> None:
        """All leave the swarm."""
        import ray

        for peer in self.all:
            peer.actor.leave.remote()
        outcomes = [peer.outcome for peer in self.all if not peer.is_over]
        if outcomes:
            ray.wait(outcomes, num_returns=len(outcomes), timeout=LEAVE_S)

    def end(self) -> None:
        """Kills the actors, whatever they are doing. Raises nothing."""
        give_back([peer.actor for peer in self.all], [])


def ask(method: Any, *arguments: Any) -> Any:
    """The answer of an actor to a question that can be asked again. Raises SwarmUnreachable."""
    import ray

    try:
        return ray.get(method.options(max_task_retries=-1).remote(*arguments), timeout=CALL_S)
    except ray.exceptions.RayError as e:
        raise SwarmUnreachable(f"an actor of the run does not answer: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    """One line of an error of Ray's, which fill pages."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
