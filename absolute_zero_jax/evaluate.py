# SPDX-License-Identifier: Apache-2.0
"""Scores a model on held-out programs: greedy accuracy, mean of samples, pass@n; with intervals.

  seed --test_set--> tasks --selfplay.answer (sampler, executor)--> right or wrong --> results.json

The programs are a pure function of `heldout.seed` (and of `selfplay.induction_cases`, the inputs
that each must take), in two parts: of the depth of pre-training, and deeper. A part may also be a
file of programs that people wrote (`file_tasks`). Answers are checked by the executor as in
self-play, since they are a model's. All numbers per item are kept in items.jsonl, so that two
models can be compared item by item (`compare`).
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import io
import json
import math
import os
from typing import Any

from etils import epath
import jax
import numpy as np

from absolute_zero_jax import checkpoint, grammar, metrics, parts, selfplay
from absolute_zero_jax import config as config_lib
from absolute_zero_jax import sampler as sampler_lib
from absolute_zero_jax.models import hub
from absolute_zero_jax.tasks import identity
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Role, Task

# Of one item: the greedy answer's accuracy; the share of right samples, and whether one is right;
# nats per drawn token; and means over the samples of length, form, and thinking.
QUANTITIES = ('greedy', 'sampled', 'pass', 'entropy', 'tokens', 'thinks', 'formed')
ACCURACIES = ('greedy', 'sampled', 'pass')
_RESAMPLES = 2000


def run(c: config_lib.ConfigDict, workdir: str | os.PathLike, *, stream=None) -> dict[str, Any]:
  """Evaluates `model.name`; writes results.json and items.jsonl to `workdir`, returns the results.

  With `heldout.base` that model is scored too (base_items.jsonl), and the results hold its scores
  and the paired gains over it.

  Raises:
    ValueError: a config that cannot work, a model that cannot be loaded.
  """
  config_lib.validate(c)
  workdir = metrics.absolute(workdir)
  console = metrics.Console(stream)
  parts.use_compilation_cache()
  parts.show_cpu_devices(c)
  prompts = prompts_lib.load(c.selfplay.prompts, c.selfplay.wrapper, c.selfplay.format_rule)
  # What can be wrong without a model is looked at before anything is scored.
  for part in c.heldout.parts:
    if part not in grammar.PARTS:
      file_tasks(part, c.heldout.kinds)
  if c.heldout.base and not c.heldout.base.startswith('random:'):
    hub.resolve(c.heldout.base)
  with contextlib.ExitStack() as stack:
    stack.enter_context(checkpoint.owned(workdir))
    executor = stack.enter_context(contextlib.closing(parts.executor(c)))
    tools = selfplay.Tools(kinds=(), tokenizer=None, sample=None, submit=executor.submit,
                           prompts=prompts, rewards=None)
    items, base = _loaded(c, tools, console), None
    for name in ('results.json', 'base_items.jsonl'):        # of an earlier one, whole till now
      (workdir / name).unlink(missing_ok=True)
    write_items(workdir / 'items.jsonl', items)
    if c.heldout.base:
      other = c.copy_and_resolve_references()
      other.model.name = c.heldout.base
      base = _loaded(other, tools, console)
  results = {'model': c.model.name, 'seed': c.heldout.seed, 'prompts': prompts.hash,
             'test': {'count': c.heldout.count, 'parts': list(c.heldout.parts),
                      'kinds': list(c.heldout.kinds), 'samples': c.heldout.samples,
                      'induction_cases': c.selfplay.induction_cases},
             'scores': summarize(items)}
  console.line(table(results['scores']))
  if base is not None:
    write_items(workdir / 'base_items.jsonl', base)
    results |= {'base': c.heldout.base, 'base_scores': summarize(base),
                'gains': compare(base, items)}
    console.line(f'\n{gains_table(base, items, (c.heldout.base, c.model.name))}')
  metrics.write_atomically(workdir / 'results.json', json.dumps(results, indent=1))
  return results


def _loaded(c, tools, console) -> list[dict[str, Any]]:
  """The items of `model.name`."""
  mesh = parts.mesh(c)
  model, params, source = parts.model(c, jax.random.key(c.seed), mesh)
  tokenizer = parts.tokenizer(c, source)
  tokenizer.check(model.vocab)
  sampler = parts.sampler(c, model, mesh, tokenizer)
  return measure(c, tools._replace(tokenizer=tokenizer), sampler, params, console=console,
                 say=lambda text: console.stamp(f'{c.model.name}: {text}'))


def measure(c: config_lib.ConfigDict, tools: selfplay.Tools, sampler: sampler_lib.Sampler,
            params: Any, *, console: metrics.Console | None = None,
            say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
  """The items of all parts and kinds that `c.heldout` asks for, answered by `params`.

  Draws from `heldout.seed` alone, so models scored alike meet the same tasks and the same noise.
  `console` shows how far the answers are.
  """
  console = console or metrics.Console(io.StringIO())

  def generate(requests, temperature, stop_fn, on_finish):
    key = jax.random.fold_in(jax.random.key(c.heldout.seed), round(1000 * temperature))
    name = f'{part}, ' + ('samples' if temperature else 'greedy answers')
    with console.bar(name, sum(r.samples for r in requests), 'seq') as bar:
      return sampler.generate(params, requests, key, temperature=temperature, stop_fn=stop_fn,
                              on_finish=on_finish,
                              progress=lambda _, finished, __: bar.update(finished - bar.n))

  strict = c.copy_and_resolve_references()
  strict.reward.induction = 'binary'           # whatever training pays
  tools = tools._replace(kinds=parts.kinds(strict, c.heldout.kinds))
  items = []
  for part in c.heldout.parts:
    if part in grammar.PARTS:
      tasks = held_out_tasks(c.heldout.seed, c.heldout.count, part, kinds=tuple(c.heldout.kinds),
                             cases=c.selfplay.induction_cases)
    else:
      tasks, left = _fitting(file_tasks(part, c.heldout.kinds), tools, c.sampler.max_prompt_tokens)
      part = epath.Path(part).stem
      say(f'{part}: {left} items left out, longer than sampler.max_prompt_tokens')
    items += score(tasks, tools, generate, samples=c.heldout.samples,
                   limit=c.sampler.max_solve_tokens, part=part)
    say(f'{part}: {len(tasks)} items answered')
  return items


_test_set = functools.lru_cache(maxsize=8)(grammar.test_set)


def held_out_tasks(seed: int, count: int, part: str, *, kinds: Sequence[str],
                   cases: int = 6) -> tuple[Task, ...]:
  """One task of each kind from each held-out program; kinds in order."""
  examples, out = _test_set(seed, count, part, cases=cases), []
  for kind in kinds:
    many = kind == 'induction'
    for e in examples:
      pairs = tuple(zip(e.inputs, e.outputs))[:cases if many else 1]
      out.append(Task(kind, e.program, pairs, shown=cases // 2 if many else 0, key=e.key))
  return tuple(out)


def excludes(c: config_lib.ConfigDict) -> Callable[[Task], bool]:
  """Says which proposed tasks are refused (`selfplay.exclude`).

  'heldout': programs of the grammar's test side, whatever the seed, and of the files among
  `heldout.parts`.
  """
  if not c.selfplay.exclude:
    return lambda task: False
  files = [part for part in c.heldout.parts if part not in grammar.PARTS]
  known = {grammar.key(task.program) for path in files for task in file_tasks(path, ('deduction',))}
  def heldout(task):
    return grammar.excludes(task) or grammar.key(task.program) in known
  return config_lib.load_object(c.selfplay.exclude, {'heldout': heldout}, 'selfplay.exclude')


def file_tasks(path: epath.PathLike, kinds: Sequence[str]) -> list[Task]:
  """Deductions and abductions of a JSON-lines file in the format of CRUXEval; kinds in order.

  Each line holds 'code' that defines `f`, 'input' (an argument list) and 'output'. Induction needs
  several inputs, so it has no tasks here. Source of the format: Gu et al. (arXiv:2401.03065).

  Raises:
    ValueError: the file is missing, a line is not of this format, or `kinds` leave nothing.
  """
  try:
    lines = epath.Path(path).expanduser().read_text().split('\n')
    records = [json.loads(x) for x in lines if x.strip()]
    read = [(r['code'], r['input'], r['output']) for r in records]
    if not all(isinstance(text, str) for texts in read for text in texts):
      raise TypeError('a field is no text')
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f'heldout.parts names {str(path)!r}, which cannot be read: {e!r}. Give '
                     "'same', 'deeper', or a file whose lines hold JSON with 'code', 'input' and "
                     "'output'.") from e
  kinds = [kind for kind in kinds if kind != 'induction']
  if not read or not kinds:
    raise ValueError(f'{str(path)!r} holds no deduction or abduction for heldout.kinds={kinds}.')
  return [Task(kind, code, ((given, output),),
               key=identity.key('program', code, (given,)))
          for kind in kinds for code, given, output in read]


def score(tasks: Sequence[Task], tools: selfplay.Tools, generate: Callable[..., Any], *,
          samples: int, limit: int, part: str = 'same') -> list[dict[str, Any]]:
  """One record per task, see `QUANTITIES`; without samples, of the greedy answer alone.

  Args:
    generate: `(requests, temperature, stop_fn, on_finish)` -> samples of each request.
    samples: answers at temperature 1, beside the greedy one.
    limit: tokens of an answer.
  """
  greedy = _answers(tasks, 1, 0.0, tools, generate, limit)
  sampled = _answers(tasks, samples, 1.0, tools, generate, limit) if samples else greedy
  out = []
  for task, (first,), drawn in zip(tasks, greedy, sampled):
    out.append({
        'part': part, 'kind': task.kind, 'key': task.key,
        'greedy': first.accuracy if first.well_formed else 0.0,
        'tokens': float(np.mean([len(a.turn.response_ids) for a in drawn])),
        'formed': float(np.mean([a.well_formed for a in drawn])),
        'thinks': float(np.mean([_thinks(a, tools.prompts) for a in drawn]))})
    if samples:
      right = sum(a.well_formed and a.accuracy == 1 for a in drawn)
      logprobs = [x for a in drawn for x in a.turn.model_logprobs]
      # The mean of -log p over drawn tokens is an unbiased estimate of the entropy per token.
      out[-1] |= {'sampled': right / samples, f'pass@{samples}': pass_at(samples, right, samples),
                  'right': right, 'entropy': -float(np.mean(logprobs))}
  return out


def summarize(items: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
  """{'part/kind': {quantity: [mean, low, high]}} with bootstrap 95 % intervals over programs.

  'part/mean' is the mean over the kinds; a program's items of all kinds are resampled together.
  """
  return {name: {k: interval(v) for k, v in columns.items()}
          for name, columns in _columns(items).items()}


def compare(before: Sequence[dict[str, Any]],
            after: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
  """`summarize` of the paired differences after - before.

  Raises:
    ValueError: the items are not the same, in the same order.
  """
  names = [[(i['part'], i['kind'], i['key']) for i in items] for items in (before, after)]
  if names[0] != names[1]:
    raise ValueError('items differ; evaluate both models with the same heldout.* fields.')
  old, new = _columns(before), _columns(after)
  return {name: {k: interval(new[name][k] - v) for k, v in columns.items() if k in new[name]}
          for name, columns in old.items()}


def interval(values: np.ndarray, level: float = 0.95) -> list[float]:
  """[mean, low, high]: percentiles of the means of resamples; the same in every call."""
  values = np.asarray(values, np.float64)
  rng = np.random.default_rng(0)
  draws = rng.integers(len(values), size=(_RESAMPLES, len(values)), dtype=np.int32)
  means = values[draws].mean(axis=1)
  low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
  return [round(float(x), 5) for x in (values.mean(), low, high)]


def pass_at(n: int, right: int, k: int) -> float:
  """Chance that k of n answers, drawn without replacement, hold a right one.

  Raises ValueError unless 1 <= k <= n and 0 <= right <= n.

  Source: Chen et al. (arXiv:2107.03374), eq. 1.
  """
  if not 0 <= right <= n or not 1 <= k <= n:
    raise ValueError(f'pass@{k} of {n} answers, {right} right: needs 1 <= k <= n, right <= n.')
  return 1 - math.comb(n - right, k) / math.comb(n, k)


def table(scores: dict[str, dict[str, list[float]]]) -> str:
  """The results for people: percentages with half the width of their intervals, and plain means."""
  names = list(next(iter(scores.values())))
  def cell(name, x):
    if name in ('entropy', 'tokens'):
      return f'{x[0]:.3g}'
    return f'{100 * x[0]:.1f} ±{50 * (x[2] - x[1]):.1f}'
  return metrics.table(['part/kind', *names], [
      [row, *(cell(name, x) for name, x in s.items())] for row, s in scores.items()])


def gains_table(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]],
                names: Sequence[str] = ('before', 'after')) -> str:
  """Both scores in percent, and their paired difference with its 95 % interval."""
  old, new = summarize(before), summarize(after)
  rows = []
  for part, changes in compare(before, after).items():
    for name in (n for n in changes if n.partition('@')[0] in ACCURACIES):
      mean, low, high = (100 * x for x in changes[name])
      rows.append([f'{part} {name}', *(f'{100 * s[part][name][0]:.1f}' for s in (old, new)),
                   f'{mean:+.1f}', f'{low:+.1f} to {high:+.1f}'])
  return metrics.table(['held out, %', *names, 'change', '95 % interval'], rows)


def line(scores: dict[str, dict[str, list[float]]]) -> str:
  """The means over the kinds on one line."""
  return '; '.join(
      f'{row.removesuffix("/mean")} ' + ', '.join(
          f'{name} {100 * x[0]:.1f} %' for name, x in s.items()
          if name.partition('@')[0] in ACCURACIES)
      for row, s in scores.items() if row.endswith('/mean'))


def scalars(scores: dict[str, dict[str, list[float]]]) -> dict[str, float]:
  """'heldout/PART/KIND/QUANTITY', with the ends of its interval under '..._low' and '..._high'."""
  return {f'heldout/{row}/{name}{end}': x for row, s in scores.items() for name, values in s.items()
          for end, x in zip(('', '_low', '_high'), values)}


def write_items(path: epath.PathLike, items: Sequence[dict[str, Any]]) -> None:
  """One line of JSON per item."""
  metrics.write_atomically(path, '\n'.join(map(json.dumps, items)) + '\n')


def read_items(path: epath.PathLike) -> list[dict[str, Any]]:
  """What `write_items` wrote."""
  return [json.loads(text) for text in epath.Path(path).read_text().splitlines()]


def _fitting(tasks: Sequence[Task], tools, limit: int) -> tuple[list[Task], int]:
  """The tasks whose programs fit the prompt in every kind, and how many do not."""
  kinds = {k.name: k for k in tools.kinds}
  long = {t.key for t in tasks if len(tools.tokenizer.encode(
      kinds[t.kind].solve_prompt(t, tools.prompts))) > limit}
  kept = [t for t in tasks if t.key not in long]
  if not kept:
    raise ValueError(f'no program of {len(long)} fits sampler.max_prompt_tokens={limit}; raise it.')
  return kept, len(tasks) - len(kept)


def _answers(tasks, count, temperature, tools, generate, limit):
  def sample(role, prompts, counts, stop_fn, on_finish):
    assert role == Role.SOLVE
    requests = [sampler_lib.Request(prompt_ids=ids, samples=n, max_new_tokens=limit)
                for ids, n in zip(prompts, counts, strict=True)]
    return generate(requests, temperature, stop_fn, on_finish)
  # Of the rules, answering reads `deadline_s` alone; those without a default must be named.
  rules = selfplay.Rules(**dict.fromkeys(
      ('batch', 'mc_samples', 'references', 'solve_source', 'draw', 'reference_draw',
       'recent_steps', 'keep', 'refuse_duplicates', 'show_references', 'train_propose', 'mc_use',
       'max_prompt_tokens')))
  return selfplay.answer(tasks, [count] * len(tasks), 'heldout', tools._replace(sample=sample),
                         rules, timer=metrics.Timer())


def _columns(items) -> dict[str, dict[str, np.ndarray]]:
  """{'part/kind' or 'part/mean': {quantity: one number per program}}."""
  if not items:
    raise ValueError('there are no items; score some tasks first.')
  quantities = [k for k in items[0] if k.partition('@')[0] in QUANTITIES]
  out = {}
  for part in dict.fromkeys(i['part'] for i in items):
    mine = [i for i in items if i['part'] == part]
    kinds = list(dict.fromkeys(i['kind'] for i in mine))
    for kind in kinds:
      out[f'{part}/{kind}'] = {k: np.array([i[k] for i in mine if i['kind'] == kind])
                               for k in quantities}
    out[f'{part}/mean'] = {k: np.mean([out[f'{part}/{kind}'][k] for kind in kinds], axis=0)
                           for k in quantities}
  return out


def _thinks(attempt, prompts) -> bool:
  """Whether anything stands before the answer's mark; sets without one tell nothing (False)."""
  mark = prompts.formats.get(f'solve_{attempt.task.kind}')
  if mark is None or not mark.after:
    return False
  whole = prompts.prefix(Role.SOLVE, attempt.task.kind) + attempt.turn.text
  return bool(whole.partition(mark.after)[0].strip())
