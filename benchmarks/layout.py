# SPDX-License-Identifier: Apache-2.0
"""The update of one real iteration, its rows laid out in four ways: positions and seconds.

    python benchmarks/layout.py --config configs/smollm2.py
    python benchmarks/layout.py --config configs/tiny.py

One iteration is played with the config; its rows are then learned from again and again, the ways
taking turns, each from the same weights. The first turn compiles and is left out. All ways compute
the same gradient: the norms are printed to show it.
"""

import argparse
import runpy
import statistics
import time

import jax
import jax.numpy as jnp

from absolute_zero_jax import metrics, parts, run

WAYS = {'apart': {}, 'packed': {'pack': True}, 'shared': {'share_prompts': True},
        'packed, shared': {'pack': True, 'share_prompts': True}}


def main() -> None:
  flags = _flags()
  parts.use_compilation_cache()
  path, _, arg = flags.config.partition(':')
  c = runpy.run_path(path)['get_config'](arg or None)
  c.train.pack = c.train.share_prompts = False
  seen, times = {}, {way: [] for way in WAYS}
  with run.Run(c) as current:
    params = jax.tree.map(jnp.copy, current.policy())
    rows = [run.row_of(e) for e in current.iterate().episodes if e.train]
    learners = {way: parts.learner(_changed(c, fields), current.model, current.mesh,
                                   parts.algorithm(c), parts.optimizer(c))
                for way, fields in WAYS.items()}
    current.sampler.release()
  for turn in range(flags.rounds + 1):
    for way, learner in learners.items():
      state = learner.init(jax.tree.map(jnp.copy, params))
      start = time.perf_counter()
      work = learner.prepare(rows, state.params)
      _, found = learner.update(state, work)
      if turn:
        times[way].append(time.perf_counter() - start)
      batches = [b for part in work.parts for b in part]
      seen[way] = (sum(int((b.segments_BT > 0).sum()) for b in batches),
                   sum(b.tokens_BT.size for b in batches), found['grad_norm'])
      print(f'{turn} {way}: {time.perf_counter() - start:.2f} s', flush=True)
  apart = statistics.median(times['apart'])
  print(f'{len(rows)} rows, of {sum(len(r.response_ids) for r in rows)} response tokens')
  print(metrics.table(
      ['layout', 'tokens', 'positions', 's', 'times as fast', 'gradient norm'],
      [[way, str(tokens), str(positions), f'{statistics.median(times[way]):.2f}',
        f'{apart / statistics.median(times[way]):.2f}x', f'{norm:.6g}']
       for way, (tokens, positions, norm) in seen.items()]))


def _changed(c, fields):
  c = c.copy_and_resolve_references()
  c.train.update(fields)
  return c


def _flags():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/smollm2.py',
                      help='config file, arguments after a colon')
  parser.add_argument('--rounds', type=int, default=3, help='measured, of each way')
  return parser.parse_args()


if __name__ == '__main__':
  main()
