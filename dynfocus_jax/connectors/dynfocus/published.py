"""Published names of the connector's parameters."""

from dynfocus_jax.connectors.pooled import PROJECTOR_NAMES
from dynfocus_jax.published_names import DENSE, Family, Rule, linear, norm

_CONTEXT = (
    *linear("model.vlm_att_key_projector", "cce/context/key"),
    *linear("model.vlm_att_val_projector", "cce/context/value"),
)

LLAMA_VID = Family(
    part="connector",
    title="LLaMA-VID projectors (model.mm_projector.*, model.vlm_att_*)",
    prefix=r"model\.",
    rules=PROJECTOR_NAMES[:4] + _CONTEXT,
    lacks=(r"dpe/.*", r"cce/(spatial|fusion)/.*"),
)

# The names of the authors' released code, and names in its style for parameters that it lacks.
DYNFOCUS = Family(
    part="connector",
    title="DynFocus connector (model.mm_projector.*, model.selective.*, model.merge.*)",
    prefix=r"model\.",
    rules=(
        *PROJECTOR_NAMES,
        *_CONTEXT,
        *linear("model.merge.score", "cce/spatial/gate"),
        *norm("model.selective.score_network.in_conv.0", "dpe/score_net/in_norm"),
        *linear("model.selective.score_network.in_conv.1", "dpe/score_net/in_dense"),
        *linear("model.selective.score_network.out_conv.0", "dpe/score_net/out_dense_0"),
        *linear("model.selective.score_network.out_conv.2", "dpe/score_net/out_dense_1"),
        *linear("model.selective.score_network.out_conv.4", "dpe/score_net/out_dense_2"),
        *norm("model.selective.question_score.norm", "dpe/question_score/event_norm"),
        Rule("model.selective.question_score.bilinear.weight", "dpe/question_score/bilinear/kernel", DENSE),
        *(
            rule
            for name in ("query", "key", "value")
            for rule in linear(f"model.fusion.{name}", f"cce/fusion/{name}")
        ),
    ),
)
