"""The time of a training step on many GPUs: products, collectives, and how much of one hides the other.

A step is played through block by block on two queues of a GPU, one for products and one for collectives, as torch's DDP
and FSDP2 fill them. Nothing is measured: the assumptions are `Assumptions`, and the sizes of the work are counted.

A collective of n processes is a ring: each sends (n - 1)/n of the bytes, over the slowest link of the ring, and waits
for n - 1 hops. In a machine that link is the GPU's own; among machines all GPUs of a machine share its links to the
others, each ring has its part of them, and 7 of 8 hops stay in a machine.
Source: Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms"; ZeRO: Rajbhandari et al. 2020, section 7.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from gmask.errors import GmaskError
from gmask.estimation.gpus import GPUS_PER_MACHINE, Gpu

DataParallel = Literal["ddp", "zero2", "fsdp"]
"""How replicas share the model: each has all of it; gradients and optimizer are divided, the weights of a step gathered
once; weights are divided, too, and gathered for each block."""

WEIGHT, GRADIENT = 2, 4  # bytes of a number that is gathered (bfloat16), and that is summed (float32)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the time of a step hangs on and nobody has measured."""

    utilization: float = 0.4  # of the peak of a GPU by the products of a pass, recomputed ones among them
    link_efficiency: float = 0.8  # of the nominal bytes a second of a link
    hop_seconds: float = 1e-6  # of a collective in a machine
    network_hop_seconds: float = 5e-6  # between machines
    optimizer_efficiency: float = 0.7  # of the memory's bandwidth


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """How a model and its rows are divided among GPUs: ``tensor`` of them hold one replica together."""

    gpus: int = 1
    data: DataParallel = "ddp"
    tensor: int = 1

    @property
    def replicas(self) -> int:
        return self.gpus // self.tensor

    @property
    def shards(self) -> int:
        """The number of parts of gradients and optimizer."""
        return 1 if self.data == "ddp" else self.replicas

    def __str__(self) -> str:
        if self.tensor == 1:
            return self.data
        return f"tp={self.tensor}" if self.data == "ddp" else f"{self.data},tp={self.tensor}"

    @staticmethod
    def read(text: str, gpus: int) -> "ParallelLayout":
        """Reads ``ddp``, ``zero2``, ``fsdp``, ``tp=4``, or ``fsdp,tp=4``.

        Raises:
            GmaskError: another text, or GPUs that cannot be divided so.
        """
        data, tensor = "ddp", 1
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name == "tp" and value.isdecimal() and int(value) > 0:
                tensor = int(value)
            elif part.strip() in get_args(DataParallel):
                data = part.strip()
            else:
                raise GmaskError(f"--parallel {text}: write ddp, zero2, fsdp, tp=4, or fsdp,tp=4")
        if gpus < 1:
            raise GmaskError(f"{gpus} GPUs: give at least 1")
        if gpus % tensor:
            raise GmaskError(f"--parallel {text}: {gpus} GPUs cannot be divided into groups of {tensor}")
        if tensor > GPUS_PER_MACHINE:
            raise GmaskError(f"--parallel {text}: tensor parallelism stays in a machine, of {GPUS_PER_MACHINE} GPUs")
        return ParallelLayout(gpus, data, tensor)  # type: ignore[arg-type]  # a name of DataParallel


@dataclass(frozen=True, slots=True)
class Ring:
    """The links of one of the rings that GPUs form."""

    members: int
    bytes_per_second: float
    latency: float  # seconds of all hops

    @staticmethod
    def of_replicas(layout: ParallelLayout, gpu: Gpu, assumed: Assumptions) -> "Ring":
        """The ring of the GPUs that hold the same part of a model."""
        members = layout.replicas
        speed = gpu.link
        beyond = 0.0
        if layout.gpus > GPUS_PER_MACHINE:
            here = max(1, GPUS_PER_MACHINE // layout.tensor)  # members of the ring in a machine
            speed = min(gpu.link, here * gpu.network)
            beyond = members / here  # hops to another machine
        hops = members - 1
        latency = min(beyond, hops) * assumed.network_hop_seconds + max(0, hops - beyond) * assumed.hop_seconds
        return Ring(members, speed * assumed.link_efficiency, latency)

    @staticmethod
    def of_tensors(layout: ParallelLayout, gpu: Gpu, assumed: Assumptions) -> "Ring":
        """The ring of the GPUs that hold a replica together."""
        hops = layout.tensor - 1
        return Ring(layout.tensor, gpu.link * assumed.link_efficiency, hops * assumed.hop_seconds)

    def gather(self, size: float) -> float:
        """Seconds until all members have ``size`` bytes of which each had a part; reduce-scatter takes as long."""
        if self.members == 1:
            return 0.0
        return (self.members - 1) / self.members * size / self.bytes_per_second + self.latency

    def reduce(self, size: float) -> float:
        """Seconds of an all-reduce of ``size`` bytes: a reduce-scatter, and an all-gather."""
        return 2 * self.gather(size)


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of a step on one GPU, counted; the blocks of a model are alike."""

    layers: int
    passes: int  # of a step
    block_flops: float  # of the forward pass of a block in one pass
    head_flops: float  # of the forward pass of the head
    block_weights: int  # numbers of a block that this GPU's replica part has
    table_weights: int  # numbers of the embeddings and the rest
    state_bytes: float  # of the hidden states of a pass, of which tensor parallelism sums two a block each way
    optimizer_bytes: float  # that an update reads and writes
    again: float = 0.0  # share of the forward pass of the blocks that is computed again


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step."""

    products: float
    collectives: float  # all of them, hidden or not
    optimizer: float
    total: float

    @property
    def exposed(self) -> float:
        """Seconds in which a GPU waits for collectives alone."""
        return self.total - self.products - self.optimizer


class Queues:
    """The two queues of a GPU: when each of them is free, and the seconds that it has worked."""

    def __init__(self) -> None:
        self.products_end = self.collectives_end = 0.0
        self.products = self.collectives = 0.0

    def compute(self, seconds: float, after: float = 0.0) -> float:
        """Computes when ``after`` has come, and returns when it is done."""
        self.products_end = max(self.products_end, after) + seconds
        self.products += seconds
        return self.products_end

    def communicate(self, seconds: float, after: float = 0.0) -> float:
        """Starts a collective when ``after`` has come, and returns when it is done; products go on meanwhile."""
        self.collectives_end = max(self.collectives_end, after) + seconds
        self.collectives += seconds
        return self.collectives_end

    def wait(self, seconds: float) -> None:
        """Makes a collective for which the products wait."""
        self.products_end += seconds
        self.collectives += seconds


def simulate_step(work: StepWork, layout: ParallelLayout, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """Plays a step through.

    DDP sums a block's gradients behind its backward pass, in the last pass of a step alone. FSDP gathers the next block
    while one is computed, forwards and backwards, and adds up and divides the gradients of every pass; ``zero2``
    gathers in the first forward pass alone. The sums of tensor parallelism hold up the products.
    """
    replicas, tensors = Ring.of_replicas(layout, gpu, assumed), Ring.of_tensors(layout, gpu, assumed)
    speed = gpu.flops * assumed.utilization
    forward, head = work.block_flops / speed, work.head_flops / speed
    backward = (2 + work.again) * forward
    gather_block = replicas.gather(WEIGHT * work.block_weights)
    gather_table = replicas.gather(WEIGHT * work.table_weights)
    is_sharded = layout.data != "ddp"
    join = replicas.gather if is_sharded else replicas.reduce
    sum_states = 2 * tensors.reduce(work.state_bytes)
    queues = Queues()

    for number in range(work.passes):
        gathers_forward = layout.data == "fsdp" or (layout.data == "zero2" and number == 0)
        gathers_backward = layout.data == "fsdp"
        joins = is_sharded or number == work.passes - 1
        begun = queues.products_end
        ready = queues.communicate(gather_table + gather_block, begun) if gathers_forward else begun
        for block in range(work.layers):
            begun = max(queues.products_end, ready)
            queues.compute(forward, ready)
            if gathers_forward and block + 1 < work.layers:
                ready = queues.communicate(gather_block, begun)
            if layout.tensor > 1:
                queues.wait(sum_states)
        queues.compute(3 * head)
        ready = queues.products_end  # the last block is still there
        for block in range(work.layers):
            begun = max(queues.products_end, ready)
            done = queues.compute(backward, ready)
            if gathers_backward and block + 1 < work.layers:
                ready = queues.communicate(gather_block, begun)
            if layout.tensor > 1:
                queues.wait(sum_states * (1 + work.again))
            if joins:
                queues.communicate(join(GRADIENT * work.block_weights), done)
        if joins:
            queues.communicate(join(GRADIENT * work.table_weights), queues.products_end)
    optimizer = work.optimizer_bytes / (gpu.bandwidth * assumed.optimizer_efficiency)
    total = max(queues.products_end, queues.collectives_end) + optimizer
    return StepTime(queues.products, queues.collectives, optimizer, total)
