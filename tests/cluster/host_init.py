"""Process 1 of a simulated host, started in fresh namespaces: ``python host_init.py SPEC.json``.

It waits for ``go`` on standard input (its network card exists then), makes itself a host (name, address, private /tmp,
/root, /run and /dev/shm with the shared folders kept), starts sshd, writes ``ready`` and reaps orphans for ever.
Killing it is the host's crash: the kernel then ends everything on the host at once.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

PRIVATE = ("/dev/shm", "/tmp", "/root", "/run")


def run(*words: str) -> None:
    subprocess.run(words, check=True)


def keep_shared(paths: list[str]) -> None:
    """Give the host its own temporary folders; the shared ones below them stay where they are."""
    hidden = [path for path in sorted(paths) if path.startswith(tuple(f"{place}/" for place in PRIVATE))]
    descriptors = [os.open(path, os.O_PATH) for path in hidden]
    for place in PRIVATE:
        run("mount", "-t", "tmpfs", "-o", "mode=1777,size=2g", "host", place)
    for path, descriptor in zip(hidden, descriptors, strict=True):
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mount", "--no-canonicalize", "--bind", f"/proc/self/fd/{descriptor}", path],
            check=True,
            pass_fds=[descriptor],
        )
        os.close(descriptor)


def become_host(spec: dict[str, str], own: pathlib.Path) -> None:
    """Take name, address and ssh identity."""
    socket.sethostname(spec["name"])
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{spec['address']}/24", "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    run("mount", "--bind", str(own.parent / "hosts"), "/etc/hosts")
    pathlib.Path("/run/sshd").mkdir()
    ssh = pathlib.Path("~root/.ssh").expanduser()
    ssh.mkdir(mode=0o700)
    for name in ("config", "known_hosts", "authorized_keys", "id_ed25519"):
        (ssh / name).write_bytes((own.parent / "ssh" / name).read_bytes())
        (ssh / name).chmod(0o600)


def wait_for_port(address: str, port: int) -> None:
    while True:  # the test that waits for the host has the time limit
        try:
            socket.create_connection((address, port), 1).close()
            return
        except OSError:
            time.sleep(0.05)


def main() -> None:
    spec_path = pathlib.Path(sys.argv[1])
    spec = json.loads(spec_path.read_text())
    assert sys.stdin.readline() == "go\n"
    run("mount", "-t", "proc", "proc", "/proc")
    keep_shared(spec["shared"])
    become_host(spec, spec_path.parent)
    sshd = ["/usr/sbin/sshd", "-D", "-e", "-f", str(spec_path.parent / "sshd_config")]
    subprocess.Popen(sshd, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    for command in spec["daemons"]:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    wait_for_port(spec["address"], 22)
    os.write(1, b"ready\n")
    while True:  # a process 1 gets every orphan of the host
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
