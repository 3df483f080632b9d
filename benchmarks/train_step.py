# SPDX-License-Identifier: Apache-2.0
"""The policy-gradient step against the same loss in torch: speed, peak memory, gradient norm.

    python benchmarks/train_step.py                         8 x 512 tokens, gradient only
    python benchmarks/train_step.py --optimizer adamw       the whole update
    python benchmarks/train_step.py --model=qwen2.5-1.5b --rows=4 --tokens=4096 --dtype=bfloat16 \\
        --attention=cudnn --micro_batch_tokens=16384 --chunk=4096 --steps=5 --peak_tflops=989 \\
        --sides=jax_dots --rounds=1                         on an NVIDIA H100, with its MFU

Model: the sizes of SmolLM2-135M (or Qwen2.5-1.5B) with random weights; where torch takes part they
are written once as a Hugging Face directory that every side reads. Torch runs the `transformers`
model with `sdpa` attention, with and without gradient checkpointing. Every measurement is a process
of its own (its peak resident memory is the one printed), and the sides take turns. Times of shared
machines differ from run to run; the ratios and the CPU seconds (user and system, all threads) are
what to compare. MFU counts 6 operations per parameter and token and the attention's own products,
and no recomputation (PaLM, arXiv:2204.02311, appendix B).
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SMOLLM2 = dict(family='llama', vocab=49152, embed=576, layers=30, heads=9, kv_heads=3, head_dim=64,
               ffn=1536, rope_theta=1e5, tied=True, max_positions=8192)
QWEN = dict(family='qwen2', vocab=151936, embed=1536, layers=28, heads=12, kv_heads=2, head_dim=128,
            ffn=8960, rope_theta=1e6, qkv_bias=True, tied=True, max_positions=32768)
MODELS = {'smollm2': SMOLLM2, 'qwen2.5-1.5b': QWEN}
# The second word of a jax side is what its backward pass keeps: `remat` of the decoder.
SIDES = ('jax_full', 'jax_dots', 'torch', 'torch_checkpointing')
LEARNING_RATE = 1e-6


def main() -> None:
  flags = _flags()
  if flags.side:
    result = _jax(flags) if flags.side.startswith('jax') else _torch(flags)
    print(json.dumps(result | {'peak_gib': _peak_gib()}))
    return
  with tempfile.TemporaryDirectory() as folder:
    folder = flags.folder or folder
    if 'torch' in flags.sides:
      subprocess.run([*_command(folder, flags), '--side=jax_full', '--make'], check=True,
                     stdout=subprocess.DEVNULL)
    results = {side: [] for side in flags.sides.split(',')}
    for number in range(flags.rounds):
      for side in results:
        out = subprocess.run([*_command(folder, flags), f'--side={side}'], check=True,
                             stdout=subprocess.PIPE, text=True).stdout
        results[side].append(json.loads(out.splitlines()[-1]))
        print(f'round {number} {side:20s} {results[side][-1]}', flush=True)
  _report(results, flags)


def _report(results, flags) -> None:
  print(f'\n{flags.rows} x {flags.tokens} tokens, optimizer {flags.optimizer}, '
        f'{flags.rounds} rounds; medians')
  print(f'{"side":20s} {"wall s":>8s} {"cpu s":>8s} {"peak GiB":>9s} {"gradient norm":>14s}')
  middle = {}
  for side, runs in results.items():
    middle[side] = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
    m = middle[side]
    print(f'{side:20s} {m["wall_s"]:8.2f} {m["cpu_s"]:8.2f} {m["peak_gib"]:9.2f} '
          f'{m["grad_norm"]:14.6f}' + (f'  MFU {m["mfu"]:.0%}' if 'mfu' in m else ''))
  torch = [m for side, m in middle.items() if side.startswith('torch')]
  for side in middle:
    if side.startswith('jax') and torch:
      ratios = [min(m[clock] for m in torch) / middle[side][clock] for clock in ('wall_s', 'cpu_s')]
      print(f'faster torch / {side}: wall {ratios[0]:.2f}, cpu {ratios[1]:.2f}')


def _jax(flags) -> dict:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  import jax
  import optax

  from absolute_zero_jax import learner, reinforce
  from absolute_zero_jax.models import config, decoder, hf

  folder = pathlib.Path(flags.folder)
  model = config.ModelConfig(**MODELS[flags.model])
  # Moves nothing: what is timed is the gradient.
  tx = (learner.make_optimizer(LEARNING_RATE) if flags.optimizer == 'adamw'
        else optax.set_to_zero())
  algorithm = reinforce.get('reinforce_plus_plus', aggregation='token')
  trainer = learner.of_decoder(model, tx, algorithm, remat=flags.side[4:], dtype=flags.dtype,
                               attention=flags.attention, chunk=flags.chunk,
                               micro_batch_tokens=flags.micro_batch_tokens)
  work = trainer.prepare(_rows(flags, learner.Row), None)
  if flags.make:
    # The torch sides train on exactly these weights and numbers.
    hf.save(model, decoder.init(model, jax.random.key(0)), folder / 'model')
    np.savez(folder / 'batch.npz', *(
        np.concatenate([getattr(b, name) for b in work.parts[0]])
        for name in ('tokens_BT', 'mask_BT', 'advantages_BT', 'weights_BT')))
    return {}
  made = (folder / 'model').exists()
  state = trainer.init(hf.load(folder / 'model')[1] if made else decoder.init(
      model, jax.random.key(0), dtype=flags.param_dtype))

  def step():
    nonlocal state
    state, metrics = trainer.update(state, work)
    return metrics['grad_norm']
  out = _time(step, flags)
  if flags.peak_tflops:
    c, tokens = model, flags.rows * flags.tokens
    matrices = c.layers * (c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
                           + 3 * c.embed * c.ffn) + c.vocab * c.embed
    attention = 12 * c.layers * c.heads * c.head_dim * flags.tokens / 2     # half is masked
    out['mfu'] = tokens * (6 * matrices + attention) / out['wall_s'] / flags.peak_tflops / 1e12
  return out


def _torch(flags) -> dict:
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  folder = pathlib.Path(flags.folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder / 'model', dtype=torch.float32, attn_implementation='sdpa').train()
  if flags.side == 'torch_checkpointing':
    model.gradient_checkpointing_enable()
  optimizer = (torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
               if flags.optimizer == 'adamw' else None)
  with np.load(folder / 'batch.npz') as f:
    tokens, mask, advantages, weights = (torch.from_numpy(f[f'arr_{i}']) for i in range(4))
  tokens = tokens.long()
  weights = (mask * weights)[:, 1:]
  norm = None

  def step():
    nonlocal norm
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
    ratio = torch.exp(logprobs - logprobs.detach())
    advantage = advantages[:, 1:]
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    (weights * loss).sum().backward()
    if norm is None:        # torch's own float32 norm of 28 million numbers is off by 1e-4
      norm = sum(p.grad.double().square().sum().item() for p in model.parameters())**0.5
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if optimizer:
      optimizer.step()
    return norm
  return _time(step, flags)


def _time(step, flags) -> dict:
  first = step()
  walls, cpus = [], []
  for _ in range(flags.steps):
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    walls.append(time.perf_counter() - wall)
    cpus.append(time.process_time() - cpu)
  return {'wall_s': min(walls), 'cpu_s': min(cpus), 'grad_norm': first}


def _rows(flags, Row):
  """Full rows, an eighth of them prompt; always the same."""
  rng = np.random.default_rng(0)
  prompt = flags.tokens // 8
  out = []
  for i in range(flags.rows):
    ids = rng.integers(100, 40000, flags.tokens).tolist()
    zeros = [0.0] * (flags.tokens - prompt)
    out.append(Row(ids[:prompt], ids[prompt:], zeros, zeros, float(rng.standard_normal()),
                   'deduction', 'solve', i))
  return out


def _peak_gib() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _command(folder, flags) -> list[str]:
  fields = ('rows', 'tokens', 'steps', 'optimizer', 'dtype', 'param_dtype', 'chunk',
            'micro_batch_tokens', 'model', 'attention', 'peak_tflops')
  return [sys.executable, __file__, f'--folder={folder}',
          *(f'--{name}={getattr(flags, name)}' for name in fields)]


def _flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--tokens', type=int, default=512)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--steps', type=int, default=1, help='timed per process; best counts')
  parser.add_argument('--optimizer', choices=('none', 'adamw'), default='none')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--param_dtype', default='float32', help='where torch takes no part')
  parser.add_argument('--model', choices=MODELS, default='smollm2')
  parser.add_argument('--attention', default='xla')
  parser.add_argument('--peak_tflops', type=float, default=0.0, help='of the chip; prints the MFU')
  parser.add_argument('--chunk', type=int, default=0)
  parser.add_argument('--micro_batch_tokens', type=int, default=4096)
  parser.add_argument('--sides', default=','.join(SIDES))
  parser.add_argument('--folder', default='', help='kept between runs; default: a temporary one')
  parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
  parser.add_argument('--make', action='store_true', help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == '__main__':
  main()
