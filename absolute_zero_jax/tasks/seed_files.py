# SPDX-License-Identifier: Apache-2.0
"""Seed buffers in the reference's jsonl schema: read as proposals still to be validated, written.

Two schemas. Pairs: snippet, input, output, imports, original_snippet, composite_functions;
induction: snippet, inputs, outputs, message, imports. Stored outputs are not trusted (some are cut
at 400 characters, some do not reproduce): the executor computes them anew.
"""

from collections.abc import Sequence
import json

from etils import epath

from absolute_zero_jax.tasks import program, text
from absolute_zero_jax.types import Task

PAIR_KINDS = ('abduction', 'deduction', 'error')


def read(path: epath.PathLike) -> list[program.Proposal]:
  """One proposal a row, in order, exact repetitions left out.

  Validate each with the kind of your choice (`validation_jobs`, `to_task`); rows of pairs serve
  deduction and abduction alike. An input that is no list of literals is handed on as it stands, so
  that the executor's verdict says so.

  Raises:
    ValueError: a line is no JSON object of either schema; the message names the line.
  """
  found: dict[tuple, program.Proposal] = {}
  for number, line in enumerate(epath.Path(path).read_text(encoding='utf-8').split('\n'), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      given = row['inputs'] if 'inputs' in row else [row['input']]
      source = program.with_imports(row['snippet'], row.get('imports', ()))
      inputs = tuple(_read_input(source, i) for i in given)
      proposal = program.Proposal(source, inputs, row.get('message', ''))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{path}:{number} is no seed row ({error!r}); wanted are the fields snippet '
                       'and input, or snippet, inputs and message.') from error
    found.setdefault((source, inputs, proposal.message), proposal)
  return list(found.values())


def kinds_of(proposal: program.Proposal) -> tuple[str, ...]:
  """The kinds a row can become: induction with a message or several inputs, else those of pairs."""
  return ('induction',) if proposal.message or len(proposal.inputs) > 1 else PAIR_KINDS


def _read_input(source: str, given: str) -> str:
  if given.lstrip().startswith('f('):        # the reference calls f(<input>), so this is f(f(..))
    return given
  arguments = text.arguments(given)
  return (arguments and text.positional(source, arguments)) or given


def write(path: epath.PathLike, tasks: Sequence[Task]) -> None:
  """Writes tasks of one schema, all pairs or all induction; the whole file or nothing.

  Raises:
    ValueError: both schemas in one file.
  """
  if len({task.kind in PAIR_KINDS for task in tasks}) > 1:
    raise ValueError(f'{path}: pairs and induction tasks go to separate files.')
  rows = [_pair(t) if t.kind in PAIR_KINDS else _induction(t) for t in tasks]
  lines = [json.dumps(row, ensure_ascii=True) + '\n' for row in rows]
  path = epath.Path(path)
  temporary = path.parent / f'.{path.name}.tmp'
  temporary.write_text(''.join(lines), encoding='utf-8')
  temporary.replace(path)


def _pair(task: Task) -> dict:
  return {'snippet': task.program, 'input': task.input, 'output': task.output,
          'imports': program.imports(task.program), 'original_snippet': task.own_program,
          'composite_functions': list(task.extra.get('composite_functions', ()))}


def _induction(task: Task) -> dict:
  return {'snippet': task.program, 'inputs': [i for i, _ in task.cases],
          'outputs': [o for _, o in task.cases], 'message': task.message,
          'imports': program.imports(task.program)}
