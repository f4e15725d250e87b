"""Checks of a whole configuration, before anything is built from it."""

import itertools
import re
from pathlib import Path

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.config import default_config, source, stage
from dynfocus_jax.errors import UserError, suggest
from dynfocus_jax.model_validation import one_of, positive, require, validate_section


def _check_fields(config: ConfigDict, reference: ConfigDict, where: str) -> None:
    """Unknown, missing or mistyped fields (a config need not derive from `default_config`)."""
    for key in config:
        if key not in reference:
            raise UserError(f"{where}.{key} is not a field of the configuration{suggest(key, reference)}.")
    for key in reference:
        if key not in config:
            raise UserError(f"{where}.{key} is missing; start the config from default_config().")
        expected, value = reference.get_type(key), config[key]
        if isinstance(reference[key], ConfigDict):
            if not isinstance(value, ConfigDict):
                raise UserError(f"{where}.{key} is {value!r}, expected a section of fields.")
            _check_fields(value, reference[key], f"{where}.{key}")
        elif value is not None and not (
            isinstance(value, expected) and not (expected is int and isinstance(value, bool))
        ):
            if expected is float and isinstance(value, int) and not isinstance(value, bool):
                continue
            if expected is tuple and isinstance(value, list):
                continue
            raise UserError(
                f"{where}.{key} is {value!r} of type {type(value).__name__}, expected {expected.__name__}."
            )


def _one_of_two(section: ConfigDict, where: str, left: str, right: str) -> None:
    given = [key for key in (left, right) if section[key] not in (None, ())]
    require(
        len(given) == 1,
        f"{where} has {'both' if given else 'neither'} {left} {'and' if given else 'nor'} {right}; "
        "set one of them.",
    )


def _regular_expressions(where: str, patterns) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}.") from None


def _validate_source(source_config: ConfigDict, where: str) -> None:
    from dynfocus_jax.records.formats import FORMATS

    for key in ("name", "annotations"):
        require(bool(source_config[key]), f"{where}.{key} is not set; it has no default.")
    one_of(f"{where}.format", source_config.format, FORMATS)
    one_of(f"{where}.modality", source_config.modality, ("auto", "image", "video", "text"))
    require(
        re.fullmatch(r"all|(first|random):\d+%?", source_config.select) is not None,
        f"{where}.select is {source_config.select!r}, expected 'all', 'first:N', 'first:N%', 'random:N' or "
        "'random:N%'.",
    )
    positive(source_config, where, "repeat")
    if source_config.weight is not None:
        positive(source_config, where, "weight")


def _validate_mixture(sources: tuple[ConfigDict, ...], where: str) -> None:
    names = [source_config.name for source_config in sources]
    require(len(set(names)) == len(names), f"{where} has two sources of one name: {', '.join(names)}.")
    weighted = [source_config.name for source_config in sources if source_config.weight is not None]
    require(
        len(weighted) in (0, len(sources)),
        f"{where} has weights for {', '.join(weighted)} alone; give all sources one, or none.",
    )


def _validate_stage(stage_config: ConfigDict, where: str, devices: int) -> None:
    from dynfocus_jax.connectors.connectors_old import KINDS
    from dynfocus_jax.data.budget import ON_OVERFLOW

    require(stage_config.name is not None, f"{where}.name is not set; it has no default.")
    require(
        re.fullmatch(r"[\w-]+", stage_config.name) is not None,
        f"{where}.name is {stage_config.name!r}, expected letters, digits, '_' or '-': it names a folder.",
    )
    _one_of_two(stage_config, where, "annotations", "sources")
    _one_of_two(stage_config, where, "steps", "epochs")
    positive(stage_config, where, "batch_size", "microbatches", "num_frames", "max_text")
    positive(stage_config, where, "learning_rate", "clip")
    one_of(f"{where}.connector", stage_config.connector, KINDS)
    one_of(f"{where}.schedule", stage_config.schedule, ("cosine", "linear_tail"))
    for key in ("steps", "epochs", "max_turns", "max_length"):
        if stage_config[key] is not None:
            positive(stage_config, where, key)
    for bucket in stage_config.buckets:
        require(
            isinstance(bucket, tuple | list)
            and len(bucket) == 2
            and all(type(size) is int and size > 0 for size in bucket),
            f"{where}.buckets has {bucket!r}, expected (num_frames, max_text) pairs such as (16, 64).",
        )
    require(
        len(set(stage_config.buckets)) == len(stage_config.buckets),
        f"{where}.buckets has one shape twice: {stage_config.buckets}.",
    )
    one_of(f"{where}.on_overflow", stage_config.on_overflow, ON_OVERFLOW)
    for number, source_config in enumerate(stage_config.sources):
        _validate_source(source_config, f"{where}.sources[{number}]")
    _validate_mixture(stage_config.sources, f"{where}.sources")
    for key in ("random_steps", "weight_decay", "loss_chunk", "max_subtitle"):
        require(stage_config[key] >= 0, f"{where}.{key} is {stage_config[key]}, expected at least 0.")
    require(
        all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in stage_config.lr_scale),
        f"{where}.lr_scale is {stage_config.lr_scale}, expected pairs: ((regular expression, factor), ...).",
    )
    require(
        0 <= stage_config.warmup < 1, f"{where}.warmup is {stage_config.warmup}, expected a share in [0, 1)."
    )
    require(len(stage_config.trainable) > 0, f"{where}.trainable is empty: nothing would be trained.")
    parts = stage_config.microbatches * devices
    each = "" if stage_config.microbatches == 1 else f"{stage_config.microbatches} microbatches on "
    require(
        stage_config.batch_size % parts == 0,
        f"{where}.batch_size is {stage_config.batch_size}, which {each}the {devices} devices of the mesh's "
        f"data and fsdp axes do not divide; choose a multiple of {parts}.",
    )
    _regular_expressions(where, (*stage_config.trainable, *(pair[0] for pair in stage_config.lr_scale)))


def _validate_data(data: ConfigDict, text_encoder_text: int) -> None:
    from dynfocus_jax.media.images import LAYOUTS
    from dynfocus_jax.text.conversation import GUIDANCE, TEMPLATES

    where = "config.data"
    require(data.root is not None, f"{where}.root is not set; name the folder of the data.")
    one_of(f"{where}.generate", data.generate, (None, "needles"))
    one_of(f"{where}.template", data.template, TEMPLATES)
    one_of(f"{where}.text_guidance", data.text_guidance, GUIDANCE)
    one_of(f"{where}.image_layout", data.image_layout, LAYOUTS)
    one_of(f"{where}.sampling.kind", data.sampling.kind, ("uniform", "fps", "segments"))
    one_of(f"{where}.sampling.pick", data.sampling.pick, ("middle", "random"))
    positive(data.sampling, f"{where}.sampling", "fps", "cap", "above")
    require(
        data.sampling.above <= data.sampling.cap,
        f"{where}.sampling.above is {data.sampling.above}, expected at most cap = {data.sampling.cap}: "
        "a video over the cap gives fewer frames.",
    )
    share = data.max_skip_share
    require(0 <= share < 1, f"{where}.max_skip_share is {share}, expected at least 0 and below 1.")
    positive(data, where, "max_query", "threads", "workers", "timeout")
    require(data.processes >= 0, f"{where}.processes is {data.processes}, expected at least 0.")
    require(
        data.max_query <= text_encoder_text,
        f"{where}.max_query is {data.max_query}, more than the text encoder's max_text = "
        f"{text_encoder_text}.",
    )


def validate_distributed(distributed: ConfigDict) -> None:
    """Check the section `config.distributed`, which is needed before there are devices.

    Raises:
      UserError: one sentence that names the field, its value and the remedy.
    """
    where = "config.distributed"
    one_of(f"{where}.mode", distributed.mode, ("none", "auto", "explicit"))
    positive(distributed, where, "timeout")
    fields = ("address", "num_processes", "process_id")
    if distributed.mode != "explicit":
        for key in fields:
            require(
                distributed[key] is None,
                f"{where}.{key} is {distributed[key]!r}, but mode is {distributed.mode!r}; set mode to "
                "'explicit', or leave it out.",
            )
        return
    for key in fields:
        require(distributed[key] is not None, f"{where}.{key} is not set, which mode 'explicit' needs.")
    require(
        re.fullmatch(r"\S+:\d+", distributed.address) is not None,
        f"{where}.address is {distributed.address!r}, expected host:port of process 0.",
    )
    positive(distributed, where, "num_processes")
    require(
        0 <= distributed.process_id < distributed.num_processes,
        f"{where}.process_id is {distributed.process_id}, expected 0 to {distributed.num_processes - 1}, as "
        f"num_processes is {distributed.num_processes}.",
    )


def _validate_mesh(mesh: ConfigDict) -> None:
    for axis, size in mesh.items():
        require(
            size == -1 or size >= 1, f"config.mesh.{axis} is {size}, expected at least 1, or -1 for the rest."
        )
    rest = [axis for axis, size in mesh.items() if size == -1]
    require(
        len(rest) <= 1,
        f"config.mesh has -1 for {' and '.join(rest)}, expected one such axis at most; set the others.",
    )


def _validate_checkpoint(checkpoint: ConfigDict) -> None:
    where = "config.checkpoint"
    positive(checkpoint, where, "every", "keep")
    if checkpoint.keep_every is not None:
        positive(checkpoint, where, "keep_every")
        require(
            checkpoint.keep_every % checkpoint.every == 0,
            f"{where}.keep_every is {checkpoint.keep_every}, expected a multiple of every = "
            f"{checkpoint.every}: only those steps are saved.",
        )
    one_of(f"{where}.best", checkpoint.best, (None, "loss", "grad_norm"))
    one_of(f"{where}.best_mode", checkpoint.best_mode, ("min", "max"))


def validate_model(config: ConfigDict) -> None:
    """Check that all fields exist, and those that the model and its published weights are described by.

    Raises:
      UserError: one sentence that names the field, its value and the remedy.
    """
    _check_fields(config, default_config(), "config")
    for index, stage_config in enumerate(config.stages):
        _check_fields(stage_config, stage(), f"config.stages[{index}]")
        for number, source_config in enumerate(stage_config.sources):
            where = f"config.stages[{index}].sources[{number}]"
            require(isinstance(source_config, ConfigDict), f"{where} is not a source(...).")
            _check_fields(source_config, source(), where)
    validate_section(config.model)
    _regular_expressions("config.weights.skip", config.weights.skip)


def _validate_generation(generation: ConfigDict) -> None:
    from dynfocus_jax.serving.token_sampling import SamplingParams, check_sampling

    where = "config.generation"
    positive(generation, where, "max_new_tokens", "cache", "read")
    for key in ("num_frames", "max_length"):
        if generation[key] is not None:
            positive(generation, where, key)
    require(generation.looks >= 0, f"{where}.looks is {generation.looks}, expected at least 0.")
    check_sampling(SamplingParams(generation.temperature, generation.top_k, generation.top_p), where)
    for key in ("frames", "text", "batch"):
        sizes = generation[key]
        require(
            (key == "frames" or len(sizes) > 0)
            and all(type(size) is int and size > 0 for size in sizes)
            and all(small < large for small, large in itertools.pairwise(sizes)),
            f"{where}.{key} is {sizes}, expected ascending sizes greater than 0.",
        )


def validate(config: ConfigDict, devices: int = 1) -> None:
    """Check every field before anything is built.

    Args:
      config: as from a config file.
      devices: those on the mesh's data and fsdp axes, which share the rows of a batch.

    Raises:
      UserError: one sentence that names the field, its value and the remedy.
    """
    from dynfocus_jax.features.store import check_storable

    validate_model(config)
    require(len(config.stages) > 0, "config.stages is empty, expected at least one stage(...).")
    for index, stage_config in enumerate(config.stages):
        _validate_stage(stage_config, f"config.stages[{index}]", devices)
        require(
            stage_config.max_turns is None or config.data.text_guidance != "each_turn",
            f"config.stages[{index}].max_turns is {stage_config.max_turns}, but with text_guidance "
            "'each_turn' every turn is a sample; leave it out.",
        )
    if config.initial is not None:
        folder = Path(config.initial).expanduser()
        require(
            (folder / "params").is_dir() or (folder.name.isdigit() and folder.is_dir()),
            f"config.initial is {config.initial!r}, expected WORKDIR/checkpoints/STAGE/STEP of a training "
            "run, or the --output of python -m dynfocus_jax.convert.",
        )
    names = [stage_config.name for stage_config in config.stages]
    require(len(set(names)) == len(names), f"config.stages has two stages of one name: {', '.join(names)}.")
    _validate_data(config.data, config.model.text_encoder.max_text)
    if config.data.features is not None:
        check_storable(config)
    validate_distributed(config.distributed)
    _validate_mesh(config.mesh)
    _validate_checkpoint(config.checkpoint)
    positive(config, "config", "log_every")
    _validate_generation(config.generation)
    evaluation = config.evaluation
    if evaluation.annotations is not None:
        positive(
            evaluation,
            "config.evaluation",
            *("media_frames", "max_text", "batch_size", "max_new_tokens"),
        )
        require(
            evaluation.max_subtitle >= 0,
            f"config.evaluation.max_subtitle is {evaluation.max_subtitle}, expected at least 0.",
        )
        require(
            evaluation.batch_size % devices == 0,
            f"config.evaluation.batch_size is {evaluation.batch_size}, which the {devices} devices of the "
            f"mesh's data and fsdp axes do not divide; choose a multiple of {devices}.",
        )
