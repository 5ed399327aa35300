"""
Python programs in processes of their own that need not wait for `import torch`.

A server imports it once, and what scripts of the repository import of it. Each program is a fork
of the server, with arguments, folder, environment, standard streams, signals and an exit code of
its own. With the fixture `forked_python` that is what subprocess does for
[sys.executable, script, ...], in tests and in what they call.

Left out is what Python does before the first line of a program, and an import that the server has
done takes no time. So some tests start Python all the same, one of train.py among them. Pictures
have a sixteenth of their pixels.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import TextIO

PATIENCE = 300  # seconds that an event may take on a busy machine; tests wait for it, not for them
CAN_FORK = sys.platform == 'linux'  # torch does not survive a fork on a Mac
FEW_DOTS = 40  # an inch, of a picture whose pixels no test looks at
BLANK_PICTURES = 'BLANK_PICTURES'  # a variable of programs whose pictures may be blank
LARGEST_MESSAGE = 2**17  # bytes; above all the environment
FORK_ITS_PROGRAMS = 'FORK_ITS_PROGRAMS'  # a variable of a program whose own are to be forked, too
real_popen = subprocess.Popen

ROOT = Path(__file__).resolve().parents[1]
OF_THE_REPOSITORY = ('attentions', 'model', 'model_mla', 'nanomla')
WHAT_SCRIPTS_IMPORT = (
    'nanomla.adapters.lora',
    'nanomla.checkpoints.load',
    'nanomla.core.figures',
    'nanomla.inference.generate',
    'nanomla.training.next_steps',
    'nanomla.training.run.saving',
    'nanomla.training.teacher.cache',
    'nanomla.training.trainer',
)


# -------------------------------------------------------------------------------------------------
# in the process of the tests


class Server:
    """The process that has imported torch. It starts when it is first asked for something."""

    def __init__(self):
        self.process = None

    def start(self) -> None:
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
        environment.pop('PYTHONPATH', None)  # each program has its own
        with theirs:
            self.process = real_popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of reach of Ctrl-C
            )

    def ask(self, request: dict, files=()) -> int | None:
        if self.process is None:
            self.start()
        socket.send_fds(self.connection, [json.dumps(request).encode()], files)
        return json.loads(self.connection.recv(LARGEST_MESSAGE))

    def close(self) -> None:
        """End the server and all programs that still run."""
        if self.process is not None:
            self.connection.close()
            self.process.wait()
            self.process = None


SERVER = Server()


class Popen:
    """
    subprocess.Popen, whose place it can take, for Python programs: forks of the server.

    Other commands, and Python with options of its own, are left to subprocess.Popen.
    """

    def __new__(cls, args, **options):
        if is_program(args) and CAN_FORK:
            return super().__new__(cls)
        return real_popen(args, **options)

    def __init__(
        self,
        args,
        stdin=None,
        stdout=None,
        stderr=None,
        cwd=None,
        env=None,
        start_new_session=False,
        text=False,
        encoding=None,
        errors=None,
    ):
        self.args = args
        self.returncode = None
        mode = dict(encoding=encoding, errors=errors)
        if not (text or encoding or errors):
            mode = None
        ins, self.stdin = open_stream(0, stdin, mode)
        outs, self.stdout = open_stream(1, stdout, mode)
        errs, self.stderr = open_stream(2, outs if stderr == STDOUT else stderr, mode)
        request = dict(
            words=[str(word) for word in args[1:]],
            cwd=str(cwd or os.getcwd()),
            env={name: str(value) for name, value in (env or os.environ).items()},
            new_session=start_new_session,
        )
        self.pid = SERVER.ask(request, [ins, outs, errs])
        for file in (ins, outs, errs):
            os.close(file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = SERVER.ask(dict(poll=self.pid))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        began = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, input=None, timeout: float | None = None) -> tuple:
        """Write `input` and return the rest of stdout and of stderr, once the program has ended."""
        if self.stdin is not None:
            with self.stdin:
                if input:
                    self.stdin.write(input)
        with ThreadPoolExecutor(2) as pool:
            outs, errs = (pool.submit(read_all, file) for file in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # which ends its output
                raise
        return outs.result(), errs.result()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def is_program(command) -> bool:
    """Return whether this is [sys.executable, script or -c or -m or -u, ...]."""
    if isinstance(command, (str, os.PathLike)) or len(command) < 2:
        return False
    python, first, *_ = map(str, command)
    return python == sys.executable and (first in ('-c', '-m', '-u') or not first.startswith('-'))


def open_stream(number: int, wanted, mode: dict | None) -> tuple[int, object]:
    """
    Return a file descriptor for a program's standard stream, and our end where it is a pipe.

    mode: encoding and errors of a text; None for bytes.
    """
    if wanted == PIPE:
        reader, writer = os.pipe()
        theirs, ours, direction = writer, reader, 'r'
        if number == 0:
            theirs, ours, direction = reader, writer, 'w'
        if mode is None:
            return theirs, open(ours, direction + 'b')
        return theirs, open(ours, direction, **mode)
    if wanted == DEVNULL:
        return os.open(os.devnull, os.O_RDWR), None
    if wanted is None:
        wanted = number
    elif not isinstance(wanted, int):
        wanted = wanted.fileno()
    return os.dup(wanted), None


def read_all(stream):
    """Return the rest of a stream and close it; None for no stream, or one that is closed."""
    if stream is None or stream.closed:
        return None
    with stream:
        return stream.read()


# -------------------------------------------------------------------------------------------------
# in the server


def serve(connection: socket.socket) -> list[str] | None:
    """Fork what is asked for. Returns the words of a program in the program's process alone."""
    running = set()
    while True:
        message, files, _, _ = socket.recv_fds(connection, LARGEST_MESSAGE, 3)
        if not message:
            break
        request = json.loads(message)
        if 'poll' in request:
            code = exit_code(request['poll'])
            if code is not None:
                running.discard(request['poll'])
            connection.send(json.dumps(code).encode())
            continue
        child = os.fork()
        if not child:
            connection.close()
            become(request, files)
            return request['words']
        running.add(child)
        for file in files:
            os.close(file)
        connection.send(json.dumps(child).encode())
    for child in running:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


def exit_code(child: int) -> int | None:
    """Return the exit code of a child, None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def become(request: dict, files: list[int]) -> None:
    """Take over the streams, the session, the folder and the environment of a program."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # The server's own remember whether they could seek.
    sys.stdin = sys.__stdin__ = reopened(sys.stdin, 'r')
    sys.stdout = sys.__stdout__ = reopened(sys.stdout, 'w')
    sys.stderr = sys.__stderr__ = reopened(sys.stderr, 'w', buffering=1)
    if request['new_session']:
        os.setsid()
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['env'])
    if os.environ.get('PYTHONFAULTHANDLER'):
        faulthandler.enable()


def reopened(stream: TextIO, mode: str, **options) -> TextIO:
    """Return a new stream like this one on its file descriptor."""
    return open(
        stream.fileno(),
        mode,
        encoding=stream.encoding,
        errors=stream.errors,
        closefd=False,
        **options,
    )


def execute(words: list[str]) -> None:
    """Do what `python words` does, in this process."""
    first, *arguments = words
    if first == '-u':
        sys.stdout.reconfigure(write_through=True)
        first, *arguments = arguments
    folder = str(Path(first).parent)
    if first in ('-c', '-m'):
        folder, what, *arguments = os.getcwd(), *arguments
    paths = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    sys.path[:1] = [folder, *filter(None, paths)]
    if Path(folder).resolve() != ROOT:
        forget_the_repository()
    sys.argv = [first, *arguments]
    if first == '-c':
        main = sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(what, '<string>', 'exec'), main.__dict__)
    elif first == '-m':
        runpy.run_module(what, run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(first, run_name='__main__')


def end_of(program: Callable[[], None]) -> int:
    """Run a program as Python does and return the exit code; its excepthook ends an error."""
    try:
        program()
        return 0
    except SystemExit as error:
        end = error
    except BaseException:
        try:
            sys.excepthook(*sys.exc_info())
            return 1
        except SystemExit as error:
            end = error
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return 1
    return end.code or 0


def fork_its_programs() -> list[str] | None:
    """
    Let a program's own Python programs be forks, too: of a server that is a fork of the program.

    Returns None in the program, and in each of those programs its words.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = os.fork()
    if not server:
        ours.close()
        words = serve(theirs)
        if words is None:
            os._exit(0)
        return words
    theirs.close()
    SERVER.connection, SERVER.process = ours, ProcessOf(server)
    subprocess.Popen = Popen
    atexit.register(SERVER.close)
    return None


@dataclass
class ProcessOf:
    """A child of this process, as far as Server.close needs it."""

    pid: int

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


def draw_small_pictures() -> None:
    import matplotlib.backends.backend_agg  # noqa: F401
    from matplotlib.figure import Figure

    save = Figure.savefig

    def savefig(figure, *args, **options):
        if BLANK_PICTURES in os.environ:
            figure = Figure(figsize=figure.get_size_inches())
        save(figure, *args, **options, dpi=FEW_DOTS)

    Figure.savefig = savefig


def import_the_repository() -> None:
    """Import what most scripts do: half of the time of a short one."""
    sys.path.insert(0, str(ROOT))
    for name in WHAT_SCRIPTS_IMPORT:
        importlib.import_module(name)
    sys.path.remove(str(ROOT))


def forget_the_repository() -> None:
    """Let a program of another folder import what it finds: that may be a copy."""
    for name in list(sys.modules):
        if name.partition('.')[0] in OF_THE_REPOSITORY:
            del sys.modules[name]


def main() -> None:
    import torch._dynamo  # noqa: F401  (an optimizer imports it, which takes as long as torch)

    import_the_repository()
    draw_small_pictures()
    gc.freeze()  # a collection in a program would copy the memory of all this
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words is not None and FORK_ITS_PROGRAMS in os.environ:
        words = fork_its_programs() or words
    code = 0
    if words is not None:
        code = end_of(lambda: execute(words))
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # Python would take apart all modules, which takes longer than most programs


if __name__ == '__main__':
    main()
