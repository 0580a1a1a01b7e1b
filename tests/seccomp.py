"""Seccomp filters as containers and sandboxes install them, made with ctypes.

Run as a program: installs the filters named by its first argument (joined by commas)
and then runs pytest with the rest.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys

CLONE, CLONE3, CLOSE_RANGE, PIDFD_OPEN, WAITID, TIMERFD_CREATE, TIMERFD_SETTIME, EPOLL_CTL, FORK, VFORK = (
    (56, 435, 436, 434, 247, 283, 286, 233, 57, 58)
    if platform.machine() == "x86_64"
    else (220, 435, 436, 434, 95, 85, 86, 21, 0, 0)
)
CLONE_VM, CLONE_VFORK, CLONE_THREAD = 0x100, 0x4000, 0x10000
EPOLL_CTL_ADD = 1

# linux/filter.h, linux/seccomp.h
LOAD_WORD, AND, JUMP_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
NUMBER_OFFSET, FIRST_ARGUMENT_OFFSET, SECOND_ARGUMENT_OFFSET = 0, 16, 24
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand."""


def refuse(number: int, error: int) -> list[Instruction]:
    """Let a system call fail."""
    return [(LOAD_WORD, 0, 0, NUMBER_OFFSET), (JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | error)]


def refuse_flags(
    number: int, mask: int, value: int, error: int, offset: int = FIRST_ARGUMENT_OFFSET
) -> list[Instruction]:
    """Let a system call fail if an argument has these flags."""
    return [
        (LOAD_WORD, 0, 0, NUMBER_OFFSET),
        (JUMP_EQUAL, 0, 4, number),
        (LOAD_WORD, 0, 0, offset),
        (AND, 0, 0, mask),
        (JUMP_EQUAL, 0, 1, value),
        (RETURN, 0, 0, ERRNO | error),
    ]


DETACHED = refuse_flags(CLONE, CLONE_VM | CLONE_VFORK | CLONE_THREAD, CLONE_VM, errno.EINVAL)
NO_PROCESSES = [
    *refuse_flags(CLONE, CLONE_THREAD, 0, errno.EPERM),
    *refuse(CLONE3, errno.ENOSYS),
    *(refuse(FORK, errno.EPERM) + refuse(VFORK, errno.EPERM) if FORK else []),
]
FILTERS = {
    "clone3-enosys": refuse(CLONE3, errno.ENOSYS),
    "clone3-eperm": refuse(CLONE3, errno.EPERM),
    "close_range-enosys": refuse(CLOSE_RANGE, errno.ENOSYS),
    "pidfd_open-eperm": refuse(PIDFD_OPEN, errno.EPERM),
    "waitid-eperm": refuse(WAITID, errno.EPERM),
    "timerfd-enosys": refuse(TIMERFD_CREATE, errno.ENOSYS),
    "timerfd_settime-eperm": refuse(TIMERFD_SETTIME, errno.EPERM),
    "epoll_add-enospc": refuse_flags(EPOLL_CTL, 0xFF, EPOLL_CTL_ADD, errno.ENOSPC, SECOND_ARGUMENT_OFFSET),
    "detached-einval": DETACHED,
    "no-processes": NO_PROCESSES,
}


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(name: str) -> None:
    """Install one filter for this thread and what it starts from now on."""
    instructions = [*FILTERS[name], (RETURN, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    program = Program(len(instructions), code)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    import pytest

    for _name in sys.argv[1].split(","):
        install(_name)
    sys.exit(pytest.main(sys.argv[2:]))
