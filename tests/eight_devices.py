"""Run by test_train_step: gradients on meshes of forced host devices equal those on one device."""

import sys
from pathlib import Path

import jax
from jax.sharding import PartitionSpec as P

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_train_step import (  # noqa: E402
    CONFIG,
    build,
    init_params,
    method_of_every_normalizer,
    ragged_groups,
    relative_difference,
    sgd_step,
)

from trapo_jax.sharding import make_mesh  # noqa: E402


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    groups, advantages = ragged_groups()
    params = jax.device_get(init_params(CONFIG, seed=0))
    method = method_of_every_normalizer()
    reference = sgd_step(method, build(groups, advantages), params)[0]
    shapes = [(8, 1, 1), (4, 2, 1), (2, 2, 2)]
    for data, fsdp, tp in shapes:
        mesh = make_mesh(data=data, fsdp=fsdp, tp=tp)
        # So many rows that whole shards hold no rollout, hence no trained token.
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
    print(f"{len(shapes)} meshes agree")


if __name__ == "__main__":
    main()
