"""Makes a smaller checkpoint of a model: expert weights as codes in groups, the rest in bfloat16.

Pure: ``expert`` (rounding, ``gptq``, ``outliers``), ``plan`` (what goes into which file),
``sensitivity`` (which layers get more bits), ``outlier_size``. With effects: ``calibration`` (what
the experts see of a text), ``measure`` (what layers lose), ``writing``, ``place`` and ``target``
(files), ``run`` (all of it, in order), ``job`` (what is asked) and ``fingerprint`` (of which
model).
"""
