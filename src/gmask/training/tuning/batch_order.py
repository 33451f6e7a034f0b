"""Which samples does each step of a run see, and which of them in which process?"""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from gmask.errors import GmaskError


class BatchOrder(Sampler[list[int]]):
    """The passes of one process over a whole run, step after step; it depends on nothing but its arguments.

    The samples come in an endless row of epochs, each shuffled anew, and every step takes the next
    ``batch_size * accumulation`` of them, over the end of an epoch if need be. The processes share the samples of a
    step, so that it is the same step whatever their number. A resumed run skips the passes that it has made.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        steps: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        length_grouped: bool = False,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        """
        Args:
            lengths: of the samples, in tokens.
            batch_size: samples of one pass, at most.
            accumulation: passes of a step, for one process.
            length_grouped: samples of like length come in the same step, and in the same pass.

        Raises:
            GmaskError: the samples of a step cannot be shared evenly.
        """
        self.lengths, self.steps, self.seed, self.length_grouped = lengths, steps, seed, length_grouped
        self.process, self.processes = process, processes
        self.samples_per_step = batch_size * accumulation
        self.passes = -(-accumulation // processes)
        if self.samples_per_step % processes:
            raise GmaskError(
                f"a step of {self.samples_per_step} samples cannot be shared by {processes} processes: make "
                f"optimization.batch_size x optimization.accumulation a multiple of {processes}"
            )

    def __len__(self) -> int:
        """Passes of this process in the whole run."""
        return self.steps * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream()
        for _ in range(self.steps):
            samples = list(islice(stream, self.samples_per_step))
            if self.length_grouped:
                samples.sort(key=lambda sample: -self.lengths[sample])
            mine = samples[self.process :: self.processes]
            yield from (part.tolist() for part in np.array_split(mine, self.passes))

    def _stream(self) -> Iterator[int]:
        epoch = 0
        while True:
            yield from self._epoch(epoch)
            epoch += 1

    def _epoch(self, epoch: int) -> list[int]:
        (state,) = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        if self.length_grouped:
            grouped: list[int] = get_length_grouped_indices(
                list(self.lengths), self.samples_per_step, generator=generator
            )
            return grouped
        return torch.randperm(len(self.lengths), generator=generator).tolist()


def steps_of(epochs: float, samples: int, *, samples_per_step: int) -> int:
    """Steps in which every sample is seen ``epochs`` times; the last step may see a few once more."""
    return max(1, int(np.ceil(epochs * samples / samples_per_step)))
