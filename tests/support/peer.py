"""Joins the other processes of a job. Process NUMBER then fails or dies, and the others wait for it.

    python peer.py NUMBER fail|die

If `GCE_METADATA_IP` is set, JAX queries the TPU VM metadata server at this address. Otherwise, JAX would do so only on
a machine with TPUs.
"""

import trapo_jax.distributed.log_level  # noqa: F401

# isort: split
import os
import signal

import jax

from trapo_jax.distributed.failures import fail_together
from trapo_jax.distributed.launch import join_processes
from trapo_jax.distributed.processes import gather
from trapo_jax.runs.command_line import command, run_and_exit
from trapo_jax.types import UserError

DEAD_AFTER_SECS = 20


@command
def main(arguments):
    if "GCE_METADATA_IP" in os.environ:
        del os.environ["TPU_SKIP_MDS_QUERY"]
    join_processes({"seed": 0}, dead_after_secs=DEAD_AFTER_SECS)
    with fail_together(DEAD_AFTER_SECS):
        print("processes:", gather(jax.process_index()))
        number, action = arguments
        if jax.process_index() == int(number):
            if action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("train.parquet: no such file")
        gather(None)
    return 0


run_and_exit(main)
