"""Makes a smaller checkpoint of a model: expert weights as codes in groups, the rest in bfloat16.

Pure: ``grid`` (scales and zero points), ``rounding``, ``gptq``, ``plan`` (what goes into which
file). With effects: ``calibration`` (what the experts see of a text), ``writing`` and ``target``
(files), ``run`` (all of it, in order).
"""
