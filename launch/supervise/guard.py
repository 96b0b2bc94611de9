"""The guard of a rank: a small parent process that knows how its rank ends, and ends it when nobody watches any more.

The rank itself cannot say that it was killed, cannot leave while it is stopped (SIGSTOP) or stuck inside a library,
and gets no signal that pdsh or srun do not pass on. Its guard can: it waits for the rank, looks at the launcher's
heartbeat, and tells the launcher what happened. It starts before torch is imported, so it costs a few megabytes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from launch.supervise.heartbeat import LOOK_INTERVAL_S, Heartbeat
from launch.supervise.stop import heeded
from launch.supervise.tree import PR_SET_PDEATHSIG, prctl
from nd_dist.errors import RankFailure

STOPPED_LOOKS = 10
_FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
SIGNAL_HINTS = {
    signal.SIGKILL: "out of memory, or killed by the scheduler or by hand",
    signal.SIGSEGV: "a crash inside a library",
    signal.SIGBUS: "a crash inside a library, or /dev/shm is full",
    signal.SIGABRT: "a library gave up; its message stands in the log",
}

Report = Callable[[str], None]


def fork_rank() -> int:
    """Split into guard and rank: return the rank's process id to the guard, 0 to the rank.

    The kernel kills the rank when its guard dies.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _watched())
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _watched())
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it died before the kernel knew
            os._exit(RankFailure.exit_code)
    return pid


def _watched() -> set[signal.Signals]:
    return {signal.SIGCHLD, *heeded(_FORWARDED)}


class Guard:
    """Watches one rank to its end.

    Args:
        pid: The rank.
        heartbeat: Of the launcher.
        report: Told in one sentence why the rank was lost; not called for a rank that has said how it ended.
        forward_usr1: Whether SIGUSR1 is passed on (MPICH uses it for the survivors of a dead rank).
        has_said_end: Whether the rank has written how it ended; asked when its process is gone.
    """

    def __init__(
        self,
        pid: int,
        heartbeat: Heartbeat,
        report: Report,
        forward_usr1: bool = True,
        has_said_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pid, self._heartbeat, self._report, self._has_said_end = pid, heartbeat, report, has_said_end
        self._forwarded = _FORWARDED if forward_usr1 else _FORWARDED - {signal.SIGUSR1}
        self._looks_stopped = -1
        self._was_told = False
        self._next_look = 0.0

    def watch(self) -> int:
        """Wait for the rank and return its exit code (4 where it was killed, or left with 0 but without a word)."""
        while True:
            got, status = os.waitpid(self._pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if got and os.WIFEXITED(status):
                return self._exited(os.WEXITSTATUS(status))
            if got and os.WIFSIGNALED(status):
                self._report(killed_sentence(os.WTERMSIG(status)))
                return RankFailure.exit_code
            if got:
                self._looks_stopped = 0 if os.WIFSTOPPED(status) else -1
            elif time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + LOOK_INTERVAL_S
                if (code := self._look()) is not None:
                    return code
            else:
                self._pass_on(signal.sigtimedwait(_watched(), LOOK_INTERVAL_S))

    def _exited(self, code: int) -> int:
        """Return the exit code of a rank that left; a library may have ended it (MPI_Abort) without a word."""
        if self._has_said_end():
            return code
        self._report(f"it exited with code {code} and did not say how it ended")
        return code or RankFailure.exit_code

    def _look(self) -> int | None:
        """Look at the launcher and at a stopped rank once; return the exit code if the rank was ended."""
        wanted = self._heartbeat.look()
        if wanted == "end":
            return self._kill("")
        if wanted == "stop" and not self._was_told:
            self._was_told = True
            os.kill(self._pid, signal.SIGTERM)
        if self._looks_stopped >= 0:
            self._looks_stopped += 1
            if self._looks_stopped > STOPPED_LOOKS:
                return self._kill(f"it was stopped (SIGSTOP) and did not go on for {STOPPED_LOOKS} s")
        return None

    def _pass_on(self, info: signal.struct_siginfo | None) -> None:
        """Pass a signal on to the rank."""
        if info is not None and info.si_signo in self._forwarded:
            os.kill(self._pid, signal.SIGTERM if info.si_signo == signal.SIGHUP else info.si_signo)

    def _kill(self, why: str) -> int:
        """End the rank at once."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        if why:
            self._report(why)
        return RankFailure.exit_code


def killed_sentence(number: int) -> str:
    """Return what is known of a rank that a signal ended."""
    name = signal.Signals(number).name
    hint = SIGNAL_HINTS.get(signal.Signals(number), "")
    return f"it was killed by {name}" + (f" ({hint})" if hint else "")
