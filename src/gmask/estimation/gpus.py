"""The GPUs of estimates, as data: arithmetic, memory, links, and a price that is assumed.

Sources: NVIDIA's data sheets of V100, A100, H100 and H200 (SXM) and of DGX B200; dense arithmetic, one direction of a
link. The link between machines is that of the maker's own systems: DGX-1 (4 x 100 Gbit/s for 8 GPUs), DGX A100 (200
Gbit/s for each GPU), DGX H100, H200 and B200 (400 Gbit/s for each GPU). Other machines have slower ones.
"""

from dataclasses import dataclass

from gmask.errors import GmaskError

GPUS_PER_MACHINE = 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU, with 8 of them in a machine."""

    name: str
    flops: float  # a second, dense, of products in bfloat16; of a V100, which has none, in float16
    memory: float  # bytes
    bandwidth: float  # bytes a second, of its memory
    link: float  # bytes a second in one direction, to the other GPUs of its machine
    network: float  # bytes a second in one direction, its share of the links of its machine to the others
    price: float  # US dollars an hour; a round assumption, offers differ by a factor of three


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100", 125e12, 32e9, 900e9, 150e9, 6.25e9, 0.8),
        Gpu("a100-40gb", 312e12, 40e9, 1555e9, 300e9, 25e9, 1.3),
        Gpu("a100", 312e12, 80e9, 2039e9, 300e9, 25e9, 1.8),
        Gpu("h100", 989e12, 80e9, 3350e9, 450e9, 50e9, 2.5),
        Gpu("h200", 989e12, 141e9, 4800e9, 450e9, 50e9, 3.5),
        Gpu("b200", 2250e12, 180e9, 8000e9, 900e9, 50e9, 5.0),
    )
}
"""By name."""


def find_gpu(name: str) -> Gpu:
    """Returns the GPU of a name.

    Raises:
        GmaskError: an unknown name.
    """
    if name not in GPUS:
        raise GmaskError(f"no GPU {name!r} is known: choose {', '.join(GPUS)}")
    return GPUS[name]
