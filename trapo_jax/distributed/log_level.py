"""Silences log output of native code that is of no use to users. Must be imported before JAX.

If a process of a job dies, JAX aborts all others and logs up to 60 lines in each. `failures.report_abort` prints one
line instead. Set `TF_CPP_MIN_LOG_LEVEL=0` in the environment to see JAX's own log.

If libtpu is installed on a machine without a TPU (in order to plan runs), JAX looks for a TPU each time it starts, and
libtpu logs six lines because there is none.
"""

import os
from importlib.util import find_spec
from pathlib import Path

LEVEL = "TF_CPP_MIN_LOG_LEVEL"
NOTHING = "4"  # One level above fatal errors, so that nothing is logged.
PROCESS_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
HOST_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")

_has_peers = any(os.environ.get(name, "1") != "1" for name in PROCESS_COUNTS)
_has_peers |= any("," in os.environ.get(name, "") for name in HOST_LISTS)
if _has_peers and os.environ.get(LEVEL) != "0":  # JAX itself may set other values.
    os.environ[LEVEL] = NOTHING

GOOGLE_PCI_VENDOR = "0x1ae0"
# Prevents libtpu, which is used only as a compiler, from looking for TPUs and for other processes that use them.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _has_tpu() -> bool:
    """Returns whether the machine has a TPU, by the same rule as JAX."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == GOOGLE_PCI_VENDOR for vendor in vendors)


if find_spec("libtpu") and not _has_tpu():
    os.environ.update(LIBTPU_ENVIRONMENT | os.environ)
