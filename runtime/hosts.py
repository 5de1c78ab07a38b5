"""Several hosts that serve one model: which of them this is, and JAX among them.

Every host runs the same command. That of rank 0 schedules and answers HTTP, and tells the others each step; see
runtime.leader and runtime.follower.
"""

import dataclasses
import socket

from runtime.errors import ConfigError

JOIN_S = 1800.0  # the first hosts wait for the last, which may download the model
MASTER_PORT = 29501


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """What the user asks. Flags carry the same names.

    Attributes:
        nnodes: hosts in all.
        node_rank: which of them this is; None where the cluster tells.
        master_addr: the address of rank 0; None where the cluster tells.
        master_port: on which rank 0 waits for the others; the port after it is JAX's.
        headless: no HTTP on this host; so it is on all but rank 0.
    """

    nnodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = MASTER_PORT
    headless: bool = False

    def settle(self) -> "Place | None":
        """This host's place; None for a host alone.

        Raises:
            ConfigError: a number is out of bounds, or neither flags nor a cluster tell the rank.
        """
        if self.nnodes < 1:
            raise ConfigError(f"--nnodes {self.nnodes} must be at least 1")
        if self.nnodes == 1:
            return self._alone()
        if not 0 < self.master_port < 65535:
            raise ConfigError(
                f"--master-port {self.master_port} is no port, or has none after it; choose one from 1 to 65534"
            )
        rank, address = self.node_rank, self.master_addr
        if rank is None or (rank > 0 and address is None):
            found = detected()
            if found is None:
                missing = "--node-rank" if rank is None else "--master-addr"
                raise ConfigError(
                    f"--nnodes {self.nnodes} needs {missing} here: neither a TPU pod slice nor a Slurm or Open MPI job "
                    "was found that would tell it"
                )
            found_address, count, found_rank = found
            if count != self.nnodes:
                raise ConfigError(
                    f"--nnodes is {self.nnodes}, and this cluster runs {count} processes; start one on each host and "
                    f"use --nnodes {count}"
                )
            rank, address = found_rank if rank is None else rank, address or found_address
        if not 0 <= rank < self.nnodes:
            raise ConfigError(
                f"--node-rank {rank} is not one of {self.nnodes} hosts; they count from 0 to --nnodes - 1"
            )
        if self.headless and rank == 0:
            raise ConfigError("--headless on rank 0 would leave nobody to answer HTTP; keep it for the other ranks")
        return Place(rank, self.nnodes, address or "127.0.0.1", self.master_port)

    def _alone(self) -> None:
        if self.node_rank:
            raise ConfigError(f"--node-rank {self.node_rank} needs --nnodes, the number of hosts")
        if self.headless:
            raise ConfigError("--headless is for the hosts of a model that is served by several; give --nnodes too")


@dataclasses.dataclass(frozen=True)
class Place:
    """One host among several. `address` and `port` are where rank 0 waits."""

    rank: int
    count: int
    address: str
    port: int

    def __str__(self):
        return f"host {self.rank} of {self.count}"

    def start_jax(self) -> None:
        """Makes the devices of all hosts known to each. Blocks until every host is there.

        Deaths are noticed on our own channels, sooner than JAX notices them; and when it does it ends the process.
        """
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
        try:
            jax.distributed.initialize(
                f"{self.address}:{self.port + 1}",
                self.count,
                self.rank,
                cluster_detection_method="deactivate",  # it would take one device for each process of a Slurm job
                heartbeat_timeout_seconds=24 * 3600,
                shutdown_timeout_seconds=10,
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"JAX cannot start on {self.count} hosts: {' '.join(str(error).split())}") from error


def detected() -> tuple[str, int, int] | None:
    """(rank 0's address, number of processes, this one's rank), where a cluster tells; None elsewhere."""
    # Private, and the only way to know these before the hosts have agreed on the rest.
    from jax._src.clusters import ClusterEnv

    address, count, rank, _ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [0], None, 60)
    if address is None or count is None or rank is None:
        return None
    return address.rpartition(":")[0], count, rank


def check_port(port: int) -> None:
    """Raises: ConfigError: the port cannot be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be had ({error.strerror}): hosts need --master-port and the port after it; "
                "choose another --master-port"
            ) from None
