"""Package contents; metadata and tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

# stgcma_fast/kernels is a relative link to ../kernels, so the Triton kernels have one import path in every kind of install.
setup(
    packages=find_packages(include=["stgcma_fast", "stgcma_fast.*"]),
    package_data={"stgcma_fast.kernels": ["configs/*.json"]},
)
