"""TRAPO (Trust-Region Adaptive Policy Optimization, arXiv 2512.17636) in JAX.

`trapo_jax.losses` is the loss library; `python -m trapo_jax.train` trains a model. The names in `__all__` are imported
lazily, because reward workers import this package and must not import JAX.
"""

import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"]:  # `python -m trapo_jax.COMMAND` imports this package before the command.
    from trapo_jax.runs.system_errors import report_import_error

    sys.excepthook = report_import_error

if TYPE_CHECKING:
    from trapo_jax.config import load_train_config as load_config
    from trapo_jax.losses import (
        attenuated_cross_entropy_from_logprobs,
        policy_gradient_loss,
        trsft_loss,
        trsft_loss_from_logprobs,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "attenuated_cross_entropy_from_logprobs",
    "load_config",
    "policy_gradient_loss",
    "trsft_loss",
    "trsft_loss_from_logprobs",
]


def __getattr__(name: str) -> Any:
    if name == "load_config":
        from trapo_jax.config import load_train_config

        return load_train_config
    if name in __all__:
        from trapo_jax import losses

        return getattr(losses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
