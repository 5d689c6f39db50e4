"""Samples completions from the policy.

`engine` defines the interface that the training loop needs from a rollout engine, and `jax_engine` implements it.
Import from these modules. The package itself imports nothing, so the protocol and the slot scheduler can be used
without jax.
"""
