"""Sizes of decode steps: a batch takes the smallest bucket that it fits; the rest is padding."""

BUCKETS = (1, 2, 4, 8, 16, 32)  # the last is what the decode kernels for experts take at most


def bucket_for(num_requests: int, largest: int = BUCKETS[-1]) -> int | None:
    """The smallest bucket with room for them, None if none up to ``largest`` has."""
    return next((b for b in BUCKETS if num_requests <= b <= largest), None)


def largest_bucket(max_num_seqs: int) -> int:
    """The bucket that the most requests at once need; of more than the last, that one."""
    return bucket_for(max_num_seqs) or BUCKETS[-1]


def bucket_number(bucket: int) -> int:
    """How many buckets there are up to this one."""
    return BUCKETS.index(bucket) + 1
