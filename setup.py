"""Packages are listed by hand: `kernels/`, `converters/` and `benchmarks/` lie at the top and are installed inside
`flux_quant`. A top-level `kernels` would shadow the library of that name which diffusers and transformers look for.
"""

import re
from pathlib import Path

from setuptools import setup

VERSION = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("flux_quant").joinpath("__init__.py").read_text())

setup(
    name="flux_quant",
    version=VERSION[1],
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    description="Quantization and low-VRAM runtime toolkit for FLUX.1",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "flux_quant",
        "flux_quant.codecs",
        "flux_quant.frontends",
        "flux_quant.frontends.comfyui",
        "flux_quant.streaming",
        "flux_quant.text",
        "flux_quant.planner",
        "flux_quant.drawing",
        "flux_quant.verbs",
        "flux_quant.kernels",
        "flux_quant.converters",
        "flux_quant.benchmarks",
        "flux_quant.benchmarks.bench",
        "flux_quant.benchmarks.peers",
        "flux_quant.benchmarks.peers.runners",
        "flux_quant.benchmarks.report",
        "flux_quant.benchmarks.quality",
        "flux_quant.benchmarks.tiny_flux",
        "flux_quant.benchmarks.tiny_flux.improving",
    ],
    package_dir={
        "flux_quant.kernels": "kernels",
        "flux_quant.converters": "converters",
        "flux_quant.benchmarks": "benchmarks",
    },
    package_data={
        "flux_quant": [f"tiny_flux/**/*.{kind}" for kind in ("safetensors", "gguf", "json", "txt", "model", "md")],
        "flux_quant.frontends.comfyui": ["workflows/*.json", "workflows/api/*.json"],
        "flux_quant.kernels": ["measured/*.json"],
        "flux_quant.benchmarks": ["results/*.json", "results/*/*.json"],
        "flux_quant.benchmarks.report": ["templates/*"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "safetensors>=0.8",
        "gguf>=0.18",
        "accelerate>=1.2",
        "diffusers>=0.38",
        "transformers>=5.15",
        "sentencepiece>=0.2",
        "protobuf>=4.25",  # transformers reads spiece.model with it
        "numba>=0.61",
        "Pillow>=10.3",
        "rich>=14.3",
        "typer>=0.26",
    ],
    extras_require={
        # torch for CUDA brings its own triton on Linux and none on Windows. Beside torch for CPU it is of use to the
        # tests alone, which compile kernels and run them in the interpreter: `make test` installs it, 190 MB. Without
        # triton everything runs on the torch path.
        "triton": ["triton>=3.6; platform_system == 'Linux'", "triton-windows>=3.6; platform_system == 'Windows'"],
        "train": ["fonttools>=4.50"],
        "report": ["Jinja2>=3.1", "matplotlib>=3.8"],
        "dev": [
            "libgguf>=0.2.2",
            "Jinja2>=3.1",
            "matplotlib>=3.8",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "scikit-image>=0.25",
        ],
    },
    entry_points={"console_scripts": ["flux-quant = flux_quant.cli:main"]},
)
