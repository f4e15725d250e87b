"""What the authors' published code trains, in two stages: `released_7b.py:stage=align`, `:stage=instruct`.

Weights and data as in align_7b.py and instruct_7b.py. The numbers are those of that code: 80 events by
k-means from random frames, 45 % of them kept (J = 36), 16 + 6 + 16 = 38 tokens a cone, the diagonal of the
selection's Jacobian; stage 2 trains the Q-Former as well.
"""

from configs import common


def get_config(arg: str = ""):
    chosen = common.options(arg, "configs/released_7b.py", stage=("instruct", "align"))
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
    if chosen["stage"] == "align":
        return common.align(config)
    return common.instruct(
        config, num_frames=128, trainable=("language/.*", "connector/.*", "text_encoder/.*")
    )
