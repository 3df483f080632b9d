# SPDX-License-Identifier: Apache-2.0
"""Where an iteration's time goes: phases in turn, overlapped, with updates one play behind.

  python benchmarks/loop.py                                 # the carried model, two CPU cores
  python benchmarks/loop.py --config configs/smollm2.py --iterations 2

Each way is a run of its own from the same seed; their iterations are interleaved A B C A B C, and
the first one of each, which compiles, is left out. Reported are medians of the seconds per phase,
the share of an iteration outside decoding, waiting for the executor and updating (target 5 %), the
waiting against the decoding (target 10 %), and tokens per second of whole iterations against A.
"""

import argparse
import contextlib
import importlib.util
import statistics

from absolute_zero_jax import metrics, parts, run

_BEHIND = {'train.off_policy_steps': 1, 'algorithm.importance': 'truncate'}
WAYS = {
    'in turn': {'selfplay.overlap': 0},
    'overlapped': {'selfplay.overlap': 2},
    'one play behind': {'selfplay.overlap': 0} | _BEHIND,
    'both': {'selfplay.overlap': 2} | _BEHIND,
}
PHASES = ('decode', 'wait', 'reward', 'update', 'metrics', 'iteration')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/tiny.py')
  parser.add_argument('--iterations', type=int, default=5, help='measured, of each way')
  parser.add_argument('--ways', default=','.join(WAYS), help='comma-separated')
  args = parser.parse_args()
  ways = {name: WAYS[name] for name in args.ways.split(',')}
  parts.use_compilation_cache()
  rows = {name: [] for name in ways}
  with contextlib.ExitStack() as stack:
    runs = {name: stack.enter_context(run.Run(_config(args.config, changes)))
            for name, changes in ways.items()}
    for i in range(args.iterations + 1):
      for name, current in runs.items():
        found = current.iterate().metrics
        print(f'{name} {i}: {found["time/iteration"]:.2f} s, {found["sampler/tokens"]:.0f} tokens',
              flush=True)
        if i:
          rows[name].append(found)
  print(_table(rows))


def _config(path: str, changes: dict):
  spec = importlib.util.spec_from_file_location('benched', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config()
  c.heldout.every_steps = 0
  c.update_from_flattened_dict(changes)
  return c


def _table(rows: dict[str, list[dict[str, float]]]) -> str:
  def median(name, of):
    return statistics.median(of(row) for row in rows[name])

  def rate(row):
    return row['sampler/tokens'] / row['time/iteration']

  def outside(row):
    named = sum(row[f'time/{phase}'] for phase in ('decode', 'wait', 'update'))
    return 1 - named / row['time/iteration']
  first = median(next(iter(rows)), rate)
  lines = []
  for name in rows:
    lines.append([name, *(f'{median(name, lambda r, p=p: r[f"time/{p}"]):.2f}' for p in PHASES),
                  f'{100 * median(name, outside):.1f} %',
                  f'{100 * median(name, lambda r: r["time/wait"] / r["time/decode"]):.1f} %',
                  f'{median(name, rate):.0f}', f'{median(name, rate) / first:.2f}x'])
  return metrics.table(['way', *(f'{p}, s' for p in PHASES), 'outside', 'wait / decode',
                        'tokens/s', 'against A'], lines)


if __name__ == '__main__':
  main()
