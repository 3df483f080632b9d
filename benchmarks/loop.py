# SPDX-License-Identifier: Apache-2.0
"""Where an iteration's time goes: phases in turn, overlapped, with updates one play behind.

  python benchmarks/loop.py                                 # the carried model, two CPU cores
  python benchmarks/loop.py --config configs/smollm2.py --iterations 2
  python benchmarks/loop.py --batch 32 --ways overlapped    # 96 proposals an iteration
  python benchmarks/loop.py --ways 'overlapped,one device' --model carried:tiny_played

Each way is a run of its own from the same seed; their iterations are interleaved A B C A B C, and
the first one of each (two where updates are one play behind), which compiles, is left out. Reported
are medians of the seconds per phase, the share of an iteration outside decoding, waiting for the
executor and updating (target 5 %), the waiting against the decoding (target 10 %), tokens per
second of whole iterations against A, and the share of XLA's rate for a product of matrices of
1024 x 1024 in the same dtype, measured between the iterations. Counted are two operations per
weight and token that is generated or prefilled, and six per one that the update reads; not
attention, and not padding.
"""

import argparse
import contextlib
import runpy
import statistics
import time

import jax
import jax.numpy as jnp

from absolute_zero_jax import metrics, parts, run

_BEHIND = {'train.off_policy_steps': 1, 'algorithm.importance': 'truncate'}
WAYS = {
    'in turn': {'selfplay.overlap': 0},
    'overlapped': {'selfplay.overlap': 2},
    'one play behind': {'selfplay.overlap': 0} | _BEHIND,
    'both': {'selfplay.overlap': 2} | _BEHIND,
    # The CPU as one device; the way before it in --ways decides how many JAX sees.
    'one device': {'selfplay.overlap': 2, 'sampler.cpu_devices': 1},
}
PHASES = ('decode', 'wait', 'reward', 'update', 'metrics', 'iteration')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/tiny.py',
                      help='config file, arguments after a colon')
  parser.add_argument('--iterations', type=int, default=5, help='measured, of each way')
  parser.add_argument('--ways', default='in turn,overlapped,one play behind,both',
                      help=f'comma-separated; all: {", ".join(WAYS)}')
  parser.add_argument('--model', default='', help="model.name; default: the config's")
  parser.add_argument('--batch', type=int, default=0, help="selfplay.batch; 0 = the config's")
  args = parser.parse_args()
  ways = {name: WAYS[name] for name in args.ways.split(',')}
  parts.use_compilation_cache()
  rows = {name: [] for name in ways}
  with contextlib.ExitStack() as stack:
    runs = {name: stack.enter_context(run.Run(_config(args, changes)))
            for name, changes in ways.items()}
    rates = []
    for i in range(args.iterations + 2):
      for name, current in runs.items():
        # The first update compiles too, and may be one play behind.
        first = 1 + current.c.train.off_policy_steps
        if i >= first + args.iterations:
          continue
        found = current.iterate().metrics
        rates.append(_matmul_rate(jnp.dtype(current.c.model.dtype)))
        print(f'{name} {i}: {found["time/iteration"]:.2f} s, {found["sampler/tokens"]:.0f} tokens',
              flush=True)
        if i >= first:
          rows[name].append(found | {'operations': _operations(current.policy(), found)})
  print(f'XLA multiplies matrices of 1024 x 1024 at {statistics.median(rates) / 1e9:.0f} Gflop/s')
  print(_table(rows, statistics.median(rates)))


def _operations(params, found: dict[str, float]) -> float:
  """Of the products with weights in an iteration; the unembedding's where it is needed."""
  sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
  unembed = sizes.get('unembed', sizes['embed'])
  layers = sum(sizes.values()) - sizes['embed'] - sizes.get('unembed', 0)
  generated, learned = found['sampler/tokens'], found['train/positions']
  return (2 * layers * (generated + found['sampler/prefill_tokens']) + 2 * unembed * generated
          + 6 * layers * learned + 6 * unembed * found['train/tokens'])


def _matmul_rate(dtype, size: int = 1024) -> float:
  """Operations per second: the best of five products."""
  x, product = jnp.full((size, size), 0.01, dtype), jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)


def _config(args: argparse.Namespace, changes: dict):
  path, _, arg = args.config.partition(':')
  c = runpy.run_path(path)['get_config'](arg or None)
  c.heldout.every_steps = 0
  c.selfplay.batch = args.batch or c.selfplay.batch
  c.model.name = args.model or c.model.name
  c.update_from_flattened_dict(changes)
  return c


def _table(rows: dict[str, list[dict[str, float]]], matmul_rate: float) -> str:
  def median(name, of):
    return statistics.median(of(row) for row in rows[name])

  def rate(row):
    return row['sampler/tokens'] / row['time/iteration']

  def outside(row):
    named = sum(row[f'time/{phase}'] for phase in ('decode', 'wait', 'update'))
    return 1 - named / row['time/iteration']

  def reached(row):
    return row['operations'] / row['time/iteration'] / matmul_rate
  first = median(next(iter(rows)), rate)
  lines = []
  for name in rows:
    lines.append([name, *(f'{median(name, lambda r, p=p: r[f"time/{p}"]):.2f}' for p in PHASES),
                  f'{100 * median(name, outside):.1f} %',
                  f'{100 * median(name, lambda r: r["time/wait"] / r["time/decode"]):.1f} %',
                  f'{median(name, rate):.0f}', f'{median(name, rate) / first:.2f}x',
                  f'{100 * median(name, reached):.1f} %'])
  return metrics.table(['way', *(f'{p}, s' for p in PHASES), 'outside', 'wait / decode',
                        'tokens/s', 'against A', 'of the matmul rate'], lines)


if __name__ == '__main__':
  main()
