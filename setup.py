# SPDX-License-Identifier: Apache-2.0
"""Installs absolute_zero_jax; bounds are what the tests have run with."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent

setup(
    name='absolute_zero_jax',
    version='0.1.0',
    description='Absolute Zero self-play (propose, execute, solve, REINFORCE++) in JAX',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['absolute_zero_jax', 'absolute_zero_jax.*']),
    package_data={'absolute_zero_jax': ['tasks/prompts/**/*', 'tasks/prompts/*', 'carried/**/*']},
    install_requires=[
        # Python 3.11 ends at jax 0.10.2 and flax 0.12.8; newer pairs need Python 3.12.
        'jax>=0.10',
        'flax>=0.12.8',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.8',
        # Model files and tokenizers only: no torch at run time. transformers brings these four,
        # which are what is imported; it is the reference that exported models must load in.
        'transformers>=5.0',
        'tokenizers>=0.22',
        'huggingface_hub>=1.0',
        'filelock>=3.12',
        'tqdm>=4.60',
        # Trains and checks sentencepiece models; reading one needs only its bytes.
        'sentencepiece>=0.2',
        'ml-collections>=1.0',
        'tensorboard>=2.20',
        # Reads the quantised weights of the quickstart's model where no model hub is reachable.
        'gguf>=0.17',
        # bfloat16 for numpy; comes with jax.
        'ml_dtypes>=0.5',
        # Remote workdirs (gs://...); comes with orbax.
        'etils[epath]>=1.10',
        # Chat templates.
        'jinja2>=3.1',
    ],
    extras_require={
        'tpu': ['jax[tpu]'],
        'cuda': ['jax[cuda13]'],
        'test': [
            'pytest>=8',
            # Two files at a time: most tests compile on one core.
            'pytest-xdist>=3',
            'hypothesis>=6',
            'ruff>=0.12',
            # The reference implementation that the parity tests compare with.
            'torch>=2.6,<=2.13.0',
            'accelerate>=1.0',
            'safetensors>=0.5',
            'matplotlib>=3.9',
            # Intrinsic rewards against the reference's values.
            'complexipy>=3',
            'radon>=6',
        ],
        # Intrinsic rewards that measure programs.
        'rewards': ['complexipy>=3', 'radon>=6'],
        'bench': ['torch>=2.6,<=2.13.0', 'accelerate>=1.0', 'pebble>=5'],
        'notebooks': ['jupyterlab>=4', 'matplotlib>=3.9'],
        # The plot of a run with held-out scores.
        'plot': ['matplotlib>=3.9'],
        'eval': ['math-verify>=0.7'],
    },
)
