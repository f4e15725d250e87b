"""Checks of a whole configuration, before anything is built from it.

Types, allowed values and limits of single fields are declared with the fields (`config.py`, and the files of
the connectors); here is how fields have to fit each other.
"""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.config import CONFIG, STAGE
from dynfocus_jax.connectors.registry import check_connector
from dynfocus_jax.errors import UserError
from dynfocus_jax.features.store import check_storable
from dynfocus_jax.parallel.processes import check_distributed
from dynfocus_jax.records.sources import check_sources
from dynfocus_jax.sections import check_section, require


def validate(config: ConfigDict, devices: int = 1) -> None:
    """Check every field; raise UserError with one sentence that names the field, its value and the remedy.

    Args:
      config: as from a config file; it need not derive from `default_config`.
      devices: number of devices on the mesh's data and fsdp axes, which divide the rows of a batch.
    """
    validate_model(config)
    require(len(config.stages) > 0, "config.stages is empty, expected at least one stage(...).")
    for index, stage in enumerate(config.stages):
        _check_stage(stage, config, f"config.stages[{index}]", devices)
    names = [stage.name for stage in config.stages]
    require(
        len(set(names)) == len(names),
        f"config.stages has two stages with the same name: {', '.join(names)}; rename one of them.",
    )
    _check_initial(config.initial)
    _check_data(config.data, config.model.text_encoder.max_text)
    if config.data.features is not None:
        check_storable(config)
    check_distributed(config.distributed)
    _check_mesh(config.mesh)
    _check_checkpoint(config.checkpoint)
    _check_generation(config.generation)
    evaluation = config.evaluation
    require(
        evaluation.annotations is None or evaluation.batch_size % devices == 0,
        f"config.evaluation.batch_size is {evaluation.batch_size}, expected a multiple of {devices} "
        f"({devices} devices on the data and fsdp axes of config.mesh).",
    )


def validate_model(config: ConfigDict) -> None:
    """Check names, types and limits of all fields, and that the fields of the model fit each other.

    Raises:
      UserError: one sentence that names the field, its value and the remedy.
    """
    check_section(config, CONFIG, "config")
    model = config.model
    _check_vision(model.vision)
    _check_language(model.language)
    text = model.text_encoder
    _check_heads(text, "config.model.text_encoder")
    check_connector(model.connector, model, "config.model.connector")
    for index, stage in enumerate(config.stages):
        where = f"config.stages[{index}]"
        require(isinstance(stage, ConfigDict), f"{where} is {stage!r}, expected a stage(...).")
        check_section(stage, STAGE, where)
        if stage.connector is not None:
            check_connector(stage.connector, model, f"{where}.connector")
    _check_regular_expressions("config.weights.skip", config.weights.skip)


def _check_vision(vision: ConfigDict) -> None:
    where = "config.model.vision"
    for name in ("mean", "std"):
        value = vision[name]
        require(
            len(value) == 3 and all(isinstance(number, int | float) for number in value),
            f"{where}.{name} is {tuple(value)}, expected three numbers: red, green, blue.",
        )
    _check_heads(vision, where)
    require(
        -vision.depth <= vision.select_layer <= -1,
        f"{where}.select_layer is {vision.select_layer}, expected -1 (the last of the {vision.depth} blocks) "
        f"to -{vision.depth} (the first).",
    )
    require(
        vision.select_layer == -1 or not vision.final_norm,
        f"{where}.final_norm follows the last block, but select_layer is {vision.select_layer}; set "
        "final_norm to False, or select_layer to -1.",
    )
    require(
        vision.image_size % vision.patch_size == 0,
        f"{where}.image_size is {vision.image_size}, expected a multiple of patch_size = "
        f"{vision.patch_size}.",
    )


def _check_heads(section: ConfigDict, where: str) -> None:
    require(
        section.width % section.heads == 0,
        f"{where}.width is {section.width}, expected a multiple of heads = {section.heads}.",
    )


def _check_language(language: ConfigDict) -> None:
    where = "config.model.language"
    require(
        language.heads % language.kv_heads == 0,
        f"{where}.heads is {language.heads}, expected a multiple of kv_heads = {language.kv_heads}.",
    )
    require(language.head_dim % 2 == 0, f"{where}.head_dim is {language.head_dim}, expected an even number.")
    require(
        language.rope_scaling != "none" or language.rope_factor == 1,
        f"{where}.rope_factor is {language.rope_factor}, but rope_scaling is 'none'; set rope_scaling to "
        "'linear' or 'llama3', or rope_factor to 1.",
    )
    require(
        language.rope_low_freq < language.rope_high_freq,
        f"{where}.rope_low_freq is {language.rope_low_freq}, expected less than rope_high_freq = "
        f"{language.rope_high_freq}.",
    )
    lora = language.lora
    require(
        lora.rank == 0 or len(lora.targets) > 0,
        f"{where}.lora.targets is empty, but rank is {lora.rank}; set targets, or set rank to 0.",
    )


def _check_stage(stage: ConfigDict, config: ConfigDict, where: str, devices: int) -> None:
    require(stage.name is not None, f"{where}.name is not set; set it, because it has no default.")
    require(
        re.fullmatch(r"[\w-]+", stage.name) is not None,
        f"{where}.name is {stage.name!r}, expected letters, digits, '_' or '-', because it names a folder.",
    )
    _check_one_of_two(stage, where, "annotations", "sources")
    _check_one_of_two(stage, where, "steps", "epochs")
    for bucket in stage.buckets:
        require(
            isinstance(bucket, tuple | list)
            and len(bucket) == 2
            and all(type(size) is int and size > 0 for size in bucket),
            f"{where}.buckets has {bucket!r}, expected (num_frames, max_text) pairs such as (16, 64).",
        )
    require(
        len(set(stage.buckets)) == len(stage.buckets),
        f"{where}.buckets has the same shape twice: {stage.buckets}; remove one of them.",
    )
    check_sources(stage.sources, f"{where}.sources")
    require(
        all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in stage.lr_scale),
        f"{where}.lr_scale is {stage.lr_scale}, expected pairs: ((regular expression, factor), ...).",
    )
    require(
        stage.trainable is None or len(stage.trainable) > 0,
        f"{where}.trainable is empty, so nothing would be trained; set it to regular expressions over "
        "parameter paths, or to None for the parameters of the connector.",
    )
    _check_regular_expressions(where, (*(stage.trainable or ()), *(pair[0] for pair in stage.lr_scale)))
    parts = stage.microbatches * devices
    each = "" if stage.microbatches == 1 else f"{stage.microbatches} microbatches x "
    require(
        stage.batch_size % parts == 0,
        f"{where}.batch_size is {stage.batch_size}, expected a multiple of {parts} ({each}{devices} devices "
        "on the data and fsdp axes of config.mesh).",
    )
    require(
        stage.max_turns is None or config.data.text_guidance != "each_turn",
        f"{where}.max_turns is {stage.max_turns}, but with text_guidance 'each_turn' every turn is a sample; "
        "remove it.",
    )


def _check_one_of_two(section: ConfigDict, where: str, left: str, right: str) -> None:
    given = [name for name in (left, right) if section[name] not in (None, ())]
    require(
        len(given) == 1,
        f"{where} has {'both' if given else 'neither'} {left} {'and' if given else 'nor'} {right}; set one "
        "of them.",
    )


def _check_regular_expressions(where: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}.") from None


def _check_initial(initial: str | None) -> None:
    if initial is None:
        return
    folder = Path(initial).expanduser()
    require(
        (folder / "params").is_dir() or (folder.name.isdigit() and folder.is_dir()),
        f"config.initial is {initial!r}, expected WORKDIR/checkpoints/STAGE/STEP of a training run, or the "
        "--output of python -m dynfocus_jax.convert.",
    )


def _check_data(data: ConfigDict, text_encoder_text: int) -> None:
    require(data.root is not None, "config.data.root is not set; set it to the folder of the data.")
    sampling = data.sampling
    require(
        sampling.above <= sampling.cap,
        f"config.data.sampling.above is {sampling.above}, expected at most cap = {sampling.cap}, because it "
        "replaces the cap for longer videos.",
    )
    require(
        data.max_query <= text_encoder_text,
        f"config.data.max_query is {data.max_query}, expected at most config.model.text_encoder.max_text = "
        f"{text_encoder_text}.",
    )


def _check_mesh(mesh: ConfigDict) -> None:
    for axis, size in mesh.items():
        require(
            size == -1 or size >= 1,
            f"config.mesh.{axis} is {size}, expected at least 1, or -1 for all remaining devices.",
        )
    rest = [axis for axis, size in mesh.items() if size == -1]
    require(
        len(rest) <= 1,
        f"config.mesh has -1 for {' and '.join(rest)}, expected -1 for at most one axis; set the others.",
    )


def _check_checkpoint(checkpoint: ConfigDict) -> None:
    require(
        checkpoint.keep_every is None or checkpoint.keep_every % checkpoint.every == 0,
        f"config.checkpoint.keep_every is {checkpoint.keep_every}, expected a multiple of every = "
        f"{checkpoint.every}, because only those steps are saved.",
    )


def _check_generation(generation: ConfigDict) -> None:
    for name in ("frames", "text", "batch"):
        sizes = generation[name]
        require(
            (name == "frames" or len(sizes) > 0)
            and all(type(size) is int and size > 0 for size in sizes)
            and all(small < large for small, large in itertools.pairwise(sizes)),
            f"config.generation.{name} is {sizes}, expected integers greater than 0 in ascending order.",
        )
