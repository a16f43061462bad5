"""What is to be quantised, and how: what of it is refused, and what makes two runs the same."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_kernels.weight_kind import WeightKind
from fiddler.errors import QuantizeError
from fiddler.models.config import ModelConfig
from fiddler.models.json_file import read_json
from fiddler.models.quantized import VERSION, check_groups, quantization_of
from fiddler.models.registry import load_config
from fiddler.quantize.expert import Method
from fiddler.quantize.fingerprint import fingerprint
from fiddler.quantize.sensitivity import share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """``kind`` experts of the model in ``source``, as the folder ``output``; bf12 rounds nothing.

    ``calibration`` is a text file; "gptq" needs one. ``outliers``: as many inputs of each matrix,
    the largest of that text, are read by columns of 8 bits. ``sensitivity``: layers that lose most
    on that text get more bits than ``kind`` has, until the experts take this share of bfloat16.
    ``resume``: go on with an interrupted run.
    """

    source: Path
    output: Path
    kind: WeightKind
    method: Method
    calibration: Path | None = None
    outliers: int = 0
    sensitivity: float | None = None
    resume: bool = False


def checked(job: QuantizeJob) -> tuple[dict[str, Any], ModelConfig]:
    """The source's ``config.json``, of a job that can be done.

    Raises :class:`QuantizeError`, and as :func:`check_groups` and :func:`load_config`.
    """
    raw = read_json(job.source / "config.json")
    if quantization_of(raw):
        raise QuantizeError(
            f"{job.source} is quantised already", hint="take the model that it was made from"
        )
    if job.method == "gptq" and job.calibration is None:
        raise QuantizeError(
            "gptq fits the weights to a text, and none was given", hint="add --calibration FILE"
        )
    if job.kind.is_lossless and job.calibration is not None:
        raise QuantizeError(
            f"{job.kind.name} loses nothing, so there is nothing to fit to a text",
            hint="leave out --calibration",
        )
    config = load_config(job.source)
    check_groups(config, job.kind, "--scheme")
    _check_outliers(job, config)
    _check_sensitivity(job, config)
    return raw, config


def _check_outliers(job: QuantizeJob, config: ModelConfig) -> None:
    if not job.outliers:
        return
    if job.calibration is None:
        raise QuantizeError(
            "outliers are the largest inputs of a text, and none was given",
            hint="add --calibration FILE",
        )
    if job.kind.bits != 4:
        raise QuantizeError(
            f"outliers are kept in 8 bits, and all of {job.kind.name} has 8",
            hint="leave out --outliers, or take a scheme of 4 bits",
        )
    most = min(config.hidden_size, config.expert_size)
    if job.outliers >= most:
        raise QuantizeError(
            f"{job.outliers} outliers are not fewer than the {most} inputs of a matrix",
            hint=f"take some per cent of them: --outliers {max(1, most // 32)}",
        )


def _check_sensitivity(job: QuantizeJob, config: ModelConfig) -> None:
    if job.sensitivity is None:
        return
    if not 0 < job.sensitivity < 1:
        raise QuantizeError(
            f"the experts cannot take {job.sensitivity} of what they take in bfloat16",
            hint="give a share between those of 4 and 8 bits: --sensitivity 0.3",
        )
    if job.calibration is None:
        raise QuantizeError(
            "what layers lose is measured on a text, and none was given",
            hint="add --calibration FILE",
        )
    if job.outliers:
        raise QuantizeError(
            "layers of several kinds have no outliers: their experts would differ in width",
            hint="leave out --outliers or --sensitivity",
        )
    least = share_of(config, job.kind)
    if job.sensitivity < least:
        raise QuantizeError(
            f"{job.kind.name} alone takes {least:.4f} of bfloat16, more than {job.sensitivity}",
            hint=f"use --sensitivity {math.ceil(least * 1000) / 1000} or more",
        )


def identity(job: QuantizeJob, weights: Iterable[Path], text_sha256: str | None) -> dict[str, Any]:
    """What an interrupted run and the one that goes on with it must have in common.

    ``weights`` are the source's files: of two models that were made from one, sizes are equal.
    """
    config = (job.source / "config.json").read_bytes()
    return {
        "model": {
            "config.json": hashlib.sha256(config).hexdigest(),
            **{path.name: fingerprint(path) for path in sorted(weights)},
        },
        "scheme": job.kind.name,
        "method": job.method,
        "calibration": text_sha256,
        "outliers": job.outliers,
        **({} if job.sensitivity is None else {"sensitivity": job.sensitivity}),
        "version": VERSION,
    }
