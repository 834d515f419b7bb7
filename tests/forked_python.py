"""A program in the place of Python, for programs that start `python` themselves: its arguments run in a fork of the fork server.

It passes signals on to the fork and ends as the fork ends. What cannot run in a fork runs in the interpreter as usual.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str, arguments: list[str]) -> None:
    """address: of the socket in the abstract namespace at which the tests' process listens, without its first byte."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # the fork may be known to others before it is known here
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(f"\0{address}")
        request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
        reply, descriptors, _, _ = socket.recv_fds(connection, 32, 1)
    if not descriptors:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.execv(sys.executable, [sys.executable, *arguments])
    pid = int(reply)

    def pass_on(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and its status is about to be read
            os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = int(os.read(descriptors[0], 16) or 1)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
