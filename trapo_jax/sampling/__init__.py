"""Sampling completions from the policy.

`engine` defines what the training loop needs from a rollout engine, `jax_engine` implements it. Import from these
modules: the package itself imports nothing, so that the protocol and the slot scheduler can be used without jax.
"""
