"""Plans of DeepSpeed's launchers: on this machine, over ssh with pdsh, or through Open MPI's mpirun."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from launch.plans.environment import DEVICES
from launch.plans.hostfile import hostfile_text
from launch.plans.hosts import Host, num_slots
from launch.plans.plan import RANK_MODULE, LaunchPlan, RankProgram, require_names, require_plain
from launch.plans.tools import Tools
from nd_dist.errors import ConfigError

# a host that answers nothing for half a minute is lost; shorter troubles of the network are sat out
SSH_OPTIONS = (
    "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
)  # fmt: skip
NO_FILE = "/dev/null"
"""In place of the user's `.deepspeed_env`, which DeepSpeed would read on top of what the plan says, or fail on."""


def local_deepspeed_plan(program: RankProgram, tools: Tools, env: Mapping[str, str], host: Host) -> LaunchPlan:
    """Return the plan of DeepSpeed's launcher of one node, on this machine.

    The runner that usually starts it ignores ``CUDA_VISIBLE_DEVICES`` as soon as it is told how many ranks to start.
    """
    names = env.get(DEVICES, "").split(",")
    devices = names[: host.slots] if len(names) >= host.slots and names != [""] else list(range(host.slots))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    argv = (
        *(tools.python, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"),
        *(f"--master_port={tools.port}", "--no_local_rank", "--module", RANK_MODULE, *program.arguments),
    )
    return LaunchPlan(argv, env, host.slots)


def deepspeed_plan(
    program: RankProgram, tools: Tools, env: Mapping[str, str], hosts: tuple[Host, ...], launcher: str
) -> LaunchPlan:
    """Return the plan of DeepSpeed's runner over hosts.

    Args:
        program: What a rank runs.
        tools: What this machine has.
        env: Variables of every rank.
        hosts: Where the ranks run, in rank order.
        launcher: ``deepspeed-pdsh`` or ``deepspeed-openmpi``.

    Raises:
        ConfigError: the launcher cannot express the hosts, or its program is missing.
    """
    address = tools.address or hosts[0].name
    env = {**env, "MASTER_ADDR": address, "MASTER_PORT": str(tools.port)}
    where, own_env = (_pdsh if launcher == "deepspeed-pdsh" else _openmpi)(tools, hosts, env)
    argv = (
        *(tools.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(program.hostfile_path), "--force_multi"),
        *("--master_addr", address, *where, "--master_port", str(tools.port), "--no_local_rank"),
        *("--module", RANK_MODULE, *program.arguments),
    )
    files = {program.hostfile_path: hostfile_text(_numbered(hosts))}
    own_env = {**own_env, "DS_ENV_FILE": NO_FILE}
    return LaunchPlan(argv, env, num_slots(hosts), hosts=hosts, own_env=own_env, files=files)


def _numbered(hosts: tuple[Host, ...]) -> tuple[Host, ...]:
    """Return the hosts with as many slots as their highest GPU needs (DeepSpeed checks --include against them)."""
    return tuple(Host(host.name, max(host.device_ids) + 1, user=host.user) for host in hosts)


def _pdsh(tools: Tools, hosts: tuple[Host, ...], env: Mapping[str, str]) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Return the words and variables of the pdsh launcher."""
    require_plain(tools.python, "the path of Python", "pdsh")
    require_plain(env.get("PYTHONPATH", "-"), "PYTHONPATH", "pdsh")
    chosen: tuple[str, ...] = ()
    if any(host.devices for host in hosts):
        require_names(hosts, "DeepSpeed's filter of GPUs", takes_gpus=True)  # it splits names at @ and :
        chosen = ("--include", "@".join(f"{host.name}:{','.join(map(str, host.device_ids))}" for host in hosts))
    return ("--launcher", "pdsh", *chosen), {"PDSH_SSH_ARGS_APPEND": SSH_OPTIONS}


def _openmpi(
    tools: Tools, hosts: tuple[Host, ...], env: Mapping[str, str]
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Return the words and variables of the Open MPI launcher.

    DeepSpeed passes no rendezvous to Open MPI's ranks (they would wait for ever), and takes the first mpirun on PATH,
    whichever MPI that is.
    """
    if not tools.openmpi:
        raise ConfigError("There is no Open MPI on this machine.", todo="install one: apt-get install openmpi-bin")
    require_names(hosts, "deepspeed-openmpi")
    words = [word for name in ("MASTER_ADDR", "MASTER_PORT") for word in ("-x", f"{name}={env[name]}")]
    interface = env.get("GLOO_SOCKET_IFNAME", "")
    words += ["--mca", "btl_tcp_if_include", interface] if interface else []
    words += ["--mca", "plm_rsh_args", SSH_OPTIONS]
    path = ":".join(part for part in (str(Path(tools.openmpi).parent), tools.path) if part)
    own_env = {"PATH": path, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return ("--launcher", "openmpi", f"--launcher_args={shlex.join(words)}"), own_env
