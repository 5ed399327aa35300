"""The recipe of docs/clusters.md for two hosts whose names do not resolve: network namespaces."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import PATIENCE, ROOT, TEXT, TINY, log, words

from nanomla.core import token_files

A, B = '10.77.0.1', '10.77.0.2'


def ip(command):
    subprocess.run(['ip', *command.split()], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them."""
    one, two = f'nanomla-{os.getpid()}-a', f'nanomla-{os.getpid()}-b'
    try:
        ip(f'netns add {one}')
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('needs network namespaces')
    try:
        ip(f'netns add {two}')
        ip(f'link add left netns {one} type veth peer name right netns {two}')
        for name, link, address in ((one, 'left', A), (two, 'right', B)):
            ip(f'-n {name} addr add {address}/24 dev {link}')
            ip(f'-n {name} link set {link} up')
            ip(f'-n {name} link set lo up')
        yield one, two
    finally:
        for name in (one, two):
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def on_host(name, command, **options):
    """Start a command on a host, whose name nobody can resolve."""
    renamed = ['unshare', '--uts', 'sh', '-c', f'hostname no-such-host-{name[-1]}; exec "$@"', 'sh']
    return subprocess.Popen(['ip', 'netns', 'exec', name, *renamed, *command], **options)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('unshare'), reason='needs network namespaces')
def test_two_hosts_without_names_train_together(hosts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    token_files.write_text(tmp_path / 'text', TEXT, 'char', 'A tale of a cat')
    started = []
    ends = [(hosts[0], A, 'left', 'true'), (hosts[1], B, 'right', 'false')]
    for name, address, link, is_host in ends:
        asking = [sys.executable, '-m', 'nanomla.training.run.slurm', 'reach', A]
        answer, _ = on_host(name, asking, stdout=subprocess.PIPE, text=True).communicate()
        assert answer.split() == [address, link]
        recipe = [
            *(sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1'),
            *('--rdzv_backend=c10d', f'--rdzv_endpoint={A}:29500', '--rdzv_id=7'),
            *(f'--rdzv_conf=is_host={is_host}', f'--local_addr={address}'),
            *(str(ROOT / 'train.py'), *words(TINY | dict(gradient_accumulation_steps=2))),
        ]
        environment = os.environ | dict(GLOO_SOCKET_IFNAME=link, OMP_NUM_THREADS='1')
        with open(f'{link}.txt', 'w') as output:
            started.append(
                on_host(name, recipe, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    assert [process.wait(PATIENCE) for process in started] == [0, 0]
    assert log()[0]['world'] == 2 and log()[-1]['why'] == 'max_iters reached'
