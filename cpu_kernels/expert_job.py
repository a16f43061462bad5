"""The record that tells the workers all about one layer's experts: addresses and sizes.

T tokens, S choices of a token (top k), H hidden, I expert width, E experts held, P = T * S.
"""

import numpy as np

from cpu_kernels.addresses import array_of_records
from cpu_kernels.worker import JOB_HEADER

ADDRESSES = (
    # Weights, and the bytes from one expert's to the next; biases float32 [E, 2I] and [E, H] or 0.
    *("w13", "w13_stride", "w2", "w2_stride", "b13", "b2"),
    # What a step brings: float32 [T, H], int32 [T, S], float32 [T, S]; place_of is int32: the place
    # of each expert that ids can name among those held, -1 if it is not, or 0 if they are the same.
    *("x", "ids", "weights", "place_of", "out"),
    # Scratch: prepared rows of x and of act, act itself float32 [P, act_cols]; and each worker's
    # own: a Room, then its routes.
    *("x_rows", "act_rows", "act", "workers", "worker_stride"),
    # Scratch of experts with many tokens: x and act in blocks, and each worker's own sums.
    *("x_blocks", "act_blocks", "column_sums"),
    # int32 [E + 1] or 0: with n routed experts only the first kept[n] rows of gate and up (columns
    # of w2) of each are computed, since somebody else adds the others; the layout stays that of I.
    "kept",
    "error",  # where to complain
    "taken",  # words that count the pieces that workers have taken
)
SIZES = (
    *("num_tokens", "top_k", "num_ids", "num_experts", "hidden", "width"),
    *("x_row_bytes", "act_row_bytes", "act_cols", "activation"),
    "columns_from",  # pairs of an expert that is computed by columns; 0: none is
)
JOB = np.dtype(
    [
        *JOB_HEADER,
        *((name, np.int64) for name in (*ADDRESSES, *SIZES)),
        ("limit", np.float32),  # of a clamped activation
        ("alpha", np.float32),
    ]
)

PANEL_TOKENS = 16  # tokens whose products wait for their activation at a time
PANEL_ROWS = 32  # rows of weights that stay in cache while all tokens pass over them
NEXT_ROWS = 8  # those behind them, to be asked for ahead: room for a tile

# What one worker needs while it multiplies a panel.
ROOM = np.dtype(
    [
        ("sums", np.float32, (PANEL_TOKENS, PANEL_ROWS, 16)),  # a vector for each product
        ("products", np.float32, (2, PANEL_TOKENS, PANEL_ROWS)),
        ("act", np.float32, (PANEL_ROWS,)),
        ("xs", np.int64, (PANEL_TOKENS,)),  # addresses of tokens' rows
        ("rows", np.int64, (PANEL_ROWS + NEXT_ROWS,)),  # addresses of rows of weights
    ]
)

job_array = array_of_records(JOB)
