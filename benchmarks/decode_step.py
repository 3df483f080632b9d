# SPDX-License-Identifier: Apache-2.0
"""One decode step on an accelerator: its time, what it must read, and where the time goes.

    python benchmarks/decode_step.py --batches=1,32,256 --profile=12

Random weights in bfloat16; every row holds 64 tokens at the start of a call of 64 steps. "Must
read" are all weights and the keys and values of the tokens there are on the way. With
--attention=xla also on a GPU the attention of everywhere else, to compare.
"""

import argparse
import collections
import functools
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from generate import MODELS
import jax
import jax.numpy as jnp

from absolute_zero_jax import decoding, sampling
from absolute_zero_jax.models import decode_attention, decoder, loading

STEPS, PROMPT = 64, 64


def main() -> None:
  flags = _flags()
  platform = jax.default_backend()
  if flags.attention == 'xla':
    decode_attention.serves = lambda *_: False
  config = loading.random_config(MODELS.get(flags.model, flags.model))
  dtype = jnp.bfloat16
  weights = jax.jit(functools.partial(decoding.weights, config, dtype=dtype, mesh=None))(
      decoder.init(config, jax.random.key(0), dtype=dtype))
  weight_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))
  token_bytes = 2 * config.layers * config.kv_heads * config.head_dim * 2
  print(f'{jax.devices()[0].device_kind}, {flags.model}, rings of {flags.size}\n'
        '   B  ms a step    tokens/s  must read, GB   TB/s', flush=True)
  for B in map(int, flags.batches.split(',')):
    run, cache = _program(config, weights, B, flags.size, dtype, platform)
    times = []
    for _ in range(5):
      started = time.perf_counter()
      cache, _ = jax.block_until_ready(run(cache))
      times.append((time.perf_counter() - started) / STEPS)
    step_s = statistics.median(times[1:])
    size = weight_bytes + token_bytes * B * (PROMPT + STEPS // 2)
    print(f'{B:4d} {step_s * 1e3:10.3f} {B / step_s:11.0f} {size / 1e9:14.2f} '
          f'{size / step_s / 1e12:6.2f}', flush=True)
    for name, (count, spent_s) in _kernels(run, cache)[:flags.profile]:
      print(f'     {spent_s * 1e6 / STEPS:8.1f} us a step, {count / STEPS:5.1f} x '
            f'{spent_s / count * 1e6:6.2f} us  {name[:60]}')


def _program(config, weights, B, size, dtype, platform):
  """A compiled call of `STEPS` steps as a function of the cache, and a cache."""
  cache = jax.jit(functools.partial(decoding.empty_cache, config, B, size, dtype, None,
                                    platform))()
  zeros = jnp.zeros((B,), jnp.int32)
  rows = decoding.Rows(zeros + 5, zeros + PROMPT, zeros, zeros + 2 * STEPS,
                       jnp.arange(B, dtype=jnp.int32), zeros)
  rest = (jnp.int32(PROMPT), rows, jnp.int32(STEPS), jax.random.key(1), sampling.options(),
          jnp.ones((config.vocab,), bool), jnp.asarray([-1], jnp.int32))
  decode = jax.jit(functools.partial(decoding.decode, config, chunk=STEPS, dtype=dtype, mesh=None,
                                     platform=platform), donate_argnums=1)
  compiled = decode.lower(weights, cache, *rest).compile()
  return lambda cache: compiled(weights, cache, *rest), cache


def _kernels(run, cache):
  """[(name, (count, seconds))] of the kernels of a call, the dearest first."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(run(cache))
    file = next(pathlib.Path(folder).rglob('*.xplane.pb'))
    found = collections.defaultdict(lambda: (0, 0.0))
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
      for line in plane.lines if 'GPU' in plane.name else ():
        for event in line.events if 'Stream' in line.name else ():
          count, spent_s = found[event.name]
          found[event.name] = count + 1, spent_s + event.duration_ns / 1e9
  return sorted(found.items(), key=lambda item: -item[1][1])


def _flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  parser.add_argument('--model', default='qwen2.5-1.5b', help=f'one of {list(MODELS)}, or any name')
  parser.add_argument('--batches', default='1,32,64,256')
  parser.add_argument('--size', type=int, default=192, help='slots of a cache')
  parser.add_argument('--attention', default='kernel', choices=('kernel', 'xla'))
  parser.add_argument('--profile', type=int, default=0, help='kernels to list (on a GPU)')
  return parser.parse_args()


if __name__ == '__main__':
  main()
