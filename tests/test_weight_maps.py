"""Are tensors divided among ranks as the training code divides them, and put together again bit for bit?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmask.checkpoints.formats import Split, bare_name, divide, merge, same_bits, split_of
from gmask.errors import GmaskError

LAYER = "transformer.layers.1."
KINDS = {
    "word_embeddings.weight": Split.ROWS,
    "transformer.position_embeddings.weight": Split.WHOLE,
    "transformer.block_position_embeddings.weight": Split.WHOLE,
    LAYER + "input_layernorm.weight": Split.WHOLE,
    LAYER + "post_attention_layernorm.bias": Split.WHOLE,
    LAYER + "attention.query_key_value.weight": Split.THIRDS,
    LAYER + "attention.query_key_value.bias": Split.THIRDS,
    LAYER + "attention.dense.weight": Split.COLUMNS,
    LAYER + "attention.dense.bias": Split.WHOLE,
    LAYER + "mlp.dense_h_to_4h.weight": Split.ROWS,
    LAYER + "mlp.dense_h_to_4h.bias": Split.ROWS,
    LAYER + "mlp.dense_4h_to_h.weight": Split.COLUMNS,
    LAYER + "mlp.dense_4h_to_h.bias": Split.WHOLE,
    "transformer.final_layernorm.weight": Split.WHOLE,
    "dense.weight": Split.WHOLE,  # of a classifier
    "pool_layer.weight": Split.WHOLE,
    "multichoice_head.weight": Split.WHOLE,
    "out_proj.bias": Split.WHOLE,
}
QUERY_KEY_VALUE = LAYER + "attention.query_key_value.weight"


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all: NaN of every kind, infinities, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    count = dtype.itemsize * torch.Size(shape).numel()
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("key", KINDS)
def test_each_kind_of_tensor_is_divided_in_its_way(key: str) -> None:
    assert split_of(key) is KINDS[key]


@given(
    key=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    parts=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_any_way_through_any_numbers_of_ranks_gives_every_bit_back(key, dtype, parts, rows, columns, seed) -> None:
    shape = (72 * rows, 24 * columns)[: 1 if key.endswith("bias") or "norm" in key else 2]
    tensor = random_bits(shape, dtype, seed)
    whole = tensor
    for count in parts:
        shares = divide(key, whole, count)
        assert len(shares) == count and len({share.shape for share in shares}) == 1
        assert sum(share.numel() for share in shares) == tensor.numel() * (count if KINDS[key] is Split.WHOLE else 1)
        whole = merge(key, shares)
    assert same_bits(whole, tensor)


def test_a_rank_gets_its_own_heads_of_queries_keys_and_values() -> None:
    tensor = torch.arange(12.0)[:, None].expand(12, 4)  # queries 0 to 3, keys 4 to 7, values 8 to 11
    assert divide(QUERY_KEY_VALUE, tensor, 2)[1][:, 0].tolist() == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("word_embeddings.weight", (7, 4)),
        (QUERY_KEY_VALUE, (12, 4)),  # 4 heads' rows in a third
        (LAYER + "attention.dense.weight", (9, 4)),
    ],
)
def test_what_cannot_be_divided_evenly_is_refused(key: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be divided among 3 ranks"):
        divide(key, torch.zeros(shape), 3)


def test_shares_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(GmaskError, match=r"final_layernorm.weight differs between the ranks"):
        merge("transformer.final_layernorm.weight", [torch.ones(3), torch.zeros(3)])
    with pytest.raises(GmaskError, match="a third of the rows each"):
        merge(QUERY_KEY_VALUE, [torch.ones(4, 4)] * 2)


def test_equal_bits_are_stricter_and_kinder_than_equal_numbers() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("wrapped", ["glm.{}", "model.{}", "module.{}", "module.model.{}", "{}"])
@pytest.mark.parametrize("key", ["word_embeddings.weight", "pool_layer.weight"])
def test_what_wrappers_add_to_a_name_is_taken_off(wrapped: str, key: str) -> None:
    assert bare_name(wrapped.format(key)) == key
