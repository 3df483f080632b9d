# SPDX-License-Identifier: Apache-2.0
"""Where the names of a config become the objects of a run; each function reads its own sections."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import inspect
import math
import os
from typing import Any
import warnings

import jax
import jax.numpy as jnp

from absolute_zero_jax import (
  advantages,
  config_checks,
  controls,
  lora,
  reinforce,
  sharding,
  tasks,
)
from absolute_zero_jax import config as config_lib
from absolute_zero_jax import executor as executor_lib
from absolute_zero_jax import learner as learner_lib
from absolute_zero_jax import rewards as rewards_lib
from absolute_zero_jax import sampler as sampler_lib
from absolute_zero_jax import tokenizer as tokenizer_lib
from absolute_zero_jax.executor import client
from absolute_zero_jax.models import decoder, hub, loading
from absolute_zero_jax.tasks import composite, program

ConfigDict = config_lib.ConfigDict
# What fields of `config.sampler` mean where they are 0: on CPUs, where they were measured, and on
# accelerators, where they were chosen so that a few dozen programs suffice.
SAMPLER_SIZES = {'min_slots': (1, 64), 'cache_block': (64, 512), 'prompt_block': (32, 256),
                 'max_programs': (32, 12)}

# Fields of `config.algorithm` that an algorithm is called with as they stand.
_ALGORITHM = ('pass_k', 'whiten_by', 'whiten_count', 'aggregation', 'aggregation_rows', 'clip_low',
              'clip_high', 'dual_clip', 'entropy_coef', 'kl_coef', 'kl_kind', 'kl_in',
              'importance', 'importance_cap')


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk (`hub.cache_home`): the next start need not compile them."""
  jax.config.update('jax_compilation_cache_dir', str(hub.cache_home() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def show_cpu_devices(c: ConfigDict) -> None:
  """Has JAX split the CPU as `sampler.cpu_devices` says; for programs that begin with this config.

  Without effect once JAX has looked for devices (orbax makes it), or where the environment says how
  many there are.
  """
  chosen = (jax.config.jax_num_cpu_devices >= 0
            or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', ''))
  if _cpu_devices(c) > 1 and not chosen:
    with contextlib.suppress(RuntimeError):        # JAX has looked
      jax.config.update('jax_num_cpu_devices', _cpu_devices(c))


def kinds(c: ConfigDict, names: Sequence[str] = ()) -> list[tasks.Kind]:
  """The task kinds, each made with those of `selfplay.kind_options` that it knows.

  `names` replaces `selfplay.kinds`. Raises ConfigError for options of a wrong name or type, and for
  kinds of one name.
  """
  played, names = not names, names or c.selfplay.kinds
  set_for = {'cases': 'selfplay.induction_cases', 'score': 'reward.induction'}
  options = {'probes': c.selfplay.probes} | c.selfplay.kind_options.to_dict()
  for name in set_for.keys() & options.keys():
    raise config_lib.ConfigError(f'selfplay.kind_options.{name}={options[name]!r}: set '
                                 f'{set_for[name]} instead.')
  built_in = [tasks.KINDS[name] for name in names if name in tasks.KINDS]
  _check_types(options, built_in, 'selfplay.kind_options', skip=('rules', 'composites'))
  rules = _section(options, 'rules', tasks.Rules)
  if c.command == 'seed' and c.seeding.clean:
    rules['clean'] = c.seeding.clean
  composites = _section(options, 'composites', composite.Schedule)
  try:
    options |= {'rules': tasks.Rules(**rules), 'composites': composite.Schedule(**composites)}
  except TypeError as e:
    raise config_lib.ConfigError(f'selfplay.kind_options: {e}; the fields are those of tasks.Rules '
                                 'and tasks.composite.Schedule.') from e
  except ValueError as e:
    raise config_lib.ConfigError(f'selfplay.kind_options.{e}') from e

  def get(name):
    try:
      return tasks.get(name, c.selfplay.kinds, cases=c.selfplay.induction_cases,
                       score=c.reward.induction, **options)
    except ValueError as e:
      unknown = [n for n in (name, *c.selfplay.kinds) if ':' not in n and n not in tasks.KINDS]
      hint = config_checks.did_you_mean(unknown[0], tasks.KINDS) if unknown else ''
      raise config_lib.ConfigError(f'selfplay.kinds, kind_options: {e}{hint}') from e
  made = [get(name) for name in names]
  own_names = [kind.name for kind in made]
  if len(set(own_names)) < len(made):
    raise config_lib.ConfigError(f'selfplay.kinds={tuple(names)} have the names {own_names}; each '
                                 'kind needs a `name` of its own.')
  unknown = set(c.selfplay.kind_batch) - set(own_names)
  if played and unknown:
    raise config_lib.ConfigError(f'selfplay.kind_batch: {list(unknown)} are no names of kinds that '
                                 f'are played; allowed: {own_names}.')
  return made


def _section(options, name, owner):
  values = options.get(name, {})
  if not isinstance(values, dict):
    raise config_lib.ConfigError(f'selfplay.kind_options.{name}={values!r} must be a section with '
                                 f'fields of {list(inspect.signature(owner).parameters)}.')
  if values.get('banned_words') == 'azr':
    values['banned_words'] = program.AZR_BANNED_WORDS
  _check_types(values, [owner], f'selfplay.kind_options.{name}')
  return values


def _check_types(values, owners, field, skip=()):
  """Raises ConfigError for a value of another type than the owners' default; tuples hold text."""
  for key in values:
    if not isinstance(key, str):
      raise config_lib.ConfigError(f'{field} has the key {key!r}; keys are names of options.')
  for owner in owners:
    for name, parameter in inspect.signature(owner).parameters.items():
      default = parameter.default
      if name not in values or name in skip or default in (None, parameter.empty):
        continue
      value = values[name]
      wanted = {float: (int, float), tuple: (tuple, list)}.get(type(default), type(default))
      right = isinstance(value, wanted) and isinstance(value, bool) == isinstance(default, bool)
      if right and isinstance(default, tuple):
        right = all(isinstance(part, str) for part in value)
      if not right:
        kind = 'a tuple of texts' if isinstance(default, tuple) else type(default).__name__
        raise config_lib.ConfigError(
            f'{field}.{name}={value!r} must be {kind}, like the default {default!r}.')


def rewards(c: ConfigDict) -> Any:
  """What attempts are worth."""
  make = config_lib.load_object(c.reward.name, controls.REWARDS, 'reward.name')
  fields = {k: v for k, v in c.reward.to_dict().items() if k != 'name'}
  return rewards_lib.Checked(
      _made('reward.name', c.reward.name, make, ('propose', 'solve'), **fields), c.reward.name)


def algorithm(c: ConfigDict) -> Any:
  """Advantages and losses; solvers whose prompts have several answers get prompt baselines."""
  estimators = c.algorithm.role_estimators.to_dict()
  groups = (c.selfplay.mc_use != 'measure' and c.selfplay.mc_samples > 1
            or c.selfplay.solve_samples > 1)
  if groups and c.algorithm.name == 'trr_plus_plus':
    estimators = {'solve': 'trr_prompt'} | estimators
  for role, played, several, change in (
      ('solve', True, groups, "selfplay.mc_use='reuse' or 'train' with mc_samples above 1, or "
                              'selfplay.solve_samples above 1'),
      ('propose', c.selfplay.train_propose, False, 'selfplay.train_propose=False')):
    name = estimators.get(role, c.algorithm.name)
    if played and not several and name in advantages.AMONG_ANSWERS:
      field = 'name' if role not in estimators else f'role_estimators.{role}'
      raise config_lib.ConfigError(
          f'algorithm.{field}={name!r} compares the answers to one prompt, and here each prompt to '
          f'{role} gets one, so that nothing would be learnt: set {change}, or '
          f"algorithm.role_estimators={{'{role}': 'trr_plus_plus'}}.")
  answers = max(c.selfplay.solve_samples,
                c.selfplay.mc_samples if c.selfplay.mc_use != 'measure' else 1)
  if (estimators.get('solve', c.algorithm.name) == 'pass_at_k'
      and c.algorithm.pass_k >= answers):
    raise config_lib.ConfigError(
        f'algorithm.pass_k={c.algorithm.pass_k} must be below the {answers} answers that a prompt '
        'gets (selfplay.solve_samples, or mc_samples where mc_use trains them): the best of all is '
        'one number, and nothing would be learnt.')
  made = _made(
      'algorithm.name', c.algorithm.name, functools.partial(reinforce.get, c.algorithm.name),
      ('advantages', 'weights', 'loss', 'needs_old', 'needs_reference'),
      **{k: c.algorithm[k] for k in _ALGORITHM}, role_estimators=tuple(estimators.items()),
      role_weights=tuple(c.algorithm.role_weights.to_dict().items()),
      aggregation_tokens=c.algorithm.aggregation_tokens or longest_response(c))
  if made.needs_reference and c.roles.reference == 'none':
    raise config_lib.ConfigError(f'algorithm.name={c.algorithm.name!r} needs a reference: set '
                                 "roles.reference='base'.")
  return made


def executor(c: ConfigDict) -> Any:
  """The started service; to be closed by the caller."""
  options, fields = c.executor.options.to_dict(), c.executor.to_dict()
  limits = {k: v for k, v in fields.items() if k not in ('name', 'options')}
  for name in limits.keys() & options.keys():
    raise config_lib.ConfigError(f'executor.options.{name}={options[name]!r}: set executor.{name} '
                                 'instead.')
  return _made(
      'executor.name', c.executor.name, functools.partial(executor_lib.start, c.executor.name),
      ('submit', 'stats', 'close', 'isolation'), **limits, **options)


def _made(field: str, name: str, make: Callable[..., Any], wanted: Sequence[str],
          /, **options: Any) -> Any:
  """What `make` gives; ConfigError where it does not take the options, or an attribute lacks."""
  try:
    made = make(**options)
  except TypeError as e:
    raise config_lib.ConfigError(
        f'{field}={name!r} cannot be made: {e}. It is called with {", ".join(options)}; see '
        'docs/extending.md.') from e
  missing = [attribute for attribute in wanted if not hasattr(made, attribute)]
  if missing:
    raise config_lib.ConfigError(f'{field}={name!r} gave {made!r:.80}, which lacks {missing}; see '
                                 'docs/extending.md.')
  return made


def optimizer(c: ConfigDict) -> Any:
  """AdamW or Muon with its schedule; clipping is the learner's.

  The schedule counts optimizer steps, of which an iteration may have several.
  """
  fields = {k: v for k, v in c.optimizer.to_dict().items()
            if k not in ('clip_norm', 'accumulate_dtype')}
  steps = c.train.steps * c.selfplay.updates * c.algorithm.epochs * c.algorithm.mini_batches
  try:
    return learner_lib.make_optimizer(steps=steps, **fields)
  except ValueError as e:
    raise config_lib.ConfigError(f'optimizer: {e} It makes {steps} steps here: train.steps times '
                                 'the updates of an iteration.') from e


def notes(c: ConfigDict, model: Any, tokenizer: Any, source: Any) -> list[str]:
  """What is possible and seldom meant; `source` is where the model's weights lie, if anywhere."""
  out = []
  if c.model.tokenizer and source and 2 * tokenizer.vocab_size < model.vocab:
    out.append(f'model.tokenizer={c.model.tokenizer!r} has {tokenizer.vocab_size} tokens, the '
               f'model {model.vocab}: is it the one the model was trained with?')
  longest = c.sampler.max_prompt_tokens + longest_response(c)
  if longest > model.max_positions:
    out.append(f'sampler.max_prompt_tokens and the longest response are {longest} tokens '
               f'together; the model was made for {model.max_positions}')
  if c.selfplay.mc_samples == 1 and c.selfplay.train_propose and c.command == 'selfplay':
    out.append('with selfplay.mc_samples=1 every task is solved always or never, so that its '
               'learnability is 0; proposers are paid for it from 2 on')
  return out


def learner(c: ConfigDict, model: Any, mesh: Any, algorithm: Any, optimizer: Any,
            ) -> learner_lib.Learner:
  """The compiled update of this model."""
  return learner_lib.of_decoder(
      model, optimizer, algorithm, mesh=mesh, dtype=c.model.dtype, remat=c.model.remat,
      attention=c.model.attention, old_logprobs=c.algorithm.old_logprobs,
      mismatch_bound=c.algorithm.mismatch_bound, temperature=c.sampler.temperature,
      max_grad_norm=c.optimizer.clip_norm,
      accumulate_dtype=c.optimizer.accumulate_dtype, epochs=c.algorithm.epochs,
      mini_batches=c.algorithm.mini_batches, skip_zero_rows=c.algorithm.skip_zero_rows,
      pack=c.train.pack, share_prompts=c.train.share_prompts,
      length_buckets=tuple(c.train.length_buckets),
      micro_batch_tokens=c.train.micro_batch_tokens,
      materialize=lora.attaching(alpha=c.lora.alpha) if c.lora.rank else None)


def mesh(c: ConfigDict) -> Any:
  """The mesh of `config.mesh`; with `sampler.cpu_devices` on a CPU, over no more than it needs.

  Raises ConfigError where these devices do not have the attention that the config asks for.
  """
  show_cpu_devices(c)
  devices, sizes = jax.devices(), c.mesh.to_dict()
  needed = {'cudnn': 'gpu', 'splash': 'tpu'}.get(c.model.attention)
  if needed and devices[0].platform != needed:
    raise config_lib.ConfigError(
        f'model.attention={c.model.attention!r} needs a {needed.upper()}, and JAX sees '
        f"{devices[0].platform.upper()} devices; 'xla' works on any.")
  if _cpu_devices(c) and devices[0].platform == 'cpu':
    devices = devices[:math.prod(size for size in sizes.values() if size != -1)]
  try:
    return sharding.make_mesh(**sizes, devices=devices)
  except ValueError as e:
    raise config_lib.ConfigError(f'mesh.data, mesh.fsdp, mesh.tensor: {e}') from e


def _cpu_devices(c):
  if c.sampler.cpu_devices >= 0:
    return c.sampler.cpu_devices
  return max(1, min(client.usable_cores(), c.sampler.slots // 16))


def sampler(c: ConfigDict, model: Any, mesh: Any, tokenizer: Any) -> sampler_lib.Sampler:
  """The continuous batch of this model; see `sampler.cpu_devices` for its devices."""
  on_cpu, count = mesh.devices.flat[0].platform == 'cpu', _cpu_devices(c)
  if on_cpu and count and mesh.size == 1:
    mesh = sharding.make_mesh(devices=jax.local_devices()[:count])
    if mesh.size < count:
      warnings.warn(f'sampler.cpu_devices asks for {count} devices and JAX shows {mesh.size}: it '
                    f'had looked for them before. Set JAX_NUM_CPU_DEVICES={count}.', stacklevel=2)
  sizes = {name: c.sampler[name] or usual[not on_cpu] for name, usual in SAMPLER_SIZES.items()}
  return sampler_lib.Sampler(
      model, mesh, pad_id=tokenizer.pad_id, stop_ids=tokenizer.stop_ids, slots=c.sampler.slots,
      chunk=c.sampler.chunk, **sizes, dtype=c.model.dtype, attention=c.model.attention,
      vocab=tokenizer.vocab_size, max_prompt_tokens=c.sampler.max_prompt_tokens,
      max_new_tokens=longest_response(c))


def model(c: ConfigDict, key: jax.Array, mesh: Any) -> tuple[Any, Any, Any]:
  """(ModelConfig, parameters, folder or file they came from)."""
  return loading.load(
      c.model.name, dtype=jnp.dtype(c.model.param_dtype), key=key,
      shardings_fn=lambda m: sharding.shardings(decoder.param_specs(m), mesh))


def model_without_parameters(c: ConfigDict) -> tuple[Any, None, Any]:
  """As `model`, for weights that a checkpoint will bring."""
  if c.model.name.startswith('random:'):
    return loading.random_config(c.model.name), None, None
  source = loading.weights(hub.resolve(c.model.name))
  return loading.read_config(source), None, source


def tokenizer(c: ConfigDict, source: Any) -> tokenizer_lib.Tokenizer:
  """That of `model.tokenizer`, a path or 'carried:NAME'; if it is '', that of the model's files.

  Raises ConfigError where a random model, which has no files, is to bring its own.
  """
  name = c.model.tokenizer
  if not name and source is None:
    raise config_lib.ConfigError(
        f"model.tokenizer='' takes the model's own, and {c.model.name!r} has none; set 'bytes', "
        "'carried:tiny' or the path of a tokenizer.")
  return tokenizer_lib.load(hub.resolve(name) if name.startswith('carried:') else name or source)


def longest_response(c: ConfigDict) -> int:
  """Tokens that any response may have."""
  return max(c.sampler.max_propose_tokens, c.sampler.max_solve_tokens)
