"""The command line that starts the ranks of a training."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Final

from executors.training.device_plan import DevicePlan

_MODULE: Final = "executors.training.ranks.rank_process"
_OF_LAUNCHERS: Final = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
)  # fmt: skip
"""Left from whatever started the worker, these would make a single process wait for others."""
_RANK: Final = "${local_rank}"
"""torchrun puts the number in; there is one node, so that it is the rank too."""


def rank_command(plan: DevicePlan, address: Path, *, cores: int) -> list[str]:
    """Start one process directly, a group by torchrun with a rendezvous of its own.

    Args:
        plan: how many, and on which GPUs.
        address: the launcher's socket.
        cores: CPU cores that the ranks share.
    """
    variables = [f"CUDA_VISIBLE_DEVICES={plan.cuda_visible_devices}"]
    python = [sys.executable, "-u", "-m"]
    if plan.ranks == 1 and not plan.grouped:
        command = [*python, _MODULE, str(address), "0"]
    else:
        variables.append(f"OMP_NUM_THREADS={max(cores // plan.ranks, 1)}")
        variables.append("GLOO_SOCKET_IFNAME=lo")  # all are here, whatever the host's name resolves to
        command = [
            *python, "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(plan.ranks),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", uuid.uuid4().hex,
            "--local-addr", "127.0.0.1", "--max-restarts", "0", "--no-python",
            *python, _MODULE, str(address), _RANK,
        ]  # fmt: skip
    forgotten = [part for name in _OF_LAUNCHERS for part in ("-u", name)]
    return ["env", *forgotten, *variables, *command]
