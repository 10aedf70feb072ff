"""Lets `pip install` build the package; every setting is in pyproject.toml."""

from setuptools import setup

setup()
