"""Several hosts on one machine: each a process tree with its own network, process ids, name, sshd, /tmp and /dev/shm.

The hosts hang on a switch in a network namespace of its own, so nothing is added to the machine's network, and they
reach nothing but each other. Namespaces have no names: they end with the processes that live in them, and those end
with the process that made the cluster, however it ends. The disk is shared, as a cluster file system is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.waiting import HANG_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.3"
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh")
TRIAL = """\
set -e
mount -t proc proc /proc
mount -t tmpfs trial /run
ip link add bridge type bridge
ip link add one type veth peer name two
"""
SSHD_CONFIG = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile .ssh/authorized_keys
PidFile none
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
MaxSessions 100
LogLevel ERROR
"""
SSH_CONFIG = """\
Host *
  User root
  IdentityFile ~/.ssh/id_ed25519
  StrictHostKeyChecking yes
  LogLevel ERROR
"""


def reason_against() -> str:
    """Return why this machine cannot have hosts, an empty text if it can."""
    if os.geteuid() != 0:
        return "needs root (network and process namespaces)"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"needs {', '.join(missing)} (packages openssh-server, pdsh, iproute2, util-linux)"
    kinds = ["--net", "--pid", "--uts", "--ipc", "--mount", "--propagation", "private"]
    trial = subprocess.run(
        ["unshare", *kinds, "--fork", "bash", "-c", TRIAL], capture_output=True, text=True, check=False
    )
    return "" if trial.returncode == 0 else f"this machine allows no hosts in namespaces: {trial.stderr.strip()}"


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process, as this machine counts."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """Return the parent of a process, as this machine counts."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@dataclass
class Host:
    """One host.

    Args:
        name: Its host name.
        address: Its address.
        shell: The process that holds its namespaces; its one child is the host's process 1.
        port: Its end of the link on the switch.
    """

    name: str
    address: str
    shell: subprocess.Popen[str]
    port: str

    @property
    def init(self) -> int:
        """The host's process 1, as this machine counts; 0 when the host is down."""
        return next(iter(children_of(self.shell.pid)), 0)

    def processes(self) -> dict[int, str]:
        """Return command lines of everything on the host but process 1, sshd's listener and daemons, by pid."""
        space = _link(self.init, "pid") if self.init else None
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            pid = int(entry.name) if entry.name.isdigit() else 0
            if pid in (0, self.init) or space is None or _link(pid, "pid") != space:
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if words and state != "Z":
                    found[pid] = words
        return found

    def leftovers(self) -> dict[int, str]:
        """Return what a launch left on the host: every process but the daemons and sshd's ends of connections."""
        own = re.compile(r"sshd: |/usr/sbin/(sshd -D|munged|slurmd|slurmctld)|slurmctld: slurmscriptd")
        return {pid: words for pid, words in self.processes().items() if not own.match(words)}


def _link(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


@dataclass
class Cluster:
    """Hosts ``node1`` ... ``nodeN`` on one switch, with one disk.

    Args:
        folder: Shared folder: keys, host descriptions, logs, and room for the tests' files.
        num_hosts: How many.
        daemons: Commands that a host starts when it boots, given its name.
    """

    folder: Path
    num_hosts: int
    daemons: Callable[[str], Sequence[Sequence[str]]] = lambda _name: ()
    hosts: dict[str, Host] = field(default_factory=dict)
    _switch: subprocess.Popen[str] | None = None
    _boots: int = 0

    @property
    def names(self) -> list[str]:
        """Names of the hosts, first to last."""
        return [f"node{number}" for number in range(1, self.num_hosts + 1)]

    def address(self, name: str) -> str:
        """Return the address of a host."""
        return f"{NETWORK}.{10 + self.names.index(name)}"

    def card(self, name: str) -> str:
        """Return the hardware address of a host's network card: the same after every boot, as others remember it."""
        return f"02:00:00:00:00:{10 + self.names.index(name):02x}"

    def start(self) -> None:
        """Bring everything up."""
        self._write_identities()
        self._switch = subprocess.Popen(
            _bound("unshare", "--net", "--fork", "--kill-child=KILL", "sleep", "infinity"), text=True
        )
        _await_namespace(self._switch.pid)
        self._on_switch("link add bridge type bridge", "link set bridge up", "link set lo up")
        for name in self.names:
            self.boot(name)

    def stop(self) -> None:
        """End every process of the cluster; the namespaces and links go with them."""
        for host in self.hosts.values():
            host.shell.kill()
        if self._switch is not None:
            self._switch.kill()
        for process in [host.shell for host in self.hosts.values()] + [self._switch]:
            if process is not None:
                process.wait()
        self.hosts.clear()

    def boot(self, name: str) -> None:
        """Start a host that is not up."""
        assert self._switch is not None
        spec = self.folder / name / "host.json"
        with open(self.folder / name / "console.log", "ab") as console:
            kinds = ("--net", "--uts", "--ipc", "--pid", "--mount", "--propagation", "private")
            words = ("unshare", *kinds, "--fork", "--kill-child=KILL", sys.executable, "-I")
            shell = subprocess.Popen(
                _bound(*words, str(Path(__file__).with_name("host_init.py")), str(spec)),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=console, text=True, env=self.environment(),
            )  # fmt: skip
        _await_namespace(shell.pid)
        self._boots += 1
        port = f"{name}-{self._boots}"  # the kernel takes its time to remove the link of a host that crashed
        self._on_switch(
            f"link add {port} type veth peer name eth0 address {self.card(name)} netns {shell.pid}",
            f"link set {port} master bridge",
            f"link set {port} up",
        )
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write("go\n")
        shell.stdin.flush()
        answer = shell.stdout.readline()
        assert answer == "ready\n", (self.folder / name / "console.log").read_text()
        self.hosts[name] = Host(name, self.address(name), shell, port)

    def popen(self, name: str, words: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command on a host; its standard output and error are pipes unless ``options`` say otherwise."""
        init = self.hosts[name].init
        enter = ["nsenter", "-t", str(init), "-m", "-u", "-i", "-n", "-p", f"--wd={options.pop('cwd', self.folder)}"]
        given: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": self.environment()}
        return subprocess.Popen([*enter, "--", *words], text=True, **{**given, **options})  # type: ignore[call-overload,no-any-return]

    def run(self, name: str, words: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end."""
        process = self.popen(name, words, **options)
        try:
            out, err = process.communicate(timeout=HANG_S)
        finally:
            for child in [*children_of(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.wait()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def environment(self) -> dict[str, str]:
        """Return what a user has set on a host."""
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": "/root", "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT), "COLUMNS": "200", "TERM": "dumb",
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }  # fmt: skip

    def crash(self, name: str) -> None:
        """End every process of a host at once; the kernel closes its connections."""
        os.kill(self.hosts[name].init, signal.SIGKILL)
        self.hosts[name].shell.wait()

    def cut(self, name: str) -> None:
        """Take a host's link away; its processes live on."""
        self._on_switch(f"link set {self.hosts[name].port} down")

    def heal(self, name: str) -> None:
        """Give a host its link back."""
        self._on_switch(f"link set {self.hosts[name].port} up")

    def repair(self) -> None:
        """Give every host its link back and boot those that are down, for the next test."""
        for name, host in self.hosts.items():
            if host.init:
                self.heal(name)
            else:
                self.boot(name)
        for host in self.hosts.values():
            for pid in host.leftovers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _on_switch(self, *lines: str) -> None:
        assert self._switch is not None
        words = ["nsenter", "-t", str(self._switch.pid), "-n", "ip", "-batch", "-"]
        subprocess.run(words, input="\n".join(lines) + "\n", text=True, check=True)

    def _write_identities(self) -> None:
        """Write keys, the hosts file, and one folder per host."""
        ssh = self.folder / "ssh"
        ssh.mkdir(parents=True)
        _make_key(ssh / "id_ed25519")
        shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
        (ssh / "config").write_text(SSH_CONFIG)
        known, table = [], ["127.0.0.1 localhost"]
        for name in self.names:
            own = self.folder / name
            own.mkdir()
            _make_key(own / "host_key")
            address = self.address(name)
            known.append(f"{name},{address} {(own / 'host_key.pub').read_text()}")
            table.append(f"{address} {name}")
            (own / "sshd_config").write_text(SSHD_CONFIG.format(address=address, folder=own))
            shared = [self.folder, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
            spec = {
                "name": name, "address": address, "shared": sorted({str(path.resolve()) for path in shared}),
                "daemons": [list(command) for command in self.daemons(name)],
            }  # fmt: skip
            (own / "host.json").write_text(json.dumps(spec))
        (ssh / "known_hosts").write_text("".join(known))
        (self.folder / "hosts").write_text("\n".join(table) + "\n")


def _bound(*words: str) -> list[str]:
    """Return a command that the kernel kills when this process ends, however it ends."""
    return ["setpriv", "--pdeathsig", "KILL", *words]


def _await_namespace(pid: int) -> None:
    """Wait until a process has left this machine's network namespace."""
    wait_until(lambda: _link(pid, "net") not in ("", _link(os.getpid(), "net")), "a network namespace")


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.parent.name, "-f", path], check=True)


@contextlib.contextmanager
def cluster(
    folder: Path, num_hosts: int, daemons: Callable[[str], Sequence[Sequence[str]]] = lambda _name: ()
) -> Iterator[Cluster]:
    """Yield a running cluster and take it down."""
    made = Cluster(folder, num_hosts, daemons)
    try:
        made.start()
        yield made
    finally:
        made.stop()
