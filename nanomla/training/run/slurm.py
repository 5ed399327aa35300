"""
What slurm/train.sbatch asks about its job before it starts train.py.

    python -m nanomla.training.run.slurm check PROCESSES [config/x.py] [--key=value]
    python -m nanomla.training.run.slurm meet NODE [NODE_ADDRESS]
    python -m nanomla.training.run.slurm reach ADDRESS

`check` prints the run's out_dir, or one line about what cannot run. `meet` prints an address of the
first node that others can reach, `reach` the address by which this node reaches it and the network
interface that has it. Nothing here imports torch.
"""

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from nanomla.core.configurator import UserError, configure
from nanomla.training.launch import share_batch
from nanomla.training.run.folder import NOT_OF_A_RUN, first_line

ANY_PORT = 9  # nothing is sent there
ELSEWHERE = '192.0.2.1'  # an address that no host has (RFC 5737), beyond the default route
SIOCGIFADDR = 0x8915  # Linux: the address of an interface


# -------------------------------------------------------------------------------------------------
# the run


def check(processes: int, words: Sequence[str]) -> str:
    """
    Return the out_dir of a command line of the train.py in the current folder.

    processes: how many will share the run, 0 where that is not known. UserError for settings that
    are none, a batch that cannot be shared, and a run in out_dir that this one does not go on with.
    """
    config = configure({'__file__': 'train.py'}, words, classes='attentions')
    out, init_from = Path(config['out_dir']), config['init_from']
    saved = os.path.exists(out / 'last.pt')
    is_first = int(os.environ.get('SLURM_RESTART_COUNT') or 0) == 0
    if saved and is_first and init_from not in ('auto', 'resume', 'scratch'):
        raise UserError(
            f'--out_dir={out} holds a run already: go on with it by --init_from=resume, or name '
            f'another folder to begin from {init_from} again'
        )
    if saved and init_from in ('auto', 'resume'):
        settings = first_line(out / 'log.jsonl').get('config')
        if isinstance(settings, dict):
            config.adopt(settings, out / 'log.jsonl', but=NOT_OF_A_RUN)
    if processes:
        share_batch(config['batch_size'], config['gradient_accumulation_steps'], processes)
    return str(out)


# -------------------------------------------------------------------------------------------------
# the network


def meet(node: str, node_address: str = '') -> str:
    """
    Return an address of this host, the first node, that the other nodes can reach.

    node: its name; node_address: what SLURM reaches it by, an address or another name. Where no
    name resolves, it is the address of the default route.
    """
    for name in (node_address, node):
        address = resolve(name)
        if address:
            return address
    address = own_address(ELSEWHERE)
    if not address:
        raise UserError(
            f'no address of {node} is known: set MASTER_ADDR to one that all nodes can reach'
        )
    return address


def resolve(name: str) -> str:
    """Return the IPv4 address of a name, '' where it has none or only the loopback."""
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM) if name else []
    except OSError:
        return ''
    addresses = [address for *_, (address, _port) in found]
    outside = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    return outside[0] if outside else ''


def own_address(peer: str) -> str:
    """Return the address by which this host reaches `peer`, '' where it has no way there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, ANY_PORT))
        except OSError:
            return ''
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """Return the network interface that has an address, '' where none has or cannot be asked."""
    try:
        import fcntl
    except ImportError:  # Windows
        return ''
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack('256s', name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ''


def main() -> None:
    match sys.argv[1:]:
        case ['check', processes, *words]:
            print(check(int(processes), words))
        case ['meet', node, *address]:
            print(meet(node, *address))
        case ['reach', address]:
            own = own_address(address)
            print(own, interface_of(own))


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(error.exit_code)
