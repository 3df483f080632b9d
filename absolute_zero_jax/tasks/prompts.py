# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: a folder of templates, versioned and hashed, replaceable by a folder of one's own.

A set is a folder with `set.json` and text templates with `$name` fields (`string.Template`):

  propose_<kind>.txt      fields: references; for programs banned and composite (and, for errors,
                          banned_statements); for induction program, input and cases, a number
  solve_<kind>.txt        fields of `task_fields`, and examples
  reference_<kind>.txt    how one reference is shown to the proposer; fields of `task_fields`, index
  solved_<kind>.txt       how one solved example is shown to the solver; fields of `task_fields`
  composite.txt           asks for an f that calls given functions; fields: functions, names
  wrapper_<name>.txt      the page around every prompt; field: task
  examples.json           by kind, pages of worked examples in our own words

`<|response|>` in a template marks where the response begins: what follows it is put into the
prompt as its opening and read back as part of the response. `set.json` says:

  version         raised with every change of meaning
  wrapper         the default wrapper: 'answer', 'boxed', 'none' or a name of one's own
  rule            'strict' or 'azr': the format test of the answer wrapper (`text.think_answer`)
  boxed_retry     true: an answer without answer tags is looked for in a box; still badly formed
  examples        for '<role>_<kind>': how many worked examples stand before the references
  base            another built-in set, whose files and settings stand where this one has none
  formats         for '<role>_<kind>': `stops`, texts that end the response; `opening`, `closing`,
                  text put around the response before it is parsed (e.g. an unwritten fence);
                  `after`, a mark behind which the answer stands, so that thinking may precede it
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import random
import re
import string
from typing import Any

from absolute_zero_jax.tasks import text
from absolute_zero_jax.types import Role, Task

BUILT_IN = pathlib.Path(__file__).with_name('prompts')
MARK = '<|response|>'
_SETTINGS = ('version', 'wrapper', 'rule', 'boxed_retry', 'examples', 'base', 'formats')
WRAPPERS_WITH_TAGS = ('answer', 'boxed')


@dataclasses.dataclass(frozen=True)
class Format:
  """How a response ends and what is put around it before parsing; see the module docstring."""
  stops: tuple[str, ...] = ()
  opening: str = ''
  closing: str = ''
  after: str = ''


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """One folder of templates. Get one with `load`.

  Attributes:
    hash: sha256 over the names and contents of all files and the chosen wrapper and rule; a score
      without it cannot be compared.
    files: template texts by file name, without the suffix.
    shown: for '<role>_<kind>', how many worked examples a prompt shows.
    examples: by kind, pages of worked examples; a prompt takes its examples from one page, so that
      they are alike. They are style, not knowledge: they never enter a buffer.
  """
  name: str
  version: int
  hash: str
  wrapper: str
  rule: str
  shown: dict[str, int]
  formats: dict[str, Format]
  files: dict[str, str]
  examples: dict[str, list[list[Task]]]
  boxed_retry: bool = False

  def render(self, role: Role | str, kind: str, **fields: object) -> str:
    """The whole prompt, wrapper and opened response included.

    A field the template does not mention is ignored; one it mentions and does not get raises
    ValueError. Field values are inserted as they are, `$` in a program is not looked at again.
    """
    body, opening = self._filled(f'{_name(role)}_{kind}', fields)
    return self.wrap(body, opening)

  def wrap(self, page: str, opening: str = '') -> str:
    """A page in the set's wrapper: for kinds that bring their own prompt text."""
    outer = self.files.get(f'wrapper_{self.wrapper}')
    if outer is None:
      return page + opening
    before, outer_opening = self._split(outer)
    return string.Template(before).substitute(task=page.strip('\n')) + outer_opening + opening

  def prefix(self, role: Role | str, kind: str) -> str:
    """What the prompt already wrote of the response."""
    outer = self.files.get(f'wrapper_{self.wrapper}', '')
    return self._split(outer)[1] + self._split(self.files.get(f'{_name(role)}_{kind}', ''))[1]

  def stops(self, role: Role | str, kind: str) -> tuple[str, ...]:
    """Texts that may end the response; they belong to it. () leaves the end to the EOS token."""
    return self._format(role, kind).stops

  def ends(self, role: Role | str, kind: str, response: str) -> bool:
    """Whether a response is whole now that it has come to one of `stops`."""
    return self.wrapper != 'answer' or text.answer_ends(self.prefix(role, kind) + response)

  def stop_at(self, role: Role | str, kind: str, response: str) -> int | None:
    """Characters of the response up to the end of the first stop text, or None: not there yet."""
    ends = [response.find(stop) + len(stop) for stop in self.stops(role, kind) if stop in response]
    return min(ends, default=None)

  def extract(self, role: Role | str, kind: str, response: str,
              finished: bool = False) -> tuple[bool, str]:
    """(whether the response has the demanded form, the answer text that `parse_*` reads).

    Without that form the answer is '' but under the rule 'azr' and with `boxed_retry`: such answers
    earn what the reward says of their form, and still tell whether a task can be solved.

    Args:
      finished: the model ended the response itself (EOS), so a missing stop text is no cut. It
        never makes up for a missing tag or `after` mark; with such a mark only a response that was
        ended is well-formed.
    """
    how = self._format(role, kind)
    if self.wrapper == 'answer':
      well_formed, answer = _tagged_answer(self.prefix(role, kind) + response, self.rule)
      if self.boxed_retry and not answer:
        answer = text.boxed(response) or ''
      return well_formed, answer
    if self.wrapper == 'boxed':
      answer = text.boxed(response)
      return answer is not None, answer or ''
    end = self.stop_at(role, kind, response)
    stopped = end is not None
    if stopped:
      response = response[:end]
      ending = next(s for s in how.stops if response.endswith(s))
      response = response[:-len(ending)]
    response = self.prefix(role, kind) + response
    if how.after:
      _, mark, response = response.rpartition(how.after)
      well_formed = bool(mark) and (stopped or finished)
    else:
      well_formed = stopped or finished or not how.stops
    return well_formed, how.opening + response + how.closing if well_formed else ''

  def references(self, kind: str, tasks: Sequence[Task], variant: int = 0,
                 like: str = '') -> str:
    """The tasks, then examples of the set, each through `reference_<kind>`; see `choose`."""
    shown = [*tasks, *self.choose('propose', kind, variant, like)]
    return self._list(f'reference_{kind}', shown)

  def solve(self, task: Task) -> str:
    """The solver's prompt for a task, after some solved examples if the set wants them.

    Equal tasks get equal prompts, so that answers to one task form a group.
    """
    variant = int(hashlib.sha256(task.key.encode()).hexdigest()[:8], 16)
    solved = self.choose('solve', task.kind, variant, task.program)
    return self.render('solve', task.kind, **task_fields(task),
                       examples=self._list(f'solved_{task.kind}', solved) if solved else '')

  def composite(self, sources: Sequence[str]) -> str:
    """Text that asks for an f that calls these functions (`composite.txt`); '' for none."""
    if not sources:
      return ''
    names = ', '.join(f'g_{i}' for i in range(len(sources)))
    return self._filled('composite', {'functions': '\n\n'.join(sources), 'names': names})[0]

  def choose(self, role: Role | str, kind: str, variant: int, like: str = '') -> list[Task]:
    """The worked examples a prompt shows: one page, shuffled, cut to the set's number.

    Args:
      variant: any integer; decides page and order.
      like: a program; the page with most words in common is taken, and an example with this very
        program is left out, since it could hand over the answer.
    """
    count, pages = self.shown.get(f'{_name(role)}_{kind}', 0), self.examples.get(kind, [])
    if not count or not pages:
      return []
    rng = random.Random(variant)  # the same in every process: integers seed alike
    page = rng.choice(pages)
    if like:
      page = max(pages, key=lambda p: _overlap(like, p))
      page = [e for e in page if e.program.strip() != like.strip()]
    return rng.sample(page, min(count, len(page)))

  def _list(self, file: str, tasks: Sequence[Task]) -> str:
    return ''.join(self._filled(file, {'index': i} | task_fields(task))[0]
                   for i, task in enumerate(tasks, 1))

  def _filled(self, file: str, fields: Mapping[str, object]) -> tuple[str, str]:
    """The template up to its mark, with the fields in it, and the opening behind the mark."""
    body, opening = self._split(self._file(file))
    try:
      return string.Template(body).substitute(fields), opening
    except KeyError as error:
      raise ValueError(f'prompt set {self.name!r}: {file}.txt mentions ${error.args[0]}; its '
                       f'fields are {", ".join(sorted(fields))}.') from error

  def _format(self, role: Role | str, kind: str) -> Format:
    if self.wrapper in WRAPPERS_WITH_TAGS:
      # The reference leaves the end to the EOS token.
      return Format((text.ANSWER_CLOSE,) if (self.wrapper, self.rule) == ('answer', 'strict')
                    else ())
    return self.formats.get(f'{_name(role)}_{kind}', Format())

  def _file(self, name: str) -> str:
    if name not in self.files:
      raise ValueError(f'prompt set {self.name!r} has no {name}.txt; it has {sorted(self.files)}.')
    return self.files[name]

  @staticmethod
  def _split(template: str) -> tuple[str, str]:
    before, _, opening = template.partition(MARK)
    return before, opening


def load(name: str | os.PathLike, wrapper: str = '', rule: str = '') -> PromptSet:
  """The built-in set of that name, the set in a directory, or the object `module:name`.

  Args:
    wrapper: another wrapper than the set's own: 'answer', 'boxed', 'none', or the name of a
      `wrapper_<name>.txt` in the folder.
    rule: another format test than the set's own: 'strict' or 'azr'.

  Raises:
    ValueError: no such set, no such wrapper, a malformed `set.json` or template, or either
      argument for an object, whose own code decides both.
  """
  name = os.path.expanduser(os.fspath(name))
  if not os.path.isdir(name) and name.count(':') == 1:
    if wrapper or rule:
      raise ValueError(f'selfplay.prompts={name!r} has its own: selfplay.wrapper={wrapper!r} and '
                       f"selfplay.format_rule={rule!r} must be ''.")
    return _of_module(*name.split(':'))
  return _load(name, wrapper, rule)


def _of_module(module: str, attribute: str) -> PromptSet:
  try:
    made = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(f'prompts {module}:{attribute} cannot be loaded: {error}.') from error
  made = made() if callable(made) else made
  missing = [name for name in ('hash', 'extract', 'stops', 'ends') if not hasattr(made, name)]
  if missing:
    raise ValueError(f'selfplay.prompts={module}:{attribute} gave {made!r:.80}, which lacks '
                     f'{missing}; see tasks.prompts.PromptSet.')
  return made


def _load(name: str, wrapper: str, rule: str) -> PromptSet:
  built_in = sorted(p.name for p in BUILT_IN.iterdir() if (p / 'set.json').is_file())
  folder = BUILT_IN / name if name in built_in else pathlib.Path(name)
  if not (folder / 'set.json').is_file():
    raise ValueError(f'selfplay.prompts={name!r} is neither one of {built_in} nor a folder with '
                     'set.json.')
  raw = _texts(folder)
  try:
    settings = json.loads(raw['set.json'])
    _check_settings(settings, built_in)
    if 'base' in settings:
      below = _texts(BUILT_IN / settings['base'])
      settings = json.loads(below['set.json']) | settings
      raw = below | {'base.json': below['set.json']} | raw
    formats = {k: Format(tuple(v.get('stops', ())), v.get('opening', ''), v.get('closing', ''),
                         v.get('after', ''))
               for k, v in settings.get('formats', {}).items()}
    shown, version = dict(settings.get('examples', {})), int(settings['version'])
    examples = {kind: [[_example(kind, e) for e in page] for page in pages]
                for kind, pages in json.loads(raw.get('examples.json', '{}')).items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{folder}: set.json or examples.json is malformed ({error!r}).') from error
  wrapper = wrapper or settings.get('wrapper', 'none')
  files = {name.removesuffix('.txt'): body for name, body in raw.items() if name.endswith('.txt')}
  if wrapper != 'none' and f'wrapper_{wrapper}' not in files:
    known = sorted(f[8:] for f in files if f.startswith('wrapper_'))
    raise ValueError(f'selfplay.wrapper={wrapper!r} must be none or one of those that the prompt '
                     f'set {name!r} has: {known}.')
  rule = rule or settings.get('rule', 'strict')
  if rule not in ('strict', 'azr'):
    raise ValueError(f"{folder}/set.json: rule={rule!r} must be 'strict' or 'azr'.")
  for file, body in files.items():
    _check(f'{folder}/{file}.txt', body)
    fields = set(string.Template(body).get_identifiers())
    if file.startswith('wrapper_') and fields != {'task'}:
      raise ValueError(f'{folder}/{file}.txt mentions {sorted(fields)}; a wrapper holds $task, the '
                       'text of the task, and no other field.')
  digest = hashlib.sha256(json.dumps([wrapper, rule, sorted(raw.items())]).encode()).hexdigest()
  return PromptSet(folder.name, version, digest, wrapper, rule, shown, formats, files, examples,
                   bool(settings.get('boxed_retry')))


def _check_settings(settings: dict, built_in: Sequence[str]) -> None:
  """Raises ValueError for names that mean nothing: they would be passed over in silence."""
  def refuse(where, names, known):
    unknown = set(names) - set(known)
    if unknown:
      raise ValueError(f'{where}{sorted(unknown)} unknown; allowed: {sorted(known)}')
  refuse('', settings, _SETTINGS)
  if settings.get('base', 'tiny') not in built_in:
    raise ValueError(f'base={settings["base"]!r} must be one of {built_in}')
  for page, values in settings.get('formats', {}).items():
    if not page.startswith(('propose_', 'solve_')):
      raise ValueError(f'formats: {page!r} must be propose_KIND or solve_KIND')
    refuse(f'formats.{page}: ', values, ('stops', 'opening', 'closing', 'after'))
    stops = values.get('stops', [])
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
      raise ValueError(f'formats.{page}: stops={stops!r} must be a list of texts')


def check(prompts: PromptSet, kinds: Sequence[Any], *, references: int = 1, propose: bool = True,
          solve: bool = True) -> None:
  """Raises ValueError for a template that `kinds` will ask for and that is missing or wrong.

  Every kind writes its prompts about its seeds once.

  Args:
    kinds: built-in ones; others may bring their own pages.
    references: how many a proposer is shown.
    propose, solve: which prompts will be asked for.
  """
  for kind in kinds:
    seeds = kind.seeds()
    if propose:
      kind.propose_prompt(seeds[:max(references, kind.min_references)], prompts)
    if solve:
      kind.solve_prompt(seeds[0], prompts)


def task_fields(task: Task) -> dict[str, str]:
  """The template fields a task fills: program, input, output, message, and lists of its cases.

  `comment` is the message as comment lines, `quoted` as a block. `calls` lists all inputs as calls
  of f; `cases` (`f(x) == y`) and `blocks` (fenced) list the shown pairs.
  """
  shown = task.cases[:task.shown] if task.shown else task.cases
  given, output = task.cases[0] if task.cases else ('', '')
  return {
      'program': task.program, 'input': given, 'output': output, 'message': task.message,
      'quoted': text.fenced('message', task.message),
      'comment': '\n'.join(f'# {line}'.rstrip() for line in task.message.split('\n')),
      'calls': ', '.join(f'f({i})' for i, _ in task.cases),
      'cases': '\n'.join(f'f({i}) == {o}' for i, o in shown),
      'blocks': '\n'.join(f'{text.fenced("input", i)}\n{text.fenced("output", o)}'
                          for i, o in shown)}


def _tagged_answer(response: str, rule: str) -> tuple[bool, str]:
  if rule == 'azr':
    _, opened, rest = response.rpartition(text.ANSWER_OPEN)
    answer = rest.partition(text.ANSWER_CLOSE)[0] if opened else ''
    return text.is_well_formed_azr(response), answer.strip()
  answer = text.think_answer(response)
  return answer is not None, answer or ''


def _example(kind: str, row: dict) -> Task:
  cases = tuple((i, o) for i, o in row['cases'])
  return Task(kind, row['program'], cases, row.get('message', ''), row.get('shown', 0))


def _texts(folder: pathlib.Path) -> dict[str, str]:
  """Contents of a set's files by name."""
  texts = {}
  for path in sorted(folder.iterdir()):
    if path.suffix in ('.txt', '.json'):
      try:
        texts[path.name] = path.read_text(encoding='utf-8')
      except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error}); save it so.') from error
  return texts


def _check(where: str, body: str) -> None:
  before, *rest = body.split(MARK)
  if len(rest) > 1 or '$' in ''.join(rest):
    raise ValueError(f'{where}: at most one {MARK}, and no $field after it.')
  for found in string.Template.pattern.finditer(before):
    if found['invalid'] is not None:
      raise ValueError(f'{where}: a lone $ at character {found.start()}; write $$ for the sign.')


def _overlap(source: str, page: Sequence[Task]) -> float:
  words = set(re.findall(r'\w+', source))
  theirs = [set(re.findall(r'\w+', example.program)) for example in page]
  return sum(len(words & t) / len(words | t) for t in theirs) / len(theirs) if words else 0.0


def _name(role: Role | str) -> str:
  return role.value if isinstance(role, Role) else role
