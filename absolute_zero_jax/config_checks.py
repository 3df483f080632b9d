# SPDX-License-Identifier: Apache-2.0
"""What a config may hold: known fields, possible values, and no fields that contradict each other.

`config.validate` is the way in. Nothing here touches a device or a file.
"""

from collections.abc import Callable, Sequence
import difflib
import math
from typing import Any

import ml_collections

ConfigDict = ml_collections.ConfigDict


class ConfigError(ValueError):
  """A config value that cannot work; the message names the field, the value and what is allowed."""


def check(c: ConfigDict, reference: ConfigDict) -> None:
  """Raises `ConfigError` for the first field of `c` that cannot work; `reference` has them all."""
  _check_tree(c, reference, '')
  for field, (claim, allowed) in _CHECKS.items():
    value = get_field(c, field)
    try:
      holds = claim(value)
    except TypeError:                    # an entry of a list cannot be compared
      holds = False
    if not holds:
      raise ConfigError(f'{field}={value!r} is impossible; allowed: {allowed}.')
  _check_together(c)


def check_field(c: ConfigDict, field: str) -> None:
  """Raises `ConfigError` unless `field` is the dotted name of a field that `c` has."""
  section, done = c, []
  for part in field.split('.'):
    if not isinstance(section, ConfigDict):
      raise ConfigError(f'{field} is no config field: {".".join(done)} is a value, no section.')
    if part not in section:
      if '.'.join(done) in _OPEN:
        raise ConfigError(f'{field} is not set in this config, so no flag can change it; give the '
                          f'whole section: --config.{".".join(done)}="{{{part!r}: ...}}".')
      raise ConfigError(f'{field} is no config field; allowed in {".".join(done) or "config"}: '
                        f'{", ".join(sorted(section))}.{did_you_mean(part, section)}')
    section = section[part]
    done.append(part)
  if isinstance(section, ConfigDict) and field not in _OPEN:
    raise ConfigError(f'{field} is a section; set one of its fields: {", ".join(sorted(section))}.')


def did_you_mean(name: str, options: Any) -> str:
  """The end of an error message: the option that looks most like `name`, or ''."""
  close = difflib.get_close_matches(name, list(options), n=1)
  return f' Did you mean {close[0]!r}?' if close else ''


def get_field(c: ConfigDict, field: str) -> Any:
  """The value or section with this dotted name."""
  for part in field.split('.'):
    c = c[part]
  return c


def _check_together(c: ConfigDict) -> None:
  """Refuses values that are possible alone and not with each other."""
  axes = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor]
  if axes.count(-1) > 1:
    raise ConfigError(f'mesh={tuple(axes)}: only one axis may be -1 (all devices that are left).')
  if c.model.attention == 'cudnn' and c.model.dtype != 'bfloat16':
    raise ConfigError(f"model.attention='cudnn' computes in 16 bits, not in model.dtype="
                      f"{c.model.dtype!r}: set that to 'bfloat16', or model.attention='xla'.")
  if c.model.attention == 'splash' and c.train.share_prompts:
    raise ConfigError("model.attention='splash' cannot let responses share a prompt: set "
                      "train.share_prompts=False, or model.attention='xla'.")
  if c.algorithm.skip_zero_rows and (c.algorithm.entropy_coef or c.algorithm.kl_coef):
    raise ConfigError('algorithm.skip_zero_rows=True would leave rows out of '
                      f'algorithm.entropy_coef={c.algorithm.entropy_coef} or '
                      f'kl_coef={c.algorithm.kl_coef}: set it to False, or those to 0.')
  if c.algorithm.kl_coef > 0 and c.roles.reference == 'none':
    raise ConfigError("algorithm.kl_coef > 0 needs a reference: set roles.reference='base'.")
  if c.selfplay.train_propose and c.roles.propose == 'base':
    raise ConfigError("roles.propose='base' plays the frozen weights, which cannot be trained: "
                      'set selfplay.train_propose=False.')
  if c.optimizer.name == 'muon' and c.lora.rank:
    raise ConfigError(f"optimizer.name='muon' is for whole matrices, and lora.rank={c.lora.rank} "
                      "trains factors of a change: set optimizer.name='adamw', or lora.rank=0.")
  if c.command == 'pretrain' and any(size not in (1, -1) for size in axes):
    raise ConfigError(f"mesh={tuple(axes)}: command='pretrain' trains on one device; leave its "
                      'axes at 1 or -1.')
  if c.command == 'pretrain' and c.pretrain.questions > c.selfplay.induction_cases:
    raise ConfigError(f'pretrain.questions={c.pretrain.questions} asks for other inputs each, and '
                      f'programs have selfplay.induction_cases={c.selfplay.induction_cases}.')
  if c.executor.name == 'local':
    _check_local(c.executor)
  others = set(c.selfplay.kinds) - {'abduction', 'deduction', 'induction'}
  if c.command == 'seed' and others:
    raise ConfigError("command='seed': seed files hold tasks of abduction, deduction and "
                      f'induction; leave {sorted(others)} out of selfplay.kinds.')
  if c.selfplay.overlap and c.roles.propose != c.roles.solve:
    raise ConfigError(f"selfplay.overlap={c.selfplay.overlap} decodes both roles together, so "
                      f"roles.propose={c.roles.propose!r} and roles.solve={c.roles.solve!r} must "
                      'be the same; or set selfplay.overlap=0.')
  if c.train.off_policy_steps and c.algorithm.importance == 'none':
    raise ConfigError("train.off_policy_steps=1 trains on rows of older weights: set "
                      "algorithm.importance='truncate' or 'mask'; 'none' takes them for new.")
  if c.train.off_policy_steps and c.selfplay.updates > 1:
    raise ConfigError(f'train.off_policy_steps=1 keeps one play waiting, so selfplay.updates='
                      f'{c.selfplay.updates} must be 1.')
  if c.selfplay.mc_use == 'reuse' and c.selfplay.solve_source == 'lagged':
    raise ConfigError("selfplay.mc_use='reuse' solves this iteration's tasks: set "
                      "selfplay.solve_source='fresh'.")
  if c.command == 'selfplay' and c.heldout.every_steps and not c.selfplay.exclude:
    raise ConfigError('heldout.every_steps > 0 scores programs that self-play must not meet: set '
                      "selfplay.exclude='heldout'.")
  longest = c.sampler.max_prompt_tokens + max(c.sampler.max_propose_tokens,
                                              c.sampler.max_solve_tokens)
  if c.train.length_buckets and c.train.length_buckets[-1] < longest:
    raise ConfigError(f'train.length_buckets={tuple(c.train.length_buckets)} must reach {longest}: '
                      'the longest prompt and response that the sampler may make.')
  for kind, batch in c.selfplay.kind_batch.items():
    if not any(':' in name for name in c.selfplay.kinds):      # else `parts.kinds` knows the names
      _check_key('selfplay.kind_batch', kind, c.selfplay.kinds, 'kind that is played')
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
      raise ConfigError(f'selfplay.kind_batch.{kind}={batch!r} must be an integer, 1 or more.')
  for role, weight in c.algorithm.role_weights.items():
    _check_key('algorithm.role_weights', role, ('propose', 'solve'), 'role')
    if not _same_type(weight, 1.0) or weight < 0:
      raise ConfigError(f'algorithm.role_weights.{role}={weight!r} must be a number, 0 or more.')
  for role, estimator in c.algorithm.role_estimators.items():
    _check_key('algorithm.role_estimators', role, ('propose', 'solve'), 'role')
    if not isinstance(estimator, str):
      raise ConfigError(f'algorithm.role_estimators.{role}={estimator!r} must be the name of an '
                        'estimator.')
  if c.roles.solve == 'base':
    raise ConfigError("roles.solve='base' would leave nothing to train; allowed: 'policy'.")


def _check_local(executor: ConfigDict) -> None:
  """As `executor.client` would say later, in the middle of a start."""
  if executor.workers % 2 or executor.workers > 1024:
    raise ConfigError(f'executor.workers={executor.workers} must be even, since half of them have '
                      'another hash seed, and at most 1024; 0 goes by the cores.')
  for name in ('validate_timeout_s', 'score_timeout_s'):
    if not 0.01 <= executor[name] <= 60:
      raise ConfigError(f'executor.{name}={executor[name]} must be 0.01 to 60 seconds.')


def _check_key(section: str, key: Any, allowed: Sequence[str], what: str) -> None:
  if key not in allowed:
    raise ConfigError(f'{section}.{key} is no {what}; allowed: {", ".join(allowed)}.'
                      f'{did_you_mean(str(key), allowed)}')


# Sections whose keys are free: their owners check them.
_OPEN = ('executor.options', 'selfplay.kind_batch', 'selfplay.kind_options', 'reward.intrinsic',
         'algorithm.role_estimators', 'algorithm.role_weights')


def _check_tree(c: ConfigDict, reference: ConfigDict, prefix: str) -> None:
  for key in c:
    name = f'{prefix}{key}'
    if key not in reference:
      raise ConfigError(f'{name} is no config field; allowed here: '
                        f'{", ".join(sorted(reference))}.{did_you_mean(key, reference)}')
    value, default = c[key], reference[key]
    if isinstance(default, ConfigDict):
      if not isinstance(value, ConfigDict):
        raise ConfigError(f'{name}={value!r} must be a section with fields {sorted(default)}.')
      if name not in _OPEN:
        _check_tree(value, default, f'{name}.')
    elif not _same_type(value, default):
      finite = 'finite ' if isinstance(default, float) else ''
      raise ConfigError(f'{name}={value!r} must be of type {finite}{type(default).__name__}, '
                        f'like the default {default!r}.')
  for key in reference:
    if key not in c:
      raise ConfigError(f'{prefix}{key} is missing; start from config.get_config().')


def _same_type(value: Any, default: Any) -> bool:
  if isinstance(default, bool) or isinstance(value, bool):
    return isinstance(value, bool) and isinstance(default, bool)
  if isinstance(default, float):
    return isinstance(value, int | float) and math.isfinite(value)
  if isinstance(default, tuple):
    return isinstance(value, tuple | list)
  return isinstance(value, type(default))


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
  return (lambda x: x in names), 'one of ' + ', '.join(repr(n) for n in names)


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
  return (lambda x: x >= low), f'{low} or more'


def _above(low: float) -> tuple[Callable[[Any], bool], str]:
  return (lambda x: x > low), f'more than {low}'


def _between(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
  return (lambda x: low <= x <= high), f'{low} to {high}'


def _stem(path: Any) -> str:
  """What scores of a part of the test are called (`evaluate.measure`)."""
  return str(path).rpartition('/')[2].removesuffix('.jsonl')


_AXIS = ((lambda x: x == -1 or x >= 1), '1 or more, or -1 for all devices that are left')
_DTYPE = _one_of('float32', 'bfloat16')
_LARGE = 2**20                   # more rows or tokens than one axis of an array can use

_CHECKS = {
    'command': _one_of('selfplay', 'seed', 'pretrain', 'evaluate'),
    'seed': _between(0, 2**31 - 1),
    'model.name': ((lambda x: bool(x.strip())), 'a directory, a .gguf file, an HF id or an alias'),
    'model.dtype': _DTYPE,
    'model.param_dtype': _DTYPE,
    'model.remat': _one_of('none', 'full', 'dots'),
    'model.attention': _one_of('xla', 'cudnn', 'splash'),
    'roles.propose': _one_of('policy', 'base'),
    'roles.solve': _one_of('policy', 'base'),
    'roles.reference': _one_of('none', 'base'),
    'mesh.data': _AXIS,
    'mesh.fsdp': _AXIS,
    'mesh.tensor': _AXIS,
    'selfplay.kinds': ((lambda x: len(x) > 0 and all(isinstance(k, str) for k in x)
                        and len(set(x)) == len(x)), 'one or more distinct names of task kinds'),
    'selfplay.batch': _at_least(1),
    'selfplay.mc_samples': _at_least(1),
    'selfplay.references': _at_least(0),
    'selfplay.induction_cases': _at_least(2),
    'selfplay.solve_source': _one_of('fresh', 'lagged'),
    'selfplay.draw': _one_of('max_new', 'half_new', 'uniform_total', 'step'),
    'selfplay.recent_steps': _at_least(1),
    'selfplay.reference_draw': _one_of('uniform', 'step'),
    'selfplay.buffer_size': _at_least(1),
    'selfplay.eviction': _one_of('ring', 'reservoir'),
    'selfplay.format_rule': _one_of('', 'strict', 'azr'),
    'selfplay.mc_use': _one_of('measure', 'train', 'reuse'),
    'selfplay.solve_samples': _at_least(1),
    'selfplay.probes': _between(0, 8),
    'selfplay.updates': _at_least(1),
    'selfplay.max_alike': _at_least(0),
    'selfplay.overlap': _at_least(0),
    'selfplay.solver_only_steps': _at_least(0),
    'selfplay.keep': _one_of('all', 'non_one', 'non_extremes'),
    'seeding.tasks': _at_least(1),
    'reward.seed': _between(0, 2**31 - 1),
    'seeding.clean': ((lambda x: set(x) <= {'comments', 'globals', 'prints'}),
                      "some of 'comments', 'globals', 'prints'"),
    'seeding.patience': _at_least(1),
    'sampler.slots': _between(1, _LARGE),
    'sampler.min_slots': _between(0, _LARGE),
    'sampler.chunk': _between(1, _LARGE),
    'sampler.cache_block': _between(0, _LARGE),
    'sampler.prompt_block': _between(0, _LARGE),
    'sampler.max_programs': _at_least(0),
    'sampler.cpu_devices': ((lambda x: x >= -1), '0 or more, or -1 for one per core'),
    'sampler.max_prompt_tokens': _between(1, _LARGE),
    'sampler.max_propose_tokens': _between(1, _LARGE),
    'sampler.max_solve_tokens': _between(1, _LARGE),
    'sampler.temperature': _above(0),
    'sampler.top_k': _at_least(0),
    'sampler.top_p': ((lambda x: 0 < x <= 1), 'more than 0, at most 1'),
    'sampler.min_p': ((lambda x: 0 <= x < 1), '0 or more, less than 1'),
    'executor.min_isolation': _one_of('full', 'standard', 'weak'),
    'executor.workers': _at_least(0),
    'executor.validate_timeout_s': _above(0),
    'executor.score_timeout_s': _above(0),
    'executor.memory_mb': _at_least(64),
    'algorithm.old_logprobs': _one_of('auto', 'current', 'recompute', 'sampler'),
    'algorithm.kl_coef': _at_least(0),
    'algorithm.mismatch_bound': _at_least(0),
    'algorithm.epochs': _at_least(1),
    'algorithm.mini_batches': _at_least(1),
    'optimizer.name': _one_of('adamw', 'muon'),
    'optimizer.learning_rate': _at_least(0),
    'optimizer.warmup_steps': _at_least(0),
    'optimizer.schedule': _one_of('constant', 'cosine'),
    'optimizer.b1': ((lambda x: 0 <= x < 1), '0 or more, less than 1'),
    'optimizer.b2': ((lambda x: 0 <= x < 1), '0 or more, less than 1'),
    'optimizer.eps': _above(0),
    'optimizer.weight_decay': _at_least(0),
    'optimizer.clip_norm': _above(0),
    'optimizer.moment_dtype': _DTYPE,
    'optimizer.accumulate_dtype': _DTYPE,
    'optimizer.decay': _one_of('all', 'matrices'),
    'train.steps': _at_least(1),
    'train.minutes': _at_least(0),
    'train.off_policy_steps': _between(0, 1),
    'train.length_buckets': ((lambda x: list(x) == sorted(set(x)) and all(
        isinstance(n, int) and n >= 16 for n in x)),
                             'ascending lengths of at least 16, or ()'),
    'train.micro_batch_tokens': _between(1, 2**30),
    'pretrain.batch': _at_least(1),
    'pretrain.line_tokens': _at_least(64),
    'pretrain.depths': ((lambda x: bool(x) and all(
        isinstance(d, int) and d in range(6) for d in x)),
                        'numbers of statements, 0 to 5'),
    'pretrain.propose': _between(0, 1),
    'pretrain.induce': _between(0, 1),
    'pretrain.questions': _between(1, 6),
    'pretrain.think': _between(0, 1),
    'pretrain.think_prior': ((lambda x: 0 <= x < 1), '0 or more, less than 1'),
    'pretrain.prompt_weight': _between(0, 1),
    'pretrain.references': _at_least(0),
    'pretrain.guess_steps': ((lambda x: list(x) == sorted(set(x)) and all(
        isinstance(n, int) and n >= 1 for n in x)),
                             'ascending steps of at least 1, or ()'),
    'pretrain.guess_count': _at_least(1),
    'heldout.seed': _between(0, 2**31 - 1),
    'heldout.count': _at_least(1),
    'heldout.parts': ((lambda x: bool(x) and len({_stem(p) for p in x}) == len(x) and all(
        p in ('same', 'deeper') or str(p).endswith('.jsonl') for p in x)),
                      "some of 'same', 'deeper', or paths of .jsonl files, each once and by names "
                      'that differ without their folders'),
    'heldout.samples': _at_least(0),
    'heldout.kinds': ((lambda x: bool(x) and len(set(x)) == len(x)
                       and set(x) <= {'deduction', 'abduction', 'induction'}),
                      "some of 'deduction', 'abduction', 'induction'"),
    'heldout.every_steps': _at_least(0),
    'lora.rank': _at_least(0),
    'lora.targets': ((lambda x: len(x) > 0), 'one or more names of projections'),
    'lora.alpha': _above(0),
    'checkpoint.every_steps': _at_least(1),
    'checkpoint.keep': _at_least(1),
    'log.every_steps': _at_least(1),
    'log.samples': _at_least(0),
    'log.flag_words': ((lambda x: all(isinstance(w, str) and w.strip() for w in x)),
                       'words that are not empty'),
}
