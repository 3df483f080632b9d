# SPDX-License-Identifier: Apache-2.0
"""Every default of a run, with meaning and unit; `config_checks` refuses impossible values.

A file in `configs/` is a short diff of `get_config()`. Fields that name code (`module:name`) are
resolved by `load_object`, so a user's own kind, reward, algorithm, executor or prompt set needs no
change of this package.
"""

import importlib
from typing import Any

import ml_collections

from absolute_zero_jax import config_checks, presets

ConfigDict = ml_collections.ConfigDict
ConfigError = config_checks.ConfigError
check_field = config_checks.check_field
PRESETS = presets.PRESETS


def get_config() -> ConfigDict:
  """The default run: SmolLM2-135M on whatever devices there are, preset `azr`."""
  c = ConfigDict()
  # What the command does: 'selfplay'; 'seed': write seed tasks; 'pretrain' a small model on
  # generated programs; 'evaluate' one on held-out programs.
  c.command = 'selfplay'
  c.seed = 0                          # of all that is drawn
  # The preset this config started from, for who reads the run's config.json. See `PRESETS`.
  c.preset = 'azr'

  c.model = ConfigDict()
  # Directory, .gguf file, HF id, alias, 'carried:tiny' (comes with the package), or
  # 'random:FAMILY[,key=value...]' (tests).
  c.model.name = 'smollm2-135m-instruct'
  # Arithmetic of the forward pass: 'float32' or 'bfloat16'.
  c.model.dtype = 'float32'
  # Stored weights and gradients' target: 'float32' or 'bfloat16'.
  c.model.param_dtype = 'float32'
  # '' takes the model's own; otherwise a directory, file, 'carried:NAME' or 'bytes'.
  c.model.tokenizer = ''
  # 'none', 'full', 'dots': what the backward pass recomputes.
  c.model.remat = 'full'
  # Attention of training and prefill: 'xla' (any platform), 'cudnn' (NVIDIA, 16 bits) or 'splash'
  # (TPU).
  c.model.attention = 'xla'

  # Who proposes: 'policy' (trained) or 'base' (the weights at the start, frozen). The solver is the
  # policy.
  c.roles = ConfigDict()
  c.roles.propose = 'policy'
  c.roles.solve = 'policy'
  # KL reference: 'none' or 'base'.
  c.roles.reference = 'none'

  # Devices per mesh axis; one of them may be -1 (all that are left).
  c.mesh = ConfigDict()
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1

  c.selfplay = ConfigDict()
  # Names in `tasks.KINDS`, or 'module:name'.
  c.selfplay.kinds = ('abduction', 'deduction', 'induction')
  # Prompt set: 'compact' (base and small models), 'think' (large ones), 'tiny' and its like (the
  # carried model), a directory, 'module:name'.
  c.selfplay.prompts = 'compact'
  # Its wrapper ('none', or one that the set has: 'answer' and 'boxed' of 'think') and its format
  # test of tagged answers ('strict', or the reference's 'azr'); '', as for a module, its own.
  c.selfplay.wrapper = ''
  c.selfplay.format_rule = ''
  # Proposals, and solved tasks, per kind and iteration (the paper's B: 64).
  c.selfplay.batch = 64
  # Kinds that take another number, by name, e.g. {'induction': 96}.
  c.selfplay.kind_batch = ConfigDict()
  # Monte-Carlo answers per valid proposal.
  c.selfplay.mc_samples = 8
  # References shown to a proposer (the paper's K: 6).
  c.selfplay.references = 6
  # Input/output pairs of an induction task; the first half is shown (the paper: 10).
  c.selfplay.induction_cases = 10
  # Further options of the kinds, e.g. {'distinct_inputs': False}; see the classes in `tasks`. Two
  # are sections: 'rules' (fields of `tasks.Rules`), 'composites' (of `tasks.composite.Schedule`).
  c.selfplay.kind_options = ConfigDict()
  # 'fresh': solve this iteration's tasks (paper); 'lagged': the previous one's (reference code).
  c.selfplay.solve_source = 'fresh'
  # How solver tasks are drawn: 'max_new', 'half_new', 'uniform_total', 'step'; see
  # `buffer.TaskBuffer.draw`.
  c.selfplay.draw = 'max_new'
  # Iterations that count as new for 'max_new' and 'half_new'.
  c.selfplay.recent_steps = 1
  # How references are drawn: 'uniform' or 'step' (weight step + 1).
  c.selfplay.reference_draw = 'uniform'
  # Tasks kept per kind, and what leaves when it is full: 'ring' (oldest) or 'reservoir' (any).
  c.selfplay.buffer_size = 16384
  c.selfplay.eviction = 'ring'
  # False shows the proposer no references (ablation).
  c.selfplay.show_references = True
  # False plays the proposer without training it (ablation).
  c.selfplay.train_propose = True
  # The Monte-Carlo answers: 'measure' only (reference); 'train' on them too; 'reuse': they are what
  # the solver trains on, and known tasks are drawn only where they are fewer than `batch`. With the
  # last two `trr_plus_plus` gives the solver prompt baselines (`trr_prompt`), role_estimators
  # permitting.
  c.selfplay.mc_use = 'measure'
  # Answers to each task that is drawn; more than one give the solver's prompt baselines a group.
  c.selfplay.solve_samples = 1
  # Plays and updates per iteration; all of them draw references and lagged tasks from the buffer as
  # it stood when the iteration began (the reference's update_iteration), each anew, so that two may
  # draw the same task.
  c.selfplay.updates = 1
  # Above 0, answers to early proposals decode beside late proposals, in one call of the sampler: a
  # proposal's verdict is waited for after so many looks of the sampler (`sampler.chunk` steps each)
  # from its end. Runs stay bit-equal, resumed or not. 0 = one phase after the other.
  c.selfplay.overlap = 0
  # First iterations that only solve; nothing is proposed (the reference's pretrain_pred_steps).
  c.selfplay.solver_only_steps = 0
  # Valid proposals that enter the buffer: 'all', 'non_one' (p < 1), 'non_extremes' (0 < p < 1).
  c.selfplay.keep = 'all'
  # A proposal equal to a known task is refused (status 'duplicate').
  c.selfplay.refuse_duplicates = True
  # How many valid proposals of a kind and a play (see `updates`) may be the same program up to its
  # constants; more are refused (status 'alike'). 0 = any number. Not for kinds that need
  # references.
  c.selfplay.max_alike = 0
  # Changed inputs that a proposal also runs on in its validation, to find out whether its output
  # depends on the input (metric `propose/independent_share`); 0 = not tested. (Inductions have
  # inputs enough, errors are not tested.) And whether one whose output does not is refused (status
  # 'independent'); off in the presets, on in configs/tiny.py.
  c.selfplay.probes = 3
  c.selfplay.refuse_independent = False
  # Tasks that are refused (status 'excluded'): '', 'heldout' (programs of the test side of
  # `grammar`, and of the files among `heldout.parts`), or 'module:name' of a function of the task.
  c.selfplay.exclude = ''
  # Seed tasks: file or directory of the reference's jsonl schema; 'grammar': `seeding.tasks` per
  # kind, generated from `seed`; '' starts from the zero triplet.
  c.selfplay.seeds = ''

  # command='seed' trains nothing; the policy proposes from what the buffer starts with, and valid
  # tasks go to workdir/seeds, the value of selfplay.seeds of later runs.
  c.seeding = ConfigDict()
  # Tasks per file: pairs for deduction and abduction, and induction (the paper: 256, Llama 64).
  c.seeding.tasks = 256
  # Clean-ups of their programs, from 'comments', 'globals', 'prints'; see `tasks.Rules`.
  c.seeding.clean = ()
  # Rounds of selfplay.batch proposals per kind without a new task before it gives up.
  c.seeding.patience = 10

  c.sampler = ConfigDict()
  # Sequences decoded side by side.
  c.sampler.slots = 64
  # Decode steps between two looks of the host (text stops, refill).
  c.sampler.chunk = 16
  # Every shape is a program: fewest sequences that a batch narrows to as rows end (then all powers
  # of two); smallest size of a cache, and of a padded prompt, which grow by a third or a half; how
  # many shapes of decoding, and of prefill, are compiled before larger ones serve. 0 = by the
  # devices: an accelerator takes seconds to compile a program, and hardly longer to run a larger
  # one (see `parts.SAMPLER_SIZES`).
  c.sampler.min_slots = 0
  c.sampler.cache_block = 0
  c.sampler.prompt_block = 0
  c.sampler.max_programs = 0
  # Splits a CPU into so many JAX devices for the sampler's rows; training uses only as many as the
  # mesh asks for. Attention of a decode step runs on one thread of a device. Each
  # holds and reads all weights, so this is for small models. -1 = as many as there are cores, of no
  # fewer than 16 slots; 0 = whatever devices there are belong to the mesh, sampler or not.
  c.sampler.cpu_devices = 0
  # Longest prompt, and longest response of each role.
  c.sampler.max_prompt_tokens = 6144
  c.sampler.max_propose_tokens = 8096
  c.sampler.max_solve_tokens = 8096
  c.sampler.temperature = 1.0         # also of the distribution that the update trains
  c.sampler.top_k = 0       # 0 = off
  c.sampler.top_p = 1.0
  c.sampler.min_p = 0.0

  c.executor = ConfigDict()
  # 'local' (this host's fenced service), 'sandboxfusion', or 'module:name'.
  c.executor.name = 'local'
  c.executor.options = ConfigDict()   # passed to it; its own docstring says what exists
  # Weakest fence accepted: 'full', 'standard' or 'weak'. See docs/executor.md.
  c.executor.min_isolation = 'standard'
  c.executor.workers = 0              # an even number; 0 = by the number of cores
  c.executor.validate_timeout_s = 2.0
  c.executor.score_timeout_s = 4.0
  c.executor.memory_mb = 512

  c.reward = ConfigDict()
  # 'azr' (the fields below), a control of `controls` ('random', 'format', 'validity'), or
  # 'module:name'.
  c.reward.name = 'azr'
  c.reward.format_penalty = -1.0      # unreadable response, or a proposal that is no task
  c.reward.wrong_penalty = -0.5       # well-formed but wrong
  # A valid proposal whose learnability is 0: 0.0 (paper Eq. 4) or -0.5 (reference code).
  c.reward.zero_learnability = 0.0
  # Of solve rate p. 'one_minus': 1 - p, 0 at p = 0; 'inverse': 1 - p always; 'variance': 4p(1 - p).
  c.reward.learnability = 'one_minus'
  # Induction: 'binary' (all hidden cases), 'accuracy', 'if_one_correct'.
  c.reward.induction = 'binary'
  # Form and correctness of an answer: 'conditional' (-1, -0.5, accuracy), 'addition', 'multiply'.
  c.reward.format_mode = 'conditional'
  # Intrinsic terms of valid proposals, {name: (coefficient, cap)}; see `intrinsic.TERMS`.
  c.reward.intrinsic = ConfigDict()
  c.reward.hierarchical = False       # diversity by type first, then inside the type
  c.reward.seed = 0                   # of 'random'
  # How these terms join learnability: 'sum', 'multiply', 'sum_multiply', 'multiply_sum'.
  c.reward.combine = 'sum'

  c.algorithm = ConfigDict()
  # A key of `reinforce.ALGORITHMS` or 'module:name'. All but 'trr_plus_plus', 'trr_prompt' and
  # 'reinforce_plus_plus' compare the answers to one prompt: solvers need several (selfplay.mc_use
  # or solve_samples), and proposers an estimator of their own.
  c.algorithm.name = 'trr_plus_plus'
  # Other estimators for single roles, e.g. {'solve': 'rloo'}.
  c.algorithm.role_estimators = ConfigDict()
  c.algorithm.pass_k = 2              # answers in a set of the estimator 'pass_at_k'
  # Scope of whitening: 'global', 'role', 'role_kind'; '' is the algorithm's own. And what has one
  # vote in its moments: 'token' or 'sequence'.
  c.algorithm.whiten_by = ''
  c.algorithm.whiten_count = 'token'
  # Factors on the finished advantages of a role, e.g. {'propose': 0.3}.
  c.algorithm.role_weights = ConfigDict()
  # 'token', 'sequence', 'constant', 'role_microbatch' (reference code): see the functions of
  # `advantages`; '' is the algorithm's own.
  c.algorithm.aggregation = ''
  c.algorithm.aggregation_rows = 16   # rows per slice of 'role_microbatch'
  c.algorithm.aggregation_tokens = 0  # the constant of 'constant'; 0 = the longest response
  # The ratio is clipped to [1 - clip_low, 1 + clip_high].
  c.algorithm.clip_low = 0.2
  c.algorithm.clip_high = 0.2
  c.algorithm.dual_clip = 0.0         # bound on the ratio at negative advantages; 0 = off
  c.algorithm.entropy_coef = 0.0
  c.algorithm.kl_coef = 0.0           # needs roles.reference = 'base'
  c.algorithm.kl_kind = 'k3'          # 'k1', 'k2', 'k3'; see `reinforce.kl`
  c.algorithm.kl_in = 'loss'          # 'loss' or 'reward'
  # Policy that the ratio refers to. 'current': ratio 1, no extra forward (one optimizer step per
  # batch); 'recompute': one more forward; 'sampler': what it reported; 'auto': 'current' where that
  # is right, else 'sampler' while one micro-batch scored anew differs by at most `mismatch_bound`
  # (mean |gap| in nats per token), else 'recompute'.
  c.algorithm.old_logprobs = 'auto'
  c.algorithm.mismatch_bound = 1e-3
  # Sampler/trainer importance weights: 'none', 'truncate', 'mask'; and the bound.
  c.algorithm.importance = 'none'
  c.algorithm.importance_cap = 2.0
  # Passes over the batch, and optimizer steps per pass; more than one step needs old log-probs.
  c.algorithm.epochs = 1
  c.algorithm.mini_batches = 1
  # Leaves rows without any advantage out of the computation; exact without entropy bonus and KL.
  c.algorithm.skip_zero_rows = False

  c.optimizer = ConfigDict()
  c.optimizer.name = 'adamw'          # or 'muon'; see `optimizer.make_optimizer`
  c.optimizer.learning_rate = 1e-6
  c.optimizer.warmup_steps = 0        # optimizer steps, as in torch
  c.optimizer.schedule = 'constant'   # 'constant' or 'cosine' (to zero at train.steps)
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.999
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.0
  c.optimizer.decay = 'all'           # what decays: 'all' (as in the reference) or 'matrices'
  c.optimizer.clip_norm = 1.0
  c.optimizer.moment_dtype = 'float32'
  c.optimizer.accumulate_dtype = 'float32'

  c.train = ConfigDict()
  c.train.steps = 500
  # Self-play saves and ends cleanly before it has run this long, start-up, last scoring and saving
  # included; 0 = no limit. The same command then plays on for as long again.
  c.train.minutes = 0.0
  # 1: the update of one play runs while the executor checks the next one's answers, so its rows are
  # one update old; needs algorithm.importance. 0: each play is trained on before the next.
  c.train.off_policy_steps = 0
  # Tokens of one micro-batch (rows x padded length).
  c.train.micro_batch_tokens = 4096
  # Several short sequences in one row of a micro-batch.
  c.train.pack = False
  # Allowed lengths of such a row, ascending; () = 64, 128, 256, 384, 512, 768, ... The fewer, the
  # fewer programs are compiled.
  c.train.length_buckets = ()
  # Answers to the same prompt hold it once; saves most where prompts are longer than answers.
  c.train.share_prompts = False

  # LoRA adapters instead of full weights; rank 0 = off. They are merged in the weights' dtype:
  # over bfloat16 weights (model.param_dtype) the changes of small learning rates are rounded away.
  c.lora = ConfigDict()
  c.lora.rank = 0
  c.lora.alpha = 16.0
  c.lora.targets = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')

  # Pre-training on the programs of `grammar`; see `documents.Recipe` for the mixture.
  c.pretrain = ConfigDict()
  # One step: lines, and tokens of a line.
  c.pretrain.batch = 32
  c.pretrain.line_tokens = 256
  c.pretrain.depths = (0, 0, 1, 1, 1, 1, 2, 2, 2, 3)
  c.pretrain.propose = 0.15
  c.pretrain.induce = 0.34
  c.pretrain.questions = 3
  # Share of the answers that begin with thinking, and how often a model that has learnt from them
  # begins so when left free.
  c.pretrain.think = 0.8
  c.pretrain.think_prior = 0.25
  c.pretrain.prompt_weight = 0.2
  # After each of these steps the model is asked so many inductions, and its own wrong guesses are
  # what thoughts about inductions begin with from then on (see `guesses`). (): never.
  c.pretrain.guess_steps = ()
  c.pretrain.guess_count = 6000
  c.pretrain.references = 2

  # Held-out programs, drawn from a seed, never pre-trained on; see `evaluate`.
  c.heldout = ConfigDict()
  c.heldout.seed = 20261123
  # Programs per part ('same': depth as in pre-training; 'deeper'); the first ones are the easier.
  c.heldout.count = 1000
  # Or the path of a .jsonl file in the format of CRUXEval, of which all is taken.
  c.heldout.parts = ('same', 'deeper')
  # Answers at temperature 1 to each item, for their mean and for pass@n.
  c.heldout.samples = 8
  c.heldout.kinds = ('deduction', 'abduction', 'induction')
  # command='evaluate': a model to compare with, item by item; '' = none.
  c.heldout.base = ''
  # Self-play scores its policy so at the start, every so many iterations and at the end; 0 = never.
  c.heldout.every_steps = 0

  c.checkpoint = ConfigDict()
  c.checkpoint.every_steps = 10
  c.checkpoint.keep = 2
  # Write the policy as a HF directory at the end (workdir/export).
  c.checkpoint.export = True

  c.log = ConfigDict()
  c.log.every_steps = 1
  c.log.samples = 2                   # texts shown per kind and role
  # Responses that hold one of these words, whatever their case, count in `.../flagged_share`.
  c.log.flag_words = ('outsmart', 'deceive', 'humans', 'take over', 'escape')
  c.log.profile_step = -1             # write a jax.profiler trace of this iteration; -1 = none
  return c


def apply_preset(c: ConfigDict, name: str) -> ConfigDict:
  """Sets the fields of a preset in `c` and returns it; unknown names raise."""
  if name not in PRESETS:
    raise ConfigError(f'preset={name!r} is unknown; allowed: {", ".join(PRESETS)}.')
  _set(c, PRESETS[name])
  c.preset = name
  return c


def shrink(c: ConfigDict) -> ConfigDict:
  """The same run with a random two-layer byte model and two short iterations, for a CPU."""
  _set(c, presets.SMOKE)
  return c


def _set(c: ConfigDict, values: dict[str, Any]) -> None:
  for field, value in values.items():
    section, _, key = field.rpartition('.')
    value = ConfigDict(value) if isinstance(value, dict) else value
    config_checks.get_field(c, section)[key] = value


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Reads the part after ':' of `--config FILE:a,b=3`; a bare name is True, unknown names raise."""
  out = ConfigDict(defaults)
  for item in filter(None, (arg or '').split(',')):
    name, _, value = item.partition('=')
    if name not in defaults:
      raise ConfigError(
          f'config argument {name!r} is unknown; this file takes: {", ".join(defaults) or "none"}.')
    default = defaults[name]
    if isinstance(default, bool):
      if value.lower() not in ('', 'true', 'false', '1', '0'):
        raise ConfigError(f'config argument {name}={value!r} must be true or false.')
      out[name] = value.lower() in ('', 'true', '1')
    else:
      try:
        out[name] = type(default)(value)
      except ValueError:
        raise ConfigError(
            f'config argument {name}={value!r} must be of type {type(default).__name__}.') from None
  return out


def load_object(name: str, known: dict[str, Any], field: str) -> Any:
  """`known[name]`, or what 'module:name' points at; for neither, ConfigError about `field`."""
  if ':' not in name:
    if name in known:
      return known[name]
    raise ConfigError(f'{field}={name!r} is unknown; allowed: {", ".join(sorted(known))}, '
                      f"or your own as 'module:name'.{config_checks.did_you_mean(name, known)}")
  module, _, attribute = name.partition(':')
  try:
    return getattr(importlib.import_module(module), attribute)
  except ImportError as e:
    raise ConfigError(f'{field}={name!r}: cannot import {module!r} ({e}); is its folder on '
                      'PYTHONPATH?') from e
  except AttributeError:
    raise ConfigError(f'{field}={name!r}: module {module!r} has no {attribute!r}.') from None


def validate(c: ConfigDict) -> None:
  """Raises `ConfigError` for the first field that cannot work; touches no device and no file."""
  config_checks.check(c, get_config())


def to_json(c: ConfigDict) -> dict[str, Any]:
  """A plain dict of the config, tuples as lists, for records and checkpoints."""
  def plain(x):
    if isinstance(x, dict):
      return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, tuple | list) else x
  return plain(c.to_dict())


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = '',
                usual: dict[str, Any] | None = None) -> list[str]:
  """Dotted names of the fields in which two `to_json` dicts differ.

  A field that one of them lacks counts with its default, so that a run of an older version, which
  did not know the field, goes on.
  """
  usual = to_json(get_config()) if usual is None else usual
  out = []
  for k in sorted(set(a) | set(b)):
    x, y = (d.get(k, usual.get(k, ...)) for d in (a, b))
    if isinstance(x, dict) and isinstance(y, dict):
      out += differences(x, y, f'{prefix}{k}.', usual.get(k) or {})
    elif x != y:
      out.append(f'{prefix}{k}')
  return out
