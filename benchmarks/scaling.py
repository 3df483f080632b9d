# SPDX-License-Identifier: Apache-2.0
"""Generation speed against batch, context and model size, with the machine's limit drawn in.

    python benchmarks/scaling.py --out scaling.png          needs matplotlib (extra `plot`)

One thing varies at a time around SmolLM2's shape (135M, prompt 64, batch 16); weights are random.
A point is the median of `--rounds` calls, and the limit is that of `generate.py`, measured in the
same process: nothing but the model's matmuls at the same shapes, or reading its weights.
"""

import argparse
import math
import statistics

import generate
import jax

from absolute_zero_jax.models import decoder, loading

SMOLLM2 = ('random:llama,vocab=49152,embed=576,layers=30,heads=9,kv_heads=3,head_dim=64,ffn=1536,'
           'tied=true')
SMALL = ('random:llama,vocab=8192,embed=192,layers=6,heads=3,kv_heads=3,head_dim=64,ffn=512,'
         'tied=true')
MIDDLE = ('random:llama,vocab=32768,embed=384,layers=12,heads=6,kv_heads=3,head_dim=64,ffn=1024,'
          'tied=true')
LARGE = ('random:llama,vocab=49152,embed=960,layers=32,heads=15,kv_heads=5,head_dim=64,ffn=2560,'
         'tied=true')


def _millions(model: str) -> float:
  specs = decoder.param_specs(loading.random_config(model))
  leaves = jax.tree.leaves(specs, is_leaf=lambda x: hasattr(x, 'shape'))
  return sum(math.prod(x.shape) for x in leaves) / 1e6


# What varies -> (place on the axis, model, prompt, batch) of each point.
SWEEPS = {
    'batch': [(B, SMOLLM2, 64, B) for B in (1, 4, 16, 64)],
    'prompt tokens': [(P, SMOLLM2, P, 16) for P in (64, 256, 1024)],
    'parameters, M': [(_millions(m), m, 64, 16) for m in (SMALL, MIDDLE, SMOLLM2, LARGE)]}


def main() -> None:
  flags = _flags()
  rows, known = {}, {}
  for name, points in SWEEPS.items():
    print(f'{name:>16s} {"tokens/s":>9s} {"limit":>9s} {"share":>6s}', flush=True)
    rows[name] = []
    for at, *point in points:
      key = tuple(point)
      known[key] = known.get(key) or _measure(flags, *point)
      rows[name].append((at, *known[key]))
      speed, limit = known[key]
      print(f'{at:16.4g} {speed:9.1f} {limit:9.1f} {speed / limit:6.2f}', flush=True)
  if flags.out:
    _plot(rows, flags.out)


def _measure(flags, model, prompt, B) -> tuple[float, float]:
  """(tokens/s, limit in tokens/s), new tokens over the time of prompts and tokens."""
  given = generate.flags_of([f'--model={model}', f'--prompt={prompt}', f'--new={flags.new}',
                             f'--slots={B}', f'--limit={flags.new}', '--sides=jax'])
  job = {'rows': B, 'prompt': prompt, 'new': [flags.new] * B}
  with generate.Side('jax', given) as side:
    side.ask(job)                                              # compiles
    taken = statistics.median(side.ask(job)['seconds'] for _ in range(flags.rounds))
    limit = side.ask(job | {'limit': True})['seconds']
  return B * flags.new / taken, B * flags.new / limit


def _plot(rows, path) -> None:
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows), 3.4), layout='constrained')
  for axis, (name, points) in zip(axes, rows.items()):
    at, speed, limit = zip(*points)
    axis.loglog(at, limit, 'k--', label='limit')
    axis.loglog(at, speed, 'o-', label='here')
    axis.set_xlabel(name)
    axis.set_xticks(at, [f'{x:.4g}' for x in at])
    axis.minorticks_off()
    axis.set_yticks(speed, [f'{x:,.0f}' for x in speed])
    axis.grid(alpha=0.3)
  axes[0].set_ylabel('new tokens/s')
  axes[0].legend()
  figure.savefig(path, dpi=120)


def _flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  parser.add_argument('--new', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--out', default='', help='a PNG')
  return parser.parse_args()


if __name__ == '__main__':
  main()
