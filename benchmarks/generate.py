# SPDX-License-Identifier: Apache-2.0
"""Generation speed: our sampler against `transformers` or Tunix, and against the machine's limit.

    python benchmarks/generate.py                                    SmolLM2-135M, B = 1, 8, 32, 64
    python benchmarks/generate.py --sides=jax,tunix --tunix=PYTHON   of an environment with Tunix
    python benchmarks/generate.py --sides=jax,jax:bfloat16,hf:bfloat16
    python benchmarks/generate.py --variable                         continuous against static batch
    python benchmarks/generate.py --shared                           8 answers to each long prompt
    python benchmarks/generate.py --model=qwen2.5-1.5b --dtype=bfloat16 --batches=1,32,256 \\
        --slots=256 --attention=cudnn                                on an NVIDIA GPU

Every side is a process that stays up; the sides take turns (A B A B), so that a shared machine
slows both. Both sample at random at temperature 1 and never stop early. The limit of a batch size
is measured in the same run: a program of nothing but the model's matmuls at the same shapes, or
the time to read all weights once per token where that is longer.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

QWEN = ('random:qwen2,vocab=151936,embed=1536,layers=28,heads=12,kv_heads=2,head_dim=128,ffn=8960,'
        'rope_theta=1000000.0,tied=true')
MODELS = {'smollm2': 'HuggingFaceTB/SmolLM2-135M-Instruct', 'qwen2.5-1.5b': QWEN}


def main() -> None:
  flags = flags_of()
  if flags.side:
    sides = {'jax': _serve_jax, 'hf': _serve_hf, 'tunix': _serve_tunix}
    sides[_kind(flags.side)](flags)
    return
  with tempfile.TemporaryDirectory() as folder:
    flags.folder = flags.folder or folder
    if flags.variable or flags.shared:
      with Side('jax', flags) as side:
        (_variable if flags.variable else _shared)(side, flags)
    else:
      _compare(flags)


def _compare(flags) -> None:
  sides = [Side(name, flags) for name in flags.sides.split(',')]
  names = ' '.join(f'{s.name + " tok/s":>18s}' for s in sides)
  others = ' '.join(f'{"x " + s.name:>14s} {"in cpu":>7s}' for s in sides[1:])
  print(f'prompt {flags.prompt}, {flags.new} new tokens, {flags.dtype}, {flags.rounds} rounds, '
        f'medians\n{"B":>4s} {names} {others} {"limit tok/s":>12s} {"share":>6s}', flush=True)
  for B in map(int, flags.batches.split(',')):
    job = {'rows': B, 'prompt': flags.prompt, 'new': [flags.new] * B}
    for side in sides:
      side.ask(job)                                            # compiles
    answers = {side.name: [] for side in sides}
    for _ in range(flags.rounds):
      for side in sides:
        answers[side.name].append(side.ask(job))
    middle = {name: statistics.median(a['seconds'] for a in x) for name, x in answers.items()}
    cpu = {name: statistics.median(a['cpu_s'] for a in x) for name, x in answers.items()}
    speeds = ' '.join(f'{B * flags.new / middle[s.name]:18.1f}' for s in sides)
    ours, *rest = (s.name for s in sides)
    ratios = ' '.join(
        f'{middle[x] / middle[ours]:14.2f} {cpu[x] / cpu[ours]:7.2f}' for x in rest)
    line = f'{B:4d} {speeds} {ratios} '
    if _kind(ours) == 'jax':                                   # only this side knows its limit
      limit = sides[0].ask(job | {'limit': True})
      line += (f'{B * flags.new / limit["seconds"]:12.1f} {limit["seconds"] / middle[ours]:6.2f}   '
               f'{limit["text"]}')
    print(line, flush=True)
  for side in sides:
    side.close()


def _variable(side, flags) -> None:
  """Lognormal lengths: one call that refills and compacts, against batches run to their longest."""
  rng = np.random.default_rng(0)
  sigma = 0.8
  new = rng.lognormal(np.log(flags.mean) - sigma**2 / 2, sigma, flags.sequences)
  new = np.clip(new, 4, flags.limit).astype(int).tolist()
  slots = flags.slots
  groups = [new[i:i + slots] for i in range(0, len(new), slots)]
  continuous = {'rows': len(new), 'prompt': flags.prompt, 'new': new}
  static = [{'rows': len(g), 'prompt': flags.prompt, 'new': [max(g)] * len(g)} for g in groups]
  times = {'continuous': [], 'static': []}
  for number in range(flags.rounds + 1):                       # the first round compiles
    a = side.ask(continuous)
    b = [side.ask(job) for job in static]
    if number:
      times['continuous'].append(a['seconds'])
      times['static'].append(sum(x['seconds'] for x in b))
  middle = {k: statistics.median(v) for k, v in times.items()}
  print(f'{len(new)} sequences, mean {np.mean(new):.0f}, longest {max(new)}, {slots} slots: '
        f'continuous {sum(new) / middle["continuous"]:.0f} tok/s, static '
        f'{sum(new) / middle["static"]:.0f} tok/s, ratio '
        f'{middle["static"] / middle["continuous"]:.2f}; {a["text"]}')


def _shared(side, flags) -> None:
  """Prefill seconds for 8 samples of each of 4 long prompts: as samples, and as equal strangers."""
  jobs = {'shared': {'rows': 4, 'samples': 8, 'prompt': 512, 'new': [1] * 4},
          'each': {'rows': 32, 'prompt': 512, 'new': [1] * 32}}
  times = {name: [] for name in jobs}
  for number in range(flags.rounds + 1):
    for name, job in jobs.items():
      out = side.ask(job)
      if number:
        times[name].append(out['prefill_s'])
  middle = {k: statistics.median(v) for k, v in times.items()}
  print(f'prefill of 32 rows of 512 tokens: {middle["shared"]:.2f} s as 8 samples of 4 prompts, '
        f'{middle["each"]:.2f} s as 32 prompts: 1/{middle["each"] / middle["shared"]:.1f}')


def _kind(name):
  return name.partition(':')[0]


class Side:
  """One process that answers a line of JSON with a line of JSON."""

  def __init__(self, name, flags):
    self.name = name
    python = flags.tunix if _kind(name) == 'tunix' else sys.executable
    command = [python, str(pathlib.Path(__file__).resolve()), f'--side={name}']
    for key, value in vars(flags).items():
      if key != 'side' and not isinstance(value, bool):
        command.append(f'--{key}={value}')
    if ':' in name:
      command.append(f'--dtype={name.partition(":")[2]}')
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True)
    self._read()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def ask(self, job):
    self.process.stdin.write(json.dumps(job) + '\n')
    self.process.stdin.flush()
    return self._read()

  def close(self):
    self.process.stdin.close()
    self.process.wait()

  def _read(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'the {self.name} side ended; its error is above')
    return json.loads(line)


def _serve(answer) -> None:
  print(json.dumps({'ready': True}), flush=True)
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)


def _serve_jax(flags) -> None:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  import jax

  from absolute_zero_jax import sampler, sharding
  from absolute_zero_jax.models import hf, loading
  if flags.devices > 1:                                        # counts only without an accelerator
    jax.config.update('jax_num_cpu_devices', flags.devices)
  config, params, _ = loading.load(MODELS.get(flags.model, flags.model), dtype=flags.dtype)
  sides = flags.sides.split(',')
  if 'hf' in map(_kind, sides) and flags.side == sides[0]:
    hf.save(config, params, pathlib.Path(flags.folder) / 'model')
  mesh = sharding.make_mesh(data=flags.devices) if flags.devices > 1 else None
  ours = sampler.Sampler(config, mesh, pad_id=0, stop_ids=[], slots=flags.slots, chunk=flags.chunk,
                         cache_block=flags.cache_block,
                         max_prompt_tokens=max(flags.prompt, 512),
                         max_new_tokens=max(flags.new, flags.limit), dtype=flags.dtype,
                         attention=flags.attention)
  rng = np.random.default_rng(1)
  calls = iter(range(10**9))

  def answer(job):
    if job.get('limit'):
      return _limit(config, ours, params, job)
    prompts = rng.integers(100, min(config.vocab, 40000), (job['rows'], job['prompt'])).tolist()
    requests = [sampler.Request(tuple(p), job.get('samples', 1), n)
                for p, n in zip(prompts, job['new'])]
    before = ours.stats()
    started, cpu = time.perf_counter(), time.process_time()
    out = ours.generate(params, requests, jax.random.fold_in(jax.random.key(0), next(calls)))
    seconds = time.perf_counter() - started
    assert [len(s[0].ids) for s in out] == job['new']
    spent = {k: v - before[k] for k, v in ours.stats().items()}
    text = ', '.join(f'{k} {spent[k]:.2f}' for k in ('prefill_s', 'decode_s', 'host_s'))
    return {'seconds': seconds, 'cpu_s': time.process_time() - cpu,
            'prefill_s': spent['prefill_s'], 'text': text}

  _serve(answer)


def _limit(config, ours, params, job):
  """Seconds that the matmuls alone take, or reading the weights if that is longer."""
  import jax
  import jax.numpy as jnp

  from absolute_zero_jax.models import decoder
  _, weights = ours._prepare(params)
  c = config
  unembed_VD = weights.embed_VD if weights.unembed_VD is None else weights.unembed_VD
  first = jax.default_backend() == 'cpu' and ours.dtype == jnp.float32
  product = lambda x, w: decoder.product(x, w, first and len(x) <= 256)    # the faster way

  def matmuls(x, w, head):
    for layer in w.layers:
      q = product(x, layer['qkv'])[:, :layer['o'].shape[1]]
      x = x + product(q, layer['o'])
      x = x + product(product(x, layer['gate_up'])[:, :c.ffn], layer['down'])
    return product(x, unembed_VD) if head else x

  def measure(f, *args):
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(7):
      started = time.perf_counter()
      jax.block_until_ready(f(*args))
      times.append(time.perf_counter() - started)
    return statistics.median(times)

  B, dtype = job['rows'], ours.dtype
  run = jax.jit(matmuls, static_argnums=2)
  step_s = measure(run, jnp.full((B, c.embed), 0.01, dtype), weights, True)
  tokens = min(B * job['prompt'], 4096)
  prompt_s = measure(run, jnp.full((tokens, c.embed), 0.01, dtype), weights, False)
  prompt_s *= B * job['prompt'] / tokens
  read = [w for layer in weights.layers for w in layer.values()] + [unembed_VD]
  size = sum(w.nbytes for w in read)
  # Keys and values of the tokens that a row has in the middle of its response.
  size += (2 * c.layers * c.kv_heads * c.head_dim * dtype.itemsize
           * B * (job['prompt'] + job['new'][0] // 2))
  block = jnp.ones((2**14, 2**15 // dtype.itemsize), dtype)
  # How fast memory can be read is at least what the fastest of these does; the last one also writes
  # as much as it reads.
  reads = [lambda x: jnp.max(x, -1), lambda x: x @ x[0], lambda x: x[0] @ x.T]
  bandwidth = block.nbytes / min(*(measure(jax.jit(f), block) for f in reads),
                                 measure(jax.jit(lambda x: -x), block) / 2)
  step_s = max(step_s, size / bandwidth)
  return {'seconds': step_s * job['new'][0] + prompt_s,
          'text': f'step {step_s * 1e3:.1f} ms, prompts {prompt_s:.2f} s, read '
                  f'{bandwidth / 1e9:.0f} GB/s of {size / 1e6:.0f} MB'}


def _serve_hf(flags) -> None:
  import torch
  import transformers
  path = pathlib.Path(flags.folder) / 'model'
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  dtype = getattr(torch, flags.dtype)
  if _kind(flags.sides.split(',')[0]) == 'jax':
    while not (path / 'config.json').exists():                 # the other side writes it
      time.sleep(0.5)
    time.sleep(1.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
  else:                                                        # any numbers take as long
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from absolute_zero_jax.models import loading
    config = loading.random_config(MODELS.get(flags.model, flags.model)).to_hf()
    config = transformers.AutoConfig.for_model(**config)
    with torch.device(device):
      model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
  model = model.eval().to(device)
  rng = np.random.default_rng(1)

  def answer(job):
    prompts = rng.integers(100, min(model.config.vocab_size, 40000), (job['rows'], job['prompt']))
    tokens = torch.tensor(prompts, device=device)
    n = max(job['new'])
    started, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
      out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n,
                           min_new_tokens=n, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                           pad_token_id=0)
    if device == 'cuda':
      torch.cuda.synchronize()
    assert out.shape[1] == job['prompt'] + n
    return {'seconds': time.perf_counter() - started, 'cpu_s': time.process_time() - cpu}

  _serve(answer)


def _serve_tunix(flags) -> None:
  """Tunix's own sampler; a Llama of SmolLM2's shape, with random weights."""
  from flax import nnx
  import jax
  from tunix.generate import sampler as tunix_sampler
  from tunix.models.llama3 import model as llama

  class Numbers:                                               # '3 5 7' <-> [3, 5, 7]
    encode = staticmethod(lambda text, **_: [int(x) for x in text.split()])
    decode = staticmethod(lambda ids, **_: ' '.join(map(str, ids)))
    pad_id = bos_id = staticmethod(lambda: 0)
    eos_id = staticmethod(lambda: 50000)                       # never drawn

  model = llama.Llama3(llama.ModelConfig(
      num_layers=30, vocab_size=49152, embed_dim=576, hidden_dim=1536, num_heads=9, num_kv_heads=3,
      head_dim=64, rope_theta=100000, norm_eps=1e-5, weight_tying=True), rngs=nnx.Rngs(0))
  definition, weights = nnx.split(model)
  rng = np.random.default_rng(0)                               # or whole layers are zero
  model = nnx.merge(definition, jax.tree.map(
      lambda x: x + rng.normal(0, 0.02, x.shape).astype(x.dtype), weights))
  theirs = tunix_sampler.Sampler(model, Numbers(), tunix_sampler.CacheConfig(
      cache_size=flags.prompt + flags.new, num_layers=30, num_kv_heads=3, head_dim=64))
  calls = iter(range(10**9))

  def answer(job):
    prompts = rng.integers(100, 40000, (job['rows'], job['prompt'])).tolist()
    started, cpu = time.perf_counter(), time.process_time()
    out = theirs([' '.join(map(str, p)) for p in prompts], max_generation_steps=max(job['new']),
                 max_prompt_length=job['prompt'], temperature=1.0, top_p=1.0, seed=next(calls))
    assert all(len(x) == max(job['new']) for x in out.tokens)
    return {'seconds': time.perf_counter() - started, 'cpu_s': time.process_time() - cpu}

  _serve(answer)


def flags_of(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  parser.add_argument('--model', default='smollm2', help=f'one of {list(MODELS)}, or any name')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--attention', default='xla', help='of the prefill: xla or cudnn')
  parser.add_argument('--batches', default='1,8,32,64')
  parser.add_argument('--prompt', type=int, default=64)
  parser.add_argument('--new', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--sides', default='jax,hf', help='jax and any of hf, tunix; '
                      'NAME:DTYPE is one in another dtype')
  parser.add_argument('--tunix', default=sys.executable, help='interpreter that has google-tunix')
  parser.add_argument('--slots', type=int, default=64)
  parser.add_argument('--chunk', type=int, default=16)
  parser.add_argument('--cache_block', type=int, default=64, help='the fewer sizes, the fewer '
                      'programs')
  parser.add_argument('--devices', type=int, default=1, help='CPU devices to split the rows over')
  parser.add_argument('--variable', action='store_true')
  parser.add_argument('--shared', action='store_true')
  parser.add_argument('--sequences', type=int, default=256)
  parser.add_argument('--mean', type=float, default=150.0)
  parser.add_argument('--limit', type=int, default=512)
  parser.add_argument('--side', default='', help=argparse.SUPPRESS)
  parser.add_argument('--folder', default='', help=argparse.SUPPRESS)
  return parser.parse_args(argv)


if __name__ == '__main__':
  main()
