"""Which of the waiting requests are read next, and have they room?"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gmask.errors import GmaskError
from gmask.generation.requests import Ticket
from gmask.generation.slots import total_places


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine holds at a time."""

    rows: int  # samples
    places: int  # of keys and values, of all rows together
    prefill_tokens: int  # of contexts that are read together, padding counted

    def check(self, ticket: Ticket) -> None:
        """Raises `GmaskError` for a request that would have no room in an empty engine."""
        n = ticket.request.n
        needed = total_places([ticket.places] * n)
        if n > self.rows or needed > self.places:
            raise GmaskError(
                f"{n} samples of {ticket.places} tokens, prompt and answers together, need {needed} places; "
                f"the engine has {self.places} and {self.rows} rows: lower n or max_tokens, or shorten the text"
            )

    def holds(self, running: Sequence[int], batch: Sequence[Ticket]) -> bool:
        """Whether requests can be read together, beside running rows that may come to take so many places each."""
        places = [*running, *(ticket.places for ticket in batch for _ in range(ticket.request.n))]
        width = max(len(ticket.request.context.ids) + 1 for ticket in batch)
        return (
            len(places) <= self.rows
            and total_places(places) <= self.places
            and (len(batch) == 1 or width * len(batch) <= self.prefill_tokens)
        )


class WaitingLine:
    """Requests by priority, then in their order; one that has no room yet is not overtaken."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Ticket]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for _, ticket in self._heap)

    def push(self, ticket: Ticket) -> None:
        """Lets a request wait."""
        heapq.heappush(self._heap, (ticket.rank, ticket))

    def take(self, room: Room, running: Sequence[int]) -> list[Ticket]:
        """The next requests, as many as `Room.holds` together."""
        batch: list[Ticket] = []
        while self._heap and room.holds(running, [*batch, self._heap[0][1]]):
            batch.append(heapq.heappop(self._heap)[1])
        return batch

    def remove(self, is_over: Callable[[Ticket], object]) -> list[Ticket]:
        """The requests that are over, which wait no more."""
        removed = [ticket for _, ticket in self._heap if is_over(ticket)]
        if removed:
            self._heap = [(rank, ticket) for rank, ticket in self._heap if ticket not in removed]
            heapq.heapify(self._heap)
        return removed
