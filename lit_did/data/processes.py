"""Calls a function in several fresh Python processes.

They are neither forked (which may deadlock beside the threads of CUDA and of process groups) nor started by
`multiprocessing` (which would run the user's script again). So scripts need no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import Any

# -P: a file in the working folder must not hide a module
_COMMAND = [sys.executable, "-P", "-c", "from lit_did.data.processes import answer; answer()"]


def ask_processes(function: Callable[[Any], Any], parts: Iterable[Any], num_proc: int) -> Iterator[Any]:
    """Yields `function(part)` for each part, in order.

    Args:
        function: It and the parts are pickled.
        parts: What to call it with. At most twice `num_proc` are taken ahead.
        num_proc: The number of processes.

    Raises:
        RuntimeError: If a process ended, for example because memory ran out.
        Exception: What `function` raises, for the first part for which it does.
    """
    idle: SimpleQueue[subprocess.Popen] = SimpleQueue()

    def ask(part: Any) -> Any:
        process = idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(part, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError) as error:
            raise RuntimeError(
                f"Expected a process that tokenises to answer, but it ended with code {process.wait()}. If memory ran "
                "out, pass a smaller `num_proc`."
            ) from error
        finally:
            idle.put(process)

    with ExitStack() as stack:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
        for _ in range(num_proc):
            pipe = subprocess.PIPE
            process = subprocess.Popen(_COMMAND, env=environment, stdin=pipe, stdout=pipe)
            stack.callback(_end, process)
            idle.put(process)
        threads = stack.enter_context(ThreadPoolExecutor(num_proc))
        for process in [idle.get() for _ in range(num_proc)]:
            assert process.stdin is not None
            pickle.dump(function, process.stdin)
            idle.put(process)
        answers: deque[Future] = deque()
        for part in parts:
            answers.append(threads.submit(ask, part))
            if len(answers) > 2 * num_proc:
                yield _value(answers.popleft())
        while answers:
            yield _value(answers.popleft())


def _end(process: subprocess.Popen) -> None:
    process.kill()
    with suppress(OSError):  # what a process that ended did not read
        process.communicate()


def _value(answer: Future) -> Any:
    value = answer.result()
    if isinstance(value, Exception):
        raise value
    return value


def answer() -> None:
    """Runs in each process: reads the function and then parts from the standard input, and writes what it returns."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    function = pickle.load(sys.stdin.buffer)
    while True:
        try:
            part = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            value = function(part)
        except Exception as error:  # raised again where the part came from
            value = error
        pickle.dump(value, output)
        output.flush()
