"""Metadata, dependency ranges and extras. No logic: a wheel is the same wherever it is built."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fiddler/_version.py").read_text())
assert VERSION is not None

setup(
    name="fiddler-moe",
    version=VERSION.group(1),
    description="Mixture-of-Experts models larger than the GPU, run by CPU and GPU together",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fiddler*", "offload*", "cpu_kernels*", "gpu_kernels*"]),
    package_data={
        "": ["py.typed"],
        "fiddler": ["assets/builtin/*", "builtin_text/words.txt"],
        "offload": ["machines/*.json"],
    },
    install_requires=[
        "click>=8.1.8,<9",
        "huggingface-hub>=2.4,<3",
        "jinja2>=3.1.6",
        "numba>=0.64,<0.70",
        "numpy>=2.0",
        "platformdirs>=4",
        "prompt_toolkit>=3.0.50",
        "psutil>=6",
        "rich>=14",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.8; platform_system == 'Linux'",
    ],
    extras_require={
        "viz": ["matplotlib>=3.9"],
        "dev": [
            "hypothesis",
            "import-linter",
            "matplotlib>=3.9",
            "mypy",
            "pexpect",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "transformers>=5.17,<6",
        ],
    },
    entry_points={"console_scripts": ["fiddler = fiddler.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
