"""Checks that meshes of simulated host devices give the same gradients and samples as a single device.

`test_train_step.py` runs this file in a separate process.
"""

import jax
from jax.sharding import PartitionSpec as P

from support.engines import make_engine
from support.train_step import (
    CONFIG,
    NO_TIES,
    build,
    method_of_every_term,
    ragged_groups,
    relative_difference,
    sgd_step,
)
from trapo_jax.distributed.sharding import make_mesh, param_shardings
from trapo_jax.models import PerLayer, init_params
from trapo_jax.sampling import replica
from trapo_jax.types import RolloutRequest, SamplingParams


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    groups, advantages = ragged_groups(NO_TIES)
    params = jax.device_get(init_params(CONFIG, seed=0))
    method = method_of_every_term()
    reference = sgd_step(method, build(groups, advantages), params)[0]
    shapes = [(2, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2)]
    for data, fsdp, tp in shapes:
        mesh = make_mesh(fsdp=fsdp, tp=tp, devices=jax.devices()[: data * fsdp * tp])
        # There are more rows than rollouts, so that some shards have no trained tokens.
        batch = build(
            groups,
            advantages,
            packed=True,
            micro_batch_rows=4 * data * fsdp,
            num_shards=data * fsdp,
        )
        gradient, _, state = sgd_step(method, batch, params, mesh=mesh)
        difference = relative_difference(gradient, reference)
        assert difference < 1e-5, (data, fsdp, tp, difference)
        assert state.params["layers"]["down"].sharding.spec == P(None, "tp", "fsdp")
    problems = [group[0].request.problem for group in groups]
    expected = sample(make_mesh(fsdp=1, tp=1, devices=jax.devices()[:1]), params, problems)
    assert len(expected) == 24
    for data, fsdp, tp in [*shapes, (1, 1, 2)]:
        mesh = make_mesh(fsdp=fsdp, tp=tp, devices=jax.devices()[: data * fsdp * tp])
        assert sample(mesh, params, problems) == expected, (data, fsdp, tp)
    replica.choose_layout = lambda config, mesh: PerLayer()  # the layout that is used on GPUs
    mesh = make_mesh(fsdp=1, tp=2, devices=jax.devices()[:4])
    assert sample(mesh, params, problems) == expected
    print(f"{len(shapes)} meshes agree")


def sample(mesh, params, problems):
    """Samples six rollouts per problem, half of them guided, with weights that are sharded as in training."""
    placed = jax.device_put(params, param_shardings(params, mesh))
    engine = make_engine(CONFIG, placed, num_slots=3, max_completion_length=24, mesh=mesh)
    requests = [
        RolloutRequest(problem, j, 0, 0 if j % 2 else -1, 3 if j % 2 else 0)
        for problem in problems
        for j in range(6)
    ]
    engine.submit(requests, step=1, params=SamplingParams())
    tokens = {}
    while engine.is_busy:
        tokens |= {
            (c.request.problem.id, c.request.sample_index): c.token_ids for c in engine.step()
        }
    return tokens


if __name__ == "__main__":
    main()
