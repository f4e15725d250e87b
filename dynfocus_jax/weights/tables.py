"""One table a family of checkpoints: every published name, where it stands in our tree, and its layout.

A rule works in both directions. `{layer}` in the published name numbers the layers: in our path it is either
the leading axis of a stacked leaf, or part of the path. `{part}` in our path makes one published tensor feed
several leaves (query, key and value). The layout is an einops pattern from the published to our axes; a
stacked leaf's layer axis is left out of it. Row, column and channel are those of a square RGB patch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

PARTS = ("vision", "text_encoder", "language", "connector", "query_projection")
FUSED = ("query", "key", "value")  # what `{part}` stands for, in the order of fused weights


class Rule(NamedTuple):
    """A published name, our path below the part, the layout (None: the same) and whether models may lack it.

    `unless`: why the weight is left out when the model has no such parameter; None makes that an error.
    """

    name: str
    path: str
    layout: str | None = None
    unless: str | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """How one kind of published checkpoint stores one part of the model.

    Attributes:
      part: one of `PARTS`.
      title: for messages.
      prefix: regular expression of what may stand before every name (repeatedly), e.g. `model\\.`.
      rules: in the order of the network.
      zeros: our leaves that are zero by definition and not stored.
      lacks: regular expressions of our leaves that such checkpoints never hold.
      ignored: regular expression of published names -> why they are left out.
      spare_layers: layers that published files hold beyond those of the network.
    """

    part: str
    title: str
    prefix: str
    rules: tuple[Rule, ...]
    zeros: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    spare_layers: int = 0

    def __post_init__(self):
        compiled = [
            (re.compile(f"(?:{self.prefix})*{_pattern(rule.name, self.prefix)}"), rule) for rule in self.rules
        ]
        ignored = [
            (re.compile(f"(?:{self.prefix})*(?:{pattern})"), why) for pattern, why in self.ignored.items()
        ]
        object.__setattr__(self, "_compiled", compiled)
        object.__setattr__(self, "_ignored", ignored)

    def match(self, name: str) -> tuple[Rule, int | None] | None:
        """The rule of a published name and the layer in it."""
        for pattern, rule in self._compiled:
            found = pattern.fullmatch(name)
            if found:
                return rule, int(found["layer"]) if "layer" in pattern.groupindex else None
        return None

    def is_lacking(self, path: str) -> bool:
        """Whether such checkpoints never hold one of our leaves."""
        return any(re.fullmatch(pattern, path) for pattern in self.lacks)

    def reason_to_ignore(self, name: str) -> str | None:
        """Why the table leaves a published name out; None when it does not."""
        return next((why for pattern, why in self._ignored if pattern.fullmatch(name)), None)


def _pattern(name: str, prefix: str) -> str:
    """Regular expression of a published name, without the prefix that it is exported with."""
    bare = re.sub(rf"^(?:{prefix})*", "", name) if prefix else name
    return re.escape(bare).replace(r"\{layer\}", r"(?P<layer>\d+)")


# --- Building blocks of tables ------------------------------------------------------------------------

_DENSE = "output input -> input output"
_HEADS = "(head dim) width -> width head dim"  # of query, key, value
_HEADS_BIAS = "(head dim) -> head dim"
_MERGE = "width (head dim) -> head dim width"  # of the output projection


def _linear(name: str, path: str, layout: str = _DENSE, bias: str | None = None) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/kernel", layout), Rule(f"{name}.bias", f"{path}/bias", bias)


def _norm(name: str, path: str, unless: str | None = None) -> tuple[Rule, ...]:
    weight, bias = (name + ".weight", f"{path}/scale"), (name + ".bias", f"{path}/bias")
    return Rule(*weight, unless=unless), Rule(*bias, unless=unless)


def _attention(query: str, key: str, value: str, out: str, path: str) -> tuple[Rule, ...]:
    """Separate projections of a biased attention."""
    projections = zip((query, key, value), ("query", "key", "value"), strict=True)
    return (
        *(
            rule
            for name, ours in projections
            for rule in _linear(name, f"{path}/{ours}", _HEADS, _HEADS_BIAS)
        ),
        *_linear(out, f"{path}/out", _MERGE),
    )


_BUFFERS = {r"(.*\.)?position_ids": "counts positions, no parameter"}
_UNUSED = "behind the layer whose output is taken"

# --- Vision -------------------------------------------------------------------------------------------

_PATCHES = "width channel row column -> (row column channel) width"
_QKV = "(part head dim) width -> part width head dim"

EVA_LAVIS = Family(
    part="vision",
    title="EVA-CLIP ViT of LAVIS (eva_vit_g.pth)",
    prefix=r"visual_encoder\.|model\.|vision_tower\.",
    rules=(
        *_linear("patch_embed.proj", "patch_embedding", _PATCHES),
        Rule("cls_token", "cls", "1 1 width -> width"),
        Rule("pos_embed", "position", "1 token width -> token width"),
        *_norm("blocks.{layer}.norm1", "blocks/attention_norm"),
        Rule("blocks.{layer}.attn.qkv.weight", "blocks/attention/{part}/kernel", _QKV),
        Rule("blocks.{layer}.attn.q_bias", "blocks/attention/query/bias", _HEADS_BIAS),
        Rule("blocks.{layer}.attn.v_bias", "blocks/attention/value/bias", _HEADS_BIAS),
        *_linear("blocks.{layer}.attn.proj", "blocks/attention/out", _MERGE),
        *_norm("blocks.{layer}.norm2", "blocks/mlp_norm"),
        *_linear("blocks.{layer}.mlp.fc1", "blocks/mlp/up"),
        *_linear("blocks.{layer}.mlp.fc2", "blocks/mlp/down"),
    ),
    zeros=("blocks/attention/key/bias",),
    ignored={
        r"(norm|fc_norm|head)\.(weight|bias)": "of EVA-CLIP's own output, which LAVIS does not build",
        r"mask_token": "of EVA's pretraining",
    },
    spare_layers=1,  # the file has 40 blocks, of which LAVIS (and so the paper) builds 39
)

INSTRUCT_BLIP_VISION = Family(
    part="vision",
    title="EVA-CLIP ViT of the Hugging Face InstructBLIP (vision_model.*)",
    prefix=r"vision_model\.|model\.",
    rules=(
        *_linear("vision_model.embeddings.patch_embedding", "patch_embedding", _PATCHES),
        Rule("vision_model.embeddings.class_embedding", "cls", "1 1 width -> width"),
        Rule("vision_model.embeddings.position_embedding", "position", "1 token width -> token width"),
        *_norm("vision_model.encoder.layers.{layer}.layer_norm1", "blocks/attention_norm"),
        Rule(
            "vision_model.encoder.layers.{layer}.self_attn.qkv.weight", "blocks/attention/{part}/kernel", _QKV
        ),
        Rule(
            "vision_model.encoder.layers.{layer}.self_attn.qkv.bias",
            "blocks/attention/{part}/bias",
            "(part head dim) -> part head dim",
        ),
        *_linear("vision_model.encoder.layers.{layer}.self_attn.projection", "blocks/attention/out", _MERGE),
        *_norm("vision_model.encoder.layers.{layer}.layer_norm2", "blocks/mlp_norm"),
        *_linear("vision_model.encoder.layers.{layer}.mlp.fc1", "blocks/mlp/up"),
        *_linear("vision_model.encoder.layers.{layer}.mlp.fc2", "blocks/mlp/down"),
        *_norm(
            "vision_model.post_layernorm",
            "final_norm",
            unless="is ln_vision, which belongs to the text encoder (vision_norm)",
        ),
    ),
)


def _clip_blocks() -> tuple[Rule, ...]:
    layer = "vision_model.encoder.layers.{layer}"
    names = [f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    return (
        *_norm(f"{layer}.layer_norm1", "blocks/attention_norm"),
        *_attention(*names, "blocks/attention"),
        *_norm(f"{layer}.layer_norm2", "blocks/mlp_norm"),
        *_linear(f"{layer}.mlp.fc1", "blocks/mlp/up"),
        *_linear(f"{layer}.mlp.fc2", "blocks/mlp/down"),
    )


_CONTRASTIVE = {
    r"(.*\.)?(text_model|text_projection|visual_projection)\..*": "of the contrastive text side",
    r"(.*\.)?logit_(scale|bias)": "of the contrastive loss",
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
        *_norm("vision_model.pre_layrnorm", "pre_norm"),
        *_clip_blocks(),
        *_norm(
            "vision_model.post_layernorm", "final_norm", unless="norms the pooled output, which is not read"
        ),
    ),
    ignored=_CONTRASTIVE,
)

SIGLIP = Family(
    part="vision",
    title="SigLIP or SigLIP 2 vision model (Hugging Face)",
    prefix=r"model\.|vision_tower\.|vision_model\.",
    rules=(
        *_linear("vision_model.embeddings.patch_embedding", "patch_embedding", _PATCHES),
        Rule("vision_model.embeddings.position_embedding.weight", "position"),
        *_clip_blocks(),
        *_norm("vision_model.post_layernorm", "final_norm", unless=_UNUSED),
    ),
    ignored=_CONTRASTIVE | {r"(.*\.)?head\..*": "of the pooling head, whose single token is not read"},
)

# --- Text encoder (Q-Former) --------------------------------------------------------------------------


def _qformer(bert: str, attention: str, norm: str, queries: str, vision_norm: str) -> tuple[Rule, ...]:
    """Rules of a Q-Former: `attention` is the name of the projections' module, `norm` of the embeddings'."""
    layer, ours = f"{bert}.encoder.layer.{{layer}}", "blocks_{layer}"

    def block(name, path):
        parts = [f"{layer}.{name}.{attention}.{part}" for part in ("query", "key", "value")]
        return (
            *_attention(*parts, f"{layer}.{name}.output.dense", f"{ours}/{path}"),
            *_norm(f"{layer}.{name}.output.LayerNorm", f"{ours}/{path}_norm"),
        )

    def feed_forward(suffix, path):
        return (
            *_linear(f"{layer}.intermediate{suffix}.dense", f"{ours}/{path}/up"),
            *_linear(f"{layer}.output{suffix}.dense", f"{ours}/{path}/down"),
            *_norm(f"{layer}.output{suffix}.LayerNorm", f"{ours}/{path}_norm"),
        )

    return (
        Rule(queries, "queries", "1 query width -> query width"),
        *_norm(vision_norm, "vision_norm"),
        Rule(f"{bert}.embeddings.word_embeddings.weight", "word_embedding/embedding"),
        Rule(f"{bert}.embeddings.position_embeddings.weight", "position_embedding/embedding"),
        *_norm(f"{bert}.embeddings.{norm}", "embedding_norm"),
        *block("attention", "attention"),
        *block("crossattention", "cross_attention"),
        *feed_forward("", "text_mlp"),
        *feed_forward("_query", "query_mlp"),
    )


_QUERY_PROJECTION = _linear("model.vlm_att_projector", "query_projection")

QFORMER_LAVIS = Family(
    part="text_encoder",
    title="Q-Former of LAVIS (instruct_blip_vicuna7b_trimmed.pth)",
    prefix="",
    rules=_qformer("Qformer.bert", "self", "LayerNorm", "query_tokens", "ln_vision"),
    lacks=(r"query_projection/.*",),
    ignored=_BUFFERS
    | {
        r"Qformer\.cls\..*": "of the Q-Former's pretraining",
        r"llm_proj\.(weight|bias)": "from the Q-Former to LAVIS' language model",
    },
)

QFORMER_INSTRUCT_BLIP = Family(
    part="text_encoder",
    title="Q-Former of the Hugging Face InstructBLIP (qformer.*, query_tokens, vision_model.post_layernorm)",
    prefix=r"model\.|qformer\.",
    rules=_qformer("qformer", "attention", "layernorm", "query_tokens", "vision_model.post_layernorm"),
    lacks=(r"query_projection/.*",),
    ignored=_BUFFERS
    | {r"language_projection\.(weight|bias)": "from the Q-Former to InstructBLIP's language model"},
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
    layer = "model.layers.{layer}"
    attention = [
        Rule(f"{layer}.self_attn.{name}_proj.weight", f"blocks/{path}/kernel", _HEADS)
        for name, path in (("q", "query"), ("k", "key"), ("v", "value"))
    ]
    return (
        Rule("model.embed_tokens.weight", "embedding/embedding"),
        Rule(f"{layer}.input_layernorm.weight", "blocks/attention_norm/scale"),
        *attention,
        *extra,
        Rule(f"{layer}.self_attn.o_proj.weight", "blocks/out/kernel", _MERGE),
        Rule(f"{layer}.post_attention_layernorm.weight", "blocks/mlp_norm/scale"),
        *(
            Rule(f"{layer}.mlp.{name}_proj.weight", f"blocks/{name}/kernel", _DENSE)
            for name in ("gate", "up", "down")
        ),
        Rule("model.norm.weight", "final_norm/scale"),
        Rule("lm_head.weight", "head/kernel", _DENSE, unless=TIED),
    )


TIED = "equals the embedding, to which the head is tied"
_DECODER = {
    "part": "language",
    "prefix": r"language_model\.|model\.",
    "ignored": {r"(.*\.)?rotary_emb\.inv_freq(\.weight)?": "follows from the RoPE settings"},
}

LLAMA = Family(title="Llama (Vicuna, SmolLM2; Hugging Face)", rules=_decoder(), **_DECODER)

QWEN2 = Family(
    title="Qwen2 or Qwen2.5 (Hugging Face)",
    rules=_decoder(
        tuple(
            Rule(f"model.layers.{{layer}}.self_attn.{name}_proj.bias", f"blocks/{path}/bias", _HEADS_BIAS)
            for name, path in (("q", "query"), ("k", "key"), ("v", "value"))
        )
    ),
    **_DECODER,
)

QWEN3 = Family(
    title="Qwen3 (Hugging Face)",
    rules=_decoder(
        tuple(
            Rule(f"model.layers.{{layer}}.self_attn.{name}_norm.weight", f"blocks/{path}_norm/scale")
            for name, path in (("q", "query"), ("k", "key"))
        )
    ),
    **_DECODER,
)

# --- Connectors ---------------------------------------------------------------------------------------

_MM_PROJECTOR = (
    *_linear("model.mm_projector.0", "projector/up"),
    *_linear("model.mm_projector.2", "projector/down"),
)
_CONTEXT = (
    *_linear("model.vlm_att_key_projector", "cce/context/key"),
    *_linear("model.vlm_att_val_projector", "cce/context/value"),
)

LLAMA_VID = Family(
    part="connector",
    title="LLaMA-VID projectors (model.mm_projector.*, model.vlm_att_*)",
    prefix=r"model\.",
    rules=_MM_PROJECTOR + _CONTEXT,
    lacks=(r"dpe/.*", r"cce/(spatial|fusion)/.*"),
)

# The names of the authors' released code, ours in its style for what it has not.
DYNFOCUS = Family(
    part="connector",
    title="DynFocus connector (model.mm_projector.*, model.selective.*, model.merge.*)",
    prefix=r"model\.",
    rules=(
        *_MM_PROJECTOR,
        *_linear("model.mm_projector.linear", "projector/linear"),
        *_CONTEXT,
        *_linear("model.merge.score", "cce/spatial/gate"),
        *_norm("model.selective.score_network.in_conv.0", "dpe/score_net/in_norm"),
        *_linear("model.selective.score_network.in_conv.1", "dpe/score_net/in_dense"),
        *_linear("model.selective.score_network.out_conv.0", "dpe/score_net/out_dense_0"),
        *_linear("model.selective.score_network.out_conv.2", "dpe/score_net/out_dense_1"),
        *_linear("model.selective.score_network.out_conv.4", "dpe/score_net/out_dense_2"),
        *_norm("model.selective.question_score.norm", "dpe/question_score/event_norm"),
        Rule("model.selective.question_score.bilinear.weight", "dpe/question_score/bilinear/kernel", _DENSE),
        *(
            rule
            for name in ("query", "key", "value")
            for rule in _linear(f"model.fusion.{name}", f"cce/fusion/{name}")
        ),
    ),
)

# W_q belongs to the text encoder's tree, but comes with the connector.
QUERY_PROJECTION = Family(
    part="query_projection",
    title="W_q of LLaMA-VID or DynFocus (model.vlm_att_projector)",
    prefix=r"model\.",
    rules=(
        Rule("model.vlm_att_projector.weight", "kernel", _DENSE),
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
    "llama_vid": LLAMA_VID,
    "dynfocus": DYNFOCUS,
    "query_projection": QUERY_PROJECTION,
}
