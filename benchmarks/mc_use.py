# SPDX-License-Identifier: Apache-2.0
"""Reward per generated token: Monte-Carlo answers thrown away, trained on too, or reused.

    python benchmarks/mc_use.py --config configs/tiny.py --tokens 2000000 --seeds 0,1,2
    python benchmarks/mc_use.py --config configs/tiny.py --quick         runs, measures nothing

Every run starts from the same weights and plays until it has generated `--tokens` tokens, proposals
and answers of all kinds together. Before and after, the policy answers the same probe: tasks that
the starting policy proposed, `--samples` answers each at the config's temperature, drawn alike. The
figure is the gain in mean reward (and accuracy) on the probe per million generated tokens. The uses
take turns, seed by seed; `--set selfplay.batch=16` changes any other field of the config.
"""

import argparse
import ast
import contextlib
import json
import runpy
import statistics

import numpy as np

from absolute_zero_jax import metrics, parts, run, selfplay

USES = ('measure', 'train', 'reuse')
_ROUNDS = 20      # of proposals for the probe


def main() -> None:
  flags = _flags()
  parts.use_compilation_cache()
  results, probe = {use: [] for use in flags.uses}, []
  for seed in flags.seeds:
    for use in flags.uses:
      with run.Run(_config(flags, seed, use)) as current:
        probe = probe or _propose(current, flags.probe)
        results[use].append(_measure(current, probe, flags))
      print(json.dumps({'use': use, 'seed': seed} | results[use][-1]), flush=True)
  print(f'\n{len(probe)} probe tasks x {flags.samples} answers, {len(flags.seeds)} seeds; means')
  names = list(results[flags.uses[0]][0])
  rows = [[use, *(statistics.fmean(r[name] for r in found) for name in names)]
          for use, found in results.items()]
  print(metrics.table(['use', *names], rows))


def _measure(current: run.Run, probe, flags) -> dict[str, float]:
  """Plays until the tokens are spent; what the probe says before and after."""
  before, tokens, trained, seconds = _score(current, probe, flags.samples), 0.0, 0.0, 0.0
  while tokens < flags.tokens:
    found = current.iterate().metrics
    tokens += found['sampler/tokens']
    trained += found.get('train/tokens', 0.0) * current.c.selfplay.updates
    seconds += found['time/iteration']
  after = _score(current, probe, flags.samples)
  per_million = 1e6 / tokens
  return {'iterations': float(current.step), 'generated': tokens, 'trained_share': trained / tokens,
          'reward': before[0], 'reward_gain': after[0] - before[0],
          'reward_gain_per_million': (after[0] - before[0]) * per_million,
          'accuracy': before[1], 'accuracy_gain': after[1] - before[1],
          'accuracy_gain_per_million': (after[1] - before[1]) * per_million, 'seconds': seconds}


def _propose(current: run.Run, per_kind: int):
  """Distinct valid tasks of the starting policy, up to `per_kind` of each kind."""
  found = {kind.name: {} for kind in current.kinds}
  for number in range(_ROUNDS):
    rng = np.random.default_rng([12345, number])
    for attempt in selfplay.propose(0, current.buffer, current.tools, current.rules, rng,
                                    timer=_no_timer):
      if attempt.task is not None and len(found[attempt.kind.name]) < per_kind:
        found[attempt.kind.name].setdefault(attempt.task.key, attempt.task)
    if all(len(tasks) == per_kind for tasks in found.values()):
      break
  tasks = [task for by_key in found.values() for task in by_key.values()]
  if not tasks:
    raise SystemExit('the policy proposed no valid task to probe with; take another model.')
  return tasks


def _score(current: run.Run, probe, samples: int) -> tuple[float, float]:
  """(mean reward, mean accuracy) of fresh answers to the probe."""
  groups = selfplay.answer(probe, [samples] * len(probe), 'probe', current.tools, current.rules,
                           timer=_no_timer)
  attempts = [a for group in groups for a in group]
  return (statistics.fmean(current.rewards.solve(a)[0] for a in attempts),
          statistics.fmean(a.accuracy for a in attempts))


def _config(flags, seed: int, use: str):
  path, _, arg = flags.config.partition(':')
  c = runpy.run_path(path)['get_config'](arg or None)
  c.update_from_flattened_dict(dict(flags.set))
  c.seed, c.selfplay.mc_use = seed, use
  return c


def _no_timer(phase: str):
  return contextlib.nullcontext()


def _flags():
  def field(text):
    name, _, value = text.partition('=')
    try:
      return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
      return name, value
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, help='config file, arguments after a colon')
  parser.add_argument('--set', type=field, action='append', default=[], help='FIELD=VALUE')
  parser.add_argument('--uses', type=lambda x: x.split(','), default=list(USES))
  parser.add_argument('--seeds', type=lambda x: [int(s) for s in x.split(',')], default=[0])
  parser.add_argument('--tokens', type=float, default=1e6, help='generated tokens per run')
  parser.add_argument('--probe', type=int, default=100, help='probe tasks per kind')
  parser.add_argument('--samples', type=int, default=4, help='answers to each')
  parser.add_argument('--quick', action='store_true', help='two iterations of each, small probe')
  flags = parser.parse_args()
  if flags.quick:
    flags.tokens, flags.probe, flags.samples, flags.seeds = 1, 2, 1, flags.seeds[:1]
  return flags


if __name__ == '__main__':
  main()
