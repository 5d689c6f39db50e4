"""Samples completions from the policy.

`engine` defines the interface that the training loop needs from a rollout engine, and `jax_engine` implements it.
Import from these modules directly: the package itself imports nothing, so that the protocol and the slot scheduler can
be used without JAX.
"""
