"""How much may torch's CPU kernels keep of the shapes that they have seen?

oneDNN, which multiplies bfloat16 matrices, keeps what it prepared for each shape, 1024 of them: at the head of a small
model 4 MB each. Texts of ever new lengths would fill gigabytes, and seldom be the same again.
"""

import os

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
CAPACITY = 64  # shapes; a model's own, with one length of texts, are about a dozen


def bound_primitive_cache() -> None:
    """Bounds the cache of this process, unless the environment does. To be called before the first product."""
    os.environ.setdefault(VARIABLE, str(CAPACITY))
