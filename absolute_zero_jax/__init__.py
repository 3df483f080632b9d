# SPDX-License-Identifier: Apache-2.0
"""Absolute Zero self-play in JAX. Importing this package imports no JAX."""

__version__ = '0.1.0'
