"""Records of chunks: arguments, and what the host reads."""

import torch

INFINITY, NAN = float("inf"), float("nan")


def values(count, row, width, number, dtype=torch.float32):
    """Zeros ``[count, 2, width]``, a view of memory by rows, with a number at the end of a row."""
    found = torch.zeros(2, count, width, dtype=dtype)
    found[row, -1, -1] = number
    return found.transpose(0, 1)


TOKENS = torch.tensor([[2**40, 1, 2], [3, 4, 5]])
BOTH = torch.tensor([7, 2**33])
CASES = {
    "one draw": (
        {"tokens": TOKENS, "values": values(1, 0, 5, NAN), "draws": 1},
        [[2**40, 1, 2, 1, 1, 0, 0, 0], [3, 4, 5, 1, 1, 0, 1, 0]],
    ),
    "many draws": (
        {
            "tokens": TOKENS, "values": values(200, 1, 13, -INFINITY, torch.bfloat16),
            "num_agreeing": BOTH, "draws": 200,
        },
        [[2**40, 1, 2, 7, 200, 0, 1, 0], [3, 4, 5, 2**33, 200, 0, 0, 0]],
    ),
    "large and finite": (
        {"tokens": TOKENS[:, :1], "values": values(2, 1, 3, 1e300, torch.float64)},
        [[2**40, 1, 1, 0, 1, 0], [3, 1, 1, 0, 1, 0]],
    ),
    "an answer": (
        {
            "tokens": TOKENS, "values": torch.tensor([True, False]), "draws": BOTH,
            "is_fallback": torch.tensor([False, True]), "saved": BOTH + 1,
        },
        [[2**40, 1, 2, 1, 7, 0, 1, 8], [3, 4, 5, 1, 2**33, 1, 0, 2**33 + 1]],
    ),
    "no sequence": ({"tokens": TOKENS[:0], "values": torch.zeros(2, 0, 3)}, []),
}  # fmt: skip

# A record, and the state before it: tokens, seeds, lengths.
STATE = (
    torch.tensor([[2**40, 1, 2, 1, 1, 0, 1, 0], [3, 4, 5, 1, 1, 0, 1, 0]]),
    torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[7, 2**35], [-8, 0]]),
    torch.tensor([0, 99]),
)  # fmt: skip


def state_after(has_lengths):
    """Tokens, seeds and, if they are given, lengths."""
    tokens, seeds, lengths = TOKENS.tolist(), [[7, 2**35 + 1], [-8, 1]], [1, 100]
    return [tokens, seeds, lengths] if has_lengths else [tokens, seeds]
