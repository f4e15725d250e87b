"""Checks of the section `config.model`, and what all checks are made of."""

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.errors import UserError


def require(condition: bool, sentence: str) -> None:
    """Raises UserError with the sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def one_of(where: str, value, choices) -> None:
    """Whether a field has one of its choices."""
    require(value in choices, f"{where} is {value!r}, expected one of {', '.join(map(repr, choices))}.")


def positive(section: ConfigDict, where: str, *keys: str) -> None:
    """Whether fields of a section are set and greater than 0."""
    for key in keys:
        value = section[key]
        require(
            value is not None and value > 0, f"{where}.{key} is {value}, expected a number greater than 0."
        )


def validate_section(model: ConfigDict) -> None:
    """The section `config.model`, whose fields exist and have their types."""
    from dynfocus_jax.connectors.connectors_old import KINDS
    from dynfocus_jax.connectors.dynfocus.cooperative import CONES, PROJECTORS, RODS
    from dynfocus_jax.connectors.dynfocus.event_prototypes import SELECTIONS
    from dynfocus_jax.models.layers import ACTIVATIONS, REMAT_POLICIES
    from dynfocus_jax.ops.clustering import METHODS

    where = "config.model"
    vision, language, text = model.vision, model.language, model.text_encoder
    dpe, cce = model.dpe, model.cce
    one_of(f"{where}.mode", model.mode, ("paper", "released"))
    for key in ("dtype", "param_dtype"):
        one_of(f"{where}.{key}", model[key], ("float32", "bfloat16"))
    one_of(f"{where}.vision.activation", vision.activation, ACTIVATIONS)
    for name in ("vision", "language", "text_encoder"):
        one_of(f"{where}.{name}.remat", model[name].remat, REMAT_POLICIES)
    for name in ("vision", "language", "text_encoder"):
        one_of(f"{where}.{name}.attention", model[name].attention, (None, "xla", "cudnn"))
    positive(vision, f"{where}.vision", "image_size", "patch_size", "width", "depth", "heads", "mlp_dim")
    positive(
        language,
        f"{where}.language",
        *("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_dim"),
    )
    positive(
        text,
        f"{where}.text_encoder",
        *("vocab_size", "max_text", "num_queries", "width", "depth", "heads", "mlp_dim", "cross_every"),
    )
    for key in ("mean", "std"):
        require(
            len(vision[key]) == 3 and all(isinstance(value, int | float) for value in vision[key]),
            f"{where}.vision.{key} is {tuple(vision[key])}, expected three numbers: red, green, blue.",
        )
    for name in ("vision", "text_encoder"):
        section = model[name]
        require(
            section.width % section.heads == 0,
            f"{where}.{name}.width is {section.width}, which its {section.heads} heads do not divide; "
            "change one of them.",
        )
    require(
        language.heads % language.kv_heads == 0,
        f"{where}.language.heads is {language.heads}, not a multiple of kv_heads = {language.kv_heads}.",
    )
    _validate_lora(language.lora, f"{where}.language.lora")
    require(language.head_dim % 2 == 0, f"{where}.language.head_dim is {language.head_dim}, expected even.")
    _validate_rope(language, f"{where}.language")
    require(
        -vision.depth <= vision.select_layer <= -1,
        f"{where}.vision.select_layer is {vision.select_layer}, expected -1 (the last of the {vision.depth} "
        f"blocks) to -{vision.depth} (the first).",
    )
    require(
        vision.select_layer == -1 or not vision.final_norm,
        f"{where}.vision.final_norm follows the last block, but select_layer is {vision.select_layer}; "
        "set final_norm to False, or select_layer to -1.",
    )
    for name, key in (
        ("vision", "eps"),
        ("language", "eps"),
        ("text_encoder", "eps"),
        ("text_encoder", "vision_eps"),
    ):
        positive(model[name], f"{where}.{name}", key)
    require(
        vision.image_size % vision.patch_size == 0,
        f"{where}.vision.image_size is {vision.image_size}, not a multiple of patch_size = "
        f"{vision.patch_size}.",
    )

    grid = vision.image_size // vision.patch_size
    one_of(f"{where}.connector.kind", model.connector.kind, KINDS)
    one_of(f"{where}.connector.projector", model.connector.projector, PROJECTORS)
    require(
        len(model.connector.pool) == 2 and all(p > 0 and grid % p == 0 for p in model.connector.pool),
        f"{where}.connector.pool is {tuple(model.connector.pool)}, expected two divisors of the {grid} "
        "patches a side.",
    )

    positive(dpe, f"{where}.dpe", "num_prototypes", "neighbors", "samples")
    require(0 < dpe.ratio <= 1, f"{where}.dpe.ratio is {dpe.ratio}, expected a number in (0, 1].")
    require(dpe.sigma >= 0, f"{where}.dpe.sigma is {dpe.sigma}, expected at least 0.")
    if dpe.num_selected is not None:
        require(
            dpe.num_selected >= 1 and (dpe.num_selected <= dpe.num_prototypes or dpe.selection != "learned"),
            f"{where}.dpe.num_selected (J) is {dpe.num_selected}, expected 1 to num_prototypes (K) = "
            f"{dpe.num_prototypes}; lower J or raise K.",
        )
    one_of(f"{where}.dpe.clustering", dpe.clustering, METHODS)
    one_of(f"{where}.dpe.kmeans_init", dpe.kmeans_init, ("spread", "random"))
    one_of(f"{where}.dpe.selection", dpe.selection, SELECTIONS)
    one_of(f"{where}.dpe.jacobian", dpe.jacobian, ("full", "diagonal"))

    one_of(f"{where}.cce.clustering", cce.clustering, METHODS)
    one_of(f"{where}.cce.cones", cce.cones, CONES)
    for part in cce.rods:
        one_of(f"an entry of {where}.cce.rods", part, RODS)
    require(
        len(cce.levels) > 0, f"{where}.cce.levels is empty, expected (M, k) pairs such as ((16, 8), (8, 3))."
    )
    finer = grid * grid
    for index, level in enumerate(cce.levels):
        require(
            isinstance(level, tuple | list) and len(level) == 2 and 1 <= level[0] <= finer and level[1] >= 1,
            f"{where}.cce.levels[{index}] is {level}, expected (M, k) with 1 <= M <= {finer} "
            "(the tokens of the level before) and k >= 1.",
        )
        finer = level[0]
    require(
        model.mode == "paper" or len(cce.levels) == 2,
        f"{where}.cce.levels has {len(cce.levels)} levels, but mode 'released' groups exactly 2.",
    )
    for name, parts in (("single_grained", (cce.cones,)), ("coarse", cce.rods)):
        require(
            model.mode == "paper" or name not in parts,
            f"{where}.cce asks for {name!r}, but mode 'released' merges the levels into one; "
            "leave it out, or choose mode 'paper'.",
        )
    require(
        cce.cones != "none" or len(cce.rods) > 0,
        f"{where}.cce has neither cones nor rods; keep at least one of them.",
    )


def _validate_lora(lora: ConfigDict, where: str) -> None:
    from dynfocus_jax.models.llama import PROJECTIONS

    require(lora.rank >= 0, f"{where}.rank is {lora.rank}, expected at least 0.")
    positive(lora, where, "alpha")
    for target in lora.targets:
        one_of(f"an entry of {where}.targets", target, PROJECTIONS)
    require(
        lora.rank == 0 or len(lora.targets) > 0,
        f"{where}.targets is empty, but rank is {lora.rank}; name projections, or set rank to 0.",
    )


def _validate_rope(language: ConfigDict, where: str) -> None:
    from dynfocus_jax.models.llama import ROPE_SCALINGS

    one_of(f"{where}.rope_scaling", language.rope_scaling, ROPE_SCALINGS)
    positive(language, where, "rope_theta", "rope_factor", "rope_low_freq", "rope_original_length")
    require(
        language.rope_scaling != "none" or language.rope_factor == 1,
        f"{where}.rope_factor is {language.rope_factor}, but rope_scaling is 'none'; choose 'linear' or "
        "'llama3', or leave the factor 1.",
    )
    require(
        language.rope_low_freq < language.rope_high_freq,
        f"{where}.rope_low_freq is {language.rope_low_freq}, expected less than rope_high_freq = "
        f"{language.rope_high_freq}.",
    )
