"""Compiles the GPU's kernels of a calibration's decode layers, by running these on an idle pool.

Triton takes a second or so for each of some ten kernels, of one core; meanwhile other processes
compile those of the CPU (:mod:`cpu_kernels.precompile`).
"""

from dataclasses import replace

from offload import gpu_rates, share_rates
from offload.handoff import pinned_words
from offload.handoff_probe import choose_way, forced_way, probe
from offload.idle_pool import IdlePool
from offload.layer_rig import layer_rig

NUM_LAYERS = 2  # a second one takes what a first one gives, and its tables are aligned otherwise


def compile_ahead(free_bytes: int) -> None:
    """Those of ``gpu_rates.hand_over_s`` and ``share_rates.share_rates``, kept by Triton."""
    way = choose_way(probe(), forced_way())
    for setup in (*gpu_rates.setups(), *share_rates.setups(free_bytes)):
        few = replace(setup, layers=replace(setup.layers, num_layers=NUM_LAYERS))
        with layer_rig(few, IdlePool(pinned_words()), way) as rig:
            rig.seconds()
