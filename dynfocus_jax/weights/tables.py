"""Tables of published backbones: for every published name, our path and the layout of the weight."""

from dynfocus_jax.connectors.registry import connector_kinds, find_connector
from dynfocus_jax.published_names import DENSE, HEADS, HEADS_BIAS, MERGE, Family, Rule, linear, norm


def _attention(query: str, key: str, value: str, out: str, path: str) -> tuple[Rule, ...]:
    """Return the rules of an attention with separate projections, all with a bias."""
    projections = zip((query, key, value), ("query", "key", "value"), strict=True)
    return (
        *(rule for name, ours in projections for rule in linear(name, f"{path}/{ours}", HEADS, HEADS_BIAS)),
        *linear(out, f"{path}/out", MERGE),
    )


_BUFFERS = {r"(.*\.)?position_ids": "a buffer of position numbers, not a parameter"}
_UNUSED = "applied after the layer whose output is used"

# --- Vision -------------------------------------------------------------------------------------------

_PATCHES = "width channel row column -> (row column channel) width"
_QKV = "(part head dim) width -> part width head dim"

EVA_LAVIS = Family(
    part="vision",
    title="EVA-CLIP ViT of LAVIS (eva_vit_g.pth)",
    prefix=r"visual_encoder\.|model\.|vision_tower\.",
    rules=(
        *linear("patch_embed.proj", "patch_embedding", _PATCHES),
        Rule("cls_token", "cls", "1 1 width -> width"),
        Rule("pos_embed", "position", "1 token width -> token width"),
        *norm("blocks.{layer}.norm1", "blocks/attention_norm"),
        Rule("blocks.{layer}.attn.qkv.weight", "blocks/attention/{part}/kernel", _QKV),
        Rule("blocks.{layer}.attn.q_bias", "blocks/attention/query/bias", HEADS_BIAS),
        Rule("blocks.{layer}.attn.v_bias", "blocks/attention/value/bias", HEADS_BIAS),
        *linear("blocks.{layer}.attn.proj", "blocks/attention/out", MERGE),
        *norm("blocks.{layer}.norm2", "blocks/mlp_norm"),
        *linear("blocks.{layer}.mlp.fc1", "blocks/mlp/up"),
        *linear("blocks.{layer}.mlp.fc2", "blocks/mlp/down"),
    ),
    zeros=("blocks/attention/key/bias",),
    ignored={
        r"(norm|fc_norm|head)\.(weight|bias)": "EVA-CLIP's output norm and head, which LAVIS does not build",
        r"mask_token": "used in EVA's pretraining only",
    },
    spare_layers=1,  # the file has 40 blocks; LAVIS, and with it the paper, builds 39
)

INSTRUCT_BLIP_VISION = Family(
    part="vision",
    title="EVA-CLIP ViT of the Hugging Face InstructBLIP (vision_model.*)",
    prefix=r"vision_model\.|model\.",
    rules=(
        *linear("vision_model.embeddings.patch_embedding", "patch_embedding", _PATCHES),
        Rule("vision_model.embeddings.class_embedding", "cls", "1 1 width -> width"),
        Rule("vision_model.embeddings.position_embedding", "position", "1 token width -> token width"),
        *norm("vision_model.encoder.layers.{layer}.layer_norm1", "blocks/attention_norm"),
        Rule(
            "vision_model.encoder.layers.{layer}.self_attn.qkv.weight", "blocks/attention/{part}/kernel", _QKV
        ),
        Rule(
            "vision_model.encoder.layers.{layer}.self_attn.qkv.bias",
            "blocks/attention/{part}/bias",
            "(part head dim) -> part head dim",
        ),
        *linear("vision_model.encoder.layers.{layer}.self_attn.projection", "blocks/attention/out", MERGE),
        *norm("vision_model.encoder.layers.{layer}.layer_norm2", "blocks/mlp_norm"),
        *linear("vision_model.encoder.layers.{layer}.mlp.fc1", "blocks/mlp/up"),
        *linear("vision_model.encoder.layers.{layer}.mlp.fc2", "blocks/mlp/down"),
        *norm(
            "vision_model.post_layernorm",
            "final_norm",
            unless="ln_vision, which belongs to the text encoder (vision_norm)",
        ),
    ),
)


def _clip_blocks() -> tuple[Rule, ...]:
    """Return the rules of the transformer blocks of CLIP and SigLIP."""
    layer = "vision_model.encoder.layers.{layer}"
    query, key, value, out = (f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
    return (
        *norm(f"{layer}.layer_norm1", "blocks/attention_norm"),
        *_attention(query, key, value, out, "blocks/attention"),
        *norm(f"{layer}.layer_norm2", "blocks/mlp_norm"),
        *linear(f"{layer}.mlp.fc1", "blocks/mlp/up"),
        *linear(f"{layer}.mlp.fc2", "blocks/mlp/down"),
    )


_CONTRASTIVE = {
    r"(.*\.)?(text_model|text_projection|visual_projection)\..*": "text model and projections, not used here",
    r"(.*\.)?logit_(scale|bias)": "used in the contrastive loss only",
    **_BUFFERS,
}

CLIP = Family(
    part="vision",
    title="CLIP vision model (Hugging Face)",
    prefix=r"model\.|vision_tower\.|vision_model\.",
    rules=(
        Rule("vision_model.embeddings.patch_embedding.weight", "patch_embedding/kernel", _PATCHES),
        Rule("vision_model.embeddings.class_embedding", "cls"),
        Rule("vision_model.embeddings.position_embedding.weight", "position"),
        *norm("vision_model.pre_layrnorm", "pre_norm"),
        *_clip_blocks(),
        *norm(
            "vision_model.post_layernorm", "final_norm", unless="applied to the pooled output, not used here"
        ),
    ),
    ignored=_CONTRASTIVE,
)

SIGLIP = Family(
    part="vision",
    title="SigLIP or SigLIP 2 vision model (Hugging Face)",
    prefix=r"model\.|vision_tower\.|vision_model\.",
    rules=(
        *linear("vision_model.embeddings.patch_embedding", "patch_embedding", _PATCHES),
        Rule("vision_model.embeddings.position_embedding.weight", "position"),
        *_clip_blocks(),
        *norm("vision_model.post_layernorm", "final_norm", unless=_UNUSED),
    ),
    ignored=_CONTRASTIVE | {r"(.*\.)?head\..*": "pooling head, not used here"},
)

# --- Text encoder (Q-Former) --------------------------------------------------------------------------


def _qformer(
    bert: str, attention: str, embedding_norm: str, queries: str, vision_norm: str
) -> tuple[Rule, ...]:
    """Return the rules of a Q-Former, given the published names of its modules."""
    layer, ours = f"{bert}.encoder.layer.{{layer}}", "blocks_{layer}"

    def block(name, path):
        query, key, value = (f"{layer}.{name}.{attention}.{part}" for part in ("query", "key", "value"))
        return (
            *_attention(query, key, value, f"{layer}.{name}.output.dense", f"{ours}/{path}"),
            *norm(f"{layer}.{name}.output.LayerNorm", f"{ours}/{path}_norm"),
        )

    def feed_forward(suffix, path):
        return (
            *linear(f"{layer}.intermediate{suffix}.dense", f"{ours}/{path}/up"),
            *linear(f"{layer}.output{suffix}.dense", f"{ours}/{path}/down"),
            *norm(f"{layer}.output{suffix}.LayerNorm", f"{ours}/{path}_norm"),
        )

    return (
        Rule(queries, "queries", "1 query width -> query width"),
        *norm(vision_norm, "vision_norm"),
        Rule(f"{bert}.embeddings.word_embeddings.weight", "word_embedding/embedding"),
        Rule(f"{bert}.embeddings.position_embeddings.weight", "position_embedding/embedding"),
        *norm(f"{bert}.embeddings.{embedding_norm}", "embedding_norm"),
        *block("attention", "attention"),
        *block("crossattention", "cross_attention"),
        *feed_forward("", "text_mlp"),
        *feed_forward("_query", "query_mlp"),
    )


_QUERY_PROJECTION = linear("model.vlm_att_projector", "query_projection")

QFORMER_LAVIS = Family(
    part="text_encoder",
    title="Q-Former of LAVIS (instruct_blip_vicuna7b_trimmed.pth)",
    prefix="",
    rules=_qformer("Qformer.bert", "self", "LayerNorm", "query_tokens", "ln_vision"),
    lacks=(r"query_projection/.*",),
    ignored=_BUFFERS
    | {
        r"Qformer\.cls\..*": "used in the Q-Former's pretraining only",
        r"llm_proj\.(weight|bias)": "projection into LAVIS' language model",
    },
)

QFORMER_INSTRUCT_BLIP = Family(
    part="text_encoder",
    title="Q-Former of the Hugging Face InstructBLIP (qformer.*, query_tokens, vision_model.post_layernorm)",
    prefix=r"model\.|qformer\.",
    rules=_qformer("qformer", "attention", "layernorm", "query_tokens", "vision_model.post_layernorm"),
    lacks=(r"query_projection/.*",),
    ignored=_BUFFERS
    | {r"language_projection\.(weight|bias)": "projection into InstructBLIP's language model"},
)

QFORMER_LLAMA_VID = Family(
    part="text_encoder",
    title="Q-Former of LLaMA-VID (model.vlm_att_encoder.*)",
    prefix=r"model\.",
    rules=(
        *_qformer(
            "model.vlm_att_encoder.bert", "self", "LayerNorm", "model.vlm_att_query", "model.vlm_att_ln"
        ),
        *_QUERY_PROJECTION,
    ),
    ignored=_BUFFERS,
)

# --- Language models ----------------------------------------------------------------------------------


def _decoder(extra: tuple[Rule, ...] = ()) -> tuple[Rule, ...]:
    """Return the rules of a Llama-like decoder.

    extra: rules of the attention that a family has besides the kernels.
    """
    layer = "model.layers.{layer}"
    attention = [
        Rule(f"{layer}.self_attn.{name}_proj.weight", f"blocks/{path}/kernel", HEADS)
        for name, path in (("q", "query"), ("k", "key"), ("v", "value"))
    ]
    return (
        Rule("model.embed_tokens.weight", "embedding/embedding"),
        Rule(f"{layer}.input_layernorm.weight", "blocks/attention_norm/scale"),
        *attention,
        *extra,
        Rule(f"{layer}.self_attn.o_proj.weight", "blocks/out/kernel", MERGE),
        Rule(f"{layer}.post_attention_layernorm.weight", "blocks/mlp_norm/scale"),
        *(
            Rule(f"{layer}.mlp.{name}_proj.weight", f"blocks/{name}/kernel", DENSE)
            for name in ("gate", "up", "down")
        ),
        Rule("model.norm.weight", "final_norm/scale"),
        Rule("lm_head.weight", "head/kernel", DENSE, unless=TIED),
    )


TIED = "equals the embedding, to which the head is tied"


def _decoder_family(title: str, extra: tuple[Rule, ...] = ()) -> Family:
    """Return the table of a decoder; `extra` as in `_decoder`."""
    return Family(
        part="language",
        title=title,
        prefix=r"language_model\.|model\.",
        rules=_decoder(extra),
        ignored={r"(.*\.)?rotary_emb\.inv_freq(\.weight)?": "computed from the RoPE settings"},
    )


LLAMA = _decoder_family("Llama (Vicuna, SmolLM2; Hugging Face)")

QWEN2 = _decoder_family(
    "Qwen2 or Qwen2.5 (Hugging Face)",
    tuple(
        Rule(f"model.layers.{{layer}}.self_attn.{name}_proj.bias", f"blocks/{path}/bias", HEADS_BIAS)
        for name, path in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
)

QWEN3 = _decoder_family(
    "Qwen3 (Hugging Face)",
    tuple(
        Rule(f"model.layers.{{layer}}.self_attn.{name}_norm.weight", f"blocks/{path}_norm/scale")
        for name, path in (("q", "query"), ("k", "key"))
    ),
)

# --- Connectors ---------------------------------------------------------------------------------------

# W_q is in the text encoder's tree, but published with the connector.
QUERY_PROJECTION = Family(
    part="query_projection",
    title="W_q of LLaMA-VID or DynFocus (model.vlm_att_projector)",
    prefix=r"model\.",
    rules=(
        Rule("model.vlm_att_projector.weight", "kernel", DENSE),
        Rule("model.vlm_att_projector.bias", "bias"),
    ),
)

FAMILIES: dict[str, Family] = {
    "eva_lavis": EVA_LAVIS,
    "instruct_blip_vision": INSTRUCT_BLIP_VISION,
    "clip": CLIP,
    "siglip": SIGLIP,
    "qformer_lavis": QFORMER_LAVIS,
    "qformer_instruct_blip": QFORMER_INSTRUCT_BLIP,
    "qformer_llama_vid": QFORMER_LLAMA_VID,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "query_projection": QUERY_PROJECTION,
    **{name: family for kind in connector_kinds() for name, family in find_connector(kind).PUBLISHED.items()},
}
