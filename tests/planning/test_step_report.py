"""Reports on a small sharded function with countable work, compiled for GPUs and TPUs without hardware."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynfocus_jax import trees
from dynfocus_jax.errors import RunError
from dynfocus_jax.parallel.mesh import make_mesh, mesh_shape
from dynfocus_jax.planning.hlo import HloArray
from dynfocus_jax.planning.machines import compile_only_devices, parse_machine
from dynfocus_jax.planning.planned_steps import PlannedStep, planned_train_step
from dynfocus_jax.planning.program_work import Collective
from dynfocus_jax.planning.report_table import describe_misfit, format_report
from dynfocus_jax.planning.step_report import gathered_stacks, parameters_by_part, report_step
from tests.tiny import tiny_config, with_kind

pytestmark = pytest.mark.usefixtures("no_cache")

LAYERS, ROWS, D, F = 6, 1024, 512, 1024


def make_step(mesh, rows=ROWS, width=D, hidden=F):
    """Return gradient descent on a stack of layers, sharded like the project's: gathered layer by layer."""

    def abstract(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    up = abstract((LAYERS, width, hidden), None, "fsdp", "tensor")
    down = abstract((LAYERS, hidden, width), None, "tensor", "fsdp")
    params = {"language": {"blocks": {"up": up, "down": down}}}
    x = abstract((rows, width), "fsdp")

    def build(remat):
        def layer(x, weights):
            up, down = weights
            hidden = jax.lax.with_sharding_constraint(
                jnp.sin(x @ up), NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
            )
            return x + hidden @ down, None

        def step(params, x):
            def loss(params):
                stack = params["language"]["blocks"]
                body = jax.checkpoint(layer) if remat else layer
                return jnp.sum(
                    jax.lax.scan(body, x, (stack["up"], stack["down"]))[0].astype(jnp.float32) ** 2
                )

            gradient = jax.grad(loss)(params)
            return jax.tree.map(lambda p, g: p - g, params, gradient)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        return jax.jit(step, donate_argnums=0, out_shardings=shardings)

    held = {"trained parameters": params, "batch": x}
    return PlannedStep("train", "config.stages[0]", build(True), (params, x), held, rows, rows, build(False))


def machine_and_mesh(name, **axes):
    machine = parse_machine(name)
    shape = mesh_shape({"data": 1, "fsdp": -1} | axes, machine.num_devices)
    return machine, make_mesh(shape, compile_only_devices(machine))


@pytest.mark.parametrize("name", ["a100-80gb:4", "h100:2x2", "v5e:2x2"])
def test_countable_work(name):
    machine, mesh = machine_and_mesh(name)
    report = report_step(make_step(mesh), machine, mesh)
    product = 2 * ROWS * D * F / 4  # on each of four devices
    # Two products forward, four backward, and the hidden units again. The input of the first layer needs no
    # gradient, but the body of the loop computes it for every layer.
    assert report["model_flops"] == 6 * product * LAYERS
    assert report["flops"] == 7 * product * LAYERS
    weights = LAYERS * D * F * 2  # bytes of all up kernels, or of all down kernels
    assert report["memory"]["trained parameters"] == 2 * weights / 4
    assert report["memory"]["batch"] == ROWS * D * 2 / 4
    assert report["total"] == sum(report["memory"].values())
    assert report["fits"]
    # Gathered forward and backward, gradients scattered: each time three quarters are sent.
    gathered = report["collectives"]["all-gather"]["bytes"]
    assert gathered == pytest.approx(2 * 2 * weights * 3 / 4)
    scattered = report["collectives"]["reduce-scatter"]["bytes"]
    # An all-reduce sends twice as much as a scatter.
    reduced = report["collectives"].get("all-reduce", {"bytes": 0})["bytes"]
    assert scattered > 0
    assert scattered + reduced / 2 == pytest.approx(2 * weights * 3 / 4)
    assert report["link_bytes"] == pytest.approx(gathered + scattered + reduced)
    assert report["gathered_stacks"] == []
    # A ring through two hosts of two GPUs leaves every host once, over its two adapters.
    assert report["network_bytes"] == (report["link_bytes"] / 2 if name == "h100:2x2" else 0)
    seconds = report["seconds"]
    assert seconds["arithmetic"] == pytest.approx(report["flops"] / machine.chip.flops)
    assert report["roofline_seconds"] == max(seconds.values())
    assert report["mfu_bound"] == pytest.approx(
        report["model_flops"] / machine.chip.flops / report["roofline_seconds"]
    )
    assert f"{machine.usable_memory / 2**30:.2f} usable: fits" in format_report(report)


@pytest.mark.parametrize("name", ["a100-80gb:4", "v5e:2x2"])
def test_a_step_that_does_not_fit(name):
    """A GPU's compiler compiles the step anyway, a TPU's compiler rejects it."""
    machine, mesh = machine_and_mesh(name)
    rows = 2**28
    report = report_step(make_step(mesh, rows=rows), machine, mesh)
    assert not report["fits"]
    assert report["memory"]["batch"] == rows * D * 2 / 4
    # The input of every layer is kept for the backward pass.
    assert report["memory"]["activations and temporaries"] > LAYERS * rows * D * 2 / 4
    assert report["largest"] == "activations and temporaries"
    assert "config.stages[0].microbatches" in describe_misfit(report)
    assert "DOES NOT FIT" in format_report(report)


def test_products_that_gather_their_weights_piece_by_piece():
    """On TPUs a product can be a loop over pieces of the weights, which are passed on in both directions."""
    machine, mesh = machine_and_mesh("v5e:2x4")
    rows, width, hidden = 8192, 1024, 2048
    report = report_step(make_step(mesh, rows, width, hidden), machine, mesh)
    assert report["collectives"]["collective-permute"]["bytes"] > 0
    assert report["flops"] == 7 * (2 * rows * width * hidden / 8) * LAYERS
    # Two gathers and a scatter of all weights. Pieces sent in pairs make up to nine hops instead of seven.
    weights = 2 * LAYERS * width * hidden * 2
    assert 3 * weights * 7 / 8 <= report["link_bytes"] <= 3 * weights * 9 / 8


@pytest.mark.parametrize(
    ("name", "tensor", "layout"),
    [("a100-80gb:4", 1, ()), ("a100-80gb:4", 2, (None, None, "tensor")), ("v5e:2x2", 2, ())],
)
def test_a_stack_gathered_at_once(name, tensor, layout):
    """It is gathered over all axes of the mesh, or over one of two."""
    machine, mesh = machine_and_mesh(name, tensor=tensor)
    step = make_step(mesh)
    assert report_step(step, machine, mesh)["gathered_stacks"] == []

    def whole(params, x):
        stack = params["language"]["blocks"]["up"]
        stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, PartitionSpec(*layout)))
        return jnp.sin(stack).sum() + x.sum()

    report = report_step(
        step._replace(function=jax.jit(whole), without_recomputation=jax.jit(whole)), machine, mesh
    )
    assert "language/blocks/up" in report["gathered_stacks"]
    assert "stacks gathered at once       language/blocks/" in format_report(report)


@pytest.mark.parametrize(("count", "found"), [(6, []), (12, []), (1, ["language/blocks/lora_b"])])
def test_a_layer_with_the_shape_of_a_stack(count, found):
    """The stack of an update, [6, 16, 32], has the shape of one layer of a kernel's, [6, 6, 16, 32]."""
    _, mesh = machine_and_mesh("a100-80gb:4")

    def abstract(*shape):
        layout = PartitionSpec(*[None] * (len(shape) - 1), "fsdp")
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, layout))

    blocks = {"out": abstract(6, 6, 16, 32), "lora_b": abstract(6, 16, 32)}
    step = make_step(mesh)._replace(held={"trained parameters": {"language": {"blocks": blocks}}})
    given, taken = (HloArray("bf16", dims, in_hbm=True) for dims in ((6, 16, 32), (6, 16, 8)))
    gather = Collective("all-gather", (given,), (taken,), np.arange(4)[None], count, "")
    assert gathered_stacks(step, [gather]) == found


def test_a_train_step_of_the_model():
    """Its layers are gathered one at a time, and its frozen tower is not in the optimizer state."""
    machine, mesh = machine_and_mesh("a100-80gb:4", tensor=2)
    config = tiny_config()
    config.stages = config.stages[-1:]
    config.stages[0].update(
        {"connector": with_kind(config, "pooled"), "trainable": ("language/.*", "connector/.*")}
    )
    config.model.language.update({"depth": 3, "kv_heads": 2})
    step = planned_train_step(config, 0, mesh)
    report = report_step(step, machine, mesh)
    assert report["collectives"]["all-gather"]["count"] > 0
    assert report["gathered_stacks"] == []
    held = {name: trees.flatten(step.held[f"{name} parameters"]) for name in ("trained", "frozen")}
    optimized, frozen = report["parameters"]["optimized"], report["parameters"]["frozen"]
    assert set(optimized) == {"connector", "language"}
    assert set(frozen) == {"vision"}
    assert sum(optimized.values()) == sum(leaf.size for leaf in held["trained"].values())
    assert sum(frozen.values()) == sum(leaf.size for leaf in held["frozen"].values())
    assert "stacks gathered at once       none" in format_report(report)


def test_parameters_by_optimizer_state():
    """The numbers follow the optimizer state, not the name of the argument."""
    _, mesh = machine_and_mesh("a100-80gb:4")
    step, count = make_step(mesh), LAYERS * D * F
    moments = {"language": {"blocks": {"up": step.arguments[0]["language"]["blocks"]["up"]}}}
    state = (optax.ScaleByAdamState(jax.ShapeDtypeStruct((), jnp.int32), moments, moments),)
    step = step._replace(held=step.held | {"optimizer": state})
    assert parameters_by_part(step) == {"optimized": {"language": count}, "frozen": {"language": count}}


def test_a_step_that_does_not_compile():
    machine, mesh = machine_and_mesh("a100-80gb:4")

    def missing(params, x):
        return jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct((), jnp.float32))()

    step = make_step(mesh)._replace(function=jax.jit(missing))
    with pytest.raises(RunError, match=r"the train step of config.stages\[0\] does not compile"):
        report_step(step, machine, mesh)
