"""Sets the log level of JAX's native code in jobs with several processes. Must be imported before jax.

If a process dies, JAX aborts all others and logs up to 60 lines in each. `failures.report_abort` prints one line
instead. Set `TF_CPP_MIN_LOG_LEVEL=0` in the environment to see JAX's own log.
"""

import os

LEVEL = "TF_CPP_MIN_LOG_LEVEL"
NOTHING = "4"  # one level above fatal errors
PROCESS_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
HOST_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")

_has_peers = any(os.environ.get(name, "1") != "1" for name in PROCESS_COUNTS)
_has_peers |= any("," in os.environ.get(name, "") for name in HOST_LISTS)
if _has_peers and os.environ.get(LEVEL) != "0":  # Other values may have been set by JAX itself.
    os.environ[LEVEL] = NOTHING
