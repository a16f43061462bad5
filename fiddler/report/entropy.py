"""How evenly layers use their experts, in a sentence."""

import math
from collections.abc import Sequence
from statistics import median

from offload.popularity import Popularity


def entropy_line(popularity: Popularity, moe_layers: Sequence[int]) -> str:
    """Which layers have least and most, of what even use has, and the middle of all."""
    bits_L = popularity.entropy_bits()
    least, most = (choose(moe_layers, key=bits_L.__getitem__) for choose in (min, max))
    even = math.log2(popularity.counts_LE.shape[1])
    return (
        f"Entropy of layers: {bits_L[least]:.2f} (layer {least}) to {bits_L[most]:.2f} (layer "
        f"{most}) of {even:.2f} bits, median {median(bits_L[layer] for layer in moe_layers):.2f}"
    )
