"""The model as the authors' code trains it, in two stages: `released_7b.py:stage=align`, `:stage=instruct`.

Weights, data and commands are those of align_7b.py and instruct_7b.py. The settings are those of that code:
80 events by k-means from random frames, 45 % of them kept (J = 36), 16 + 6 + 16 = 38 tokens per cone, and the
diagonal of the selection's Jacobian. Stage 2 also trains the Q-Former.
"""

from ml_collections.config_dict import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration; options in `arg`: stage=instruct (default) or stage=align."""
    options = common.parse_options(arg, "configs/released_7b.py", stage=("instruct", "align"))
    config = common.eva_vicuna_7b()
    model = config.model
    model.connector.mode = "released"
    model.connector.dpe.update(
        {
            "num_prototypes": 80,
            "ratio": 0.45,
            "clustering": "kmeans",
            "kmeans_init": "random",
            "jacobian": "diagonal",
        }
    )
    model.text_encoder.remat = "full"
    model.connector.cce.levels = ((16, 8), (6, 3))
    config.evaluation.media_frames = 128
    if options["stage"] == "align":
        return common.align(config)
    return common.instruct(
        config, num_frames=128, trainable=("language/.*", "connector/.*", "text_encoder/.*")
    )
