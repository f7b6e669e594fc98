"""The head's kernels against the float64 reference and, for what is drawn, the torch backend."""

import pytest
import torch
from head_cases import make_head, make_inputs, run, size_id
from helpers import assert_no_worse_than_plain

# width, latent, noise, blocks, draws, rows: powers of two and not, tiles with rows missing
SIZES = [
    (8, 4, 3, 1, 2, (1,)),
    (33, 17, 9, 3, 1, ()),
    (64, 16, 64, 2, 5, (2, 3)),
    (48, 5, 7, 1, 3, (13,)),
    (192, 8, 70, 1, 4, (9,)),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_as_good_as_the_formula(size, recompute, generator):
    head = make_head(size, generator).float()
    inputs = [value.float() for value in make_inputs(size, generator)]
    plain = run(head, inputs, torch.float32, "reference")
    actual = run(head, inputs, torch.float32, "triton", recompute=recompute)
    truth = run(head, inputs, torch.float64, "reference")
    assert actual[0].shape == (size[4], *size[5], size[1])
    assert_no_worse_than_plain(actual, plain, truth)
