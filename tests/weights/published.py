"""Published layouts written out by hand: our parameters as the tensors of each family's files.

The permutations are written in numpy, independently of the tables that they test.
"""

import numpy as np

from dynfocus_jax import trees


def random_params(shapes: dict, seed: int = 0) -> dict:
    """Return a tree of random float32 arrays. Key biases of the vision tower are zero, as in EVA."""
    rng = np.random.default_rng(seed)
    flat = {
        path: rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in sorted(trees.flatten(shapes).items())
    }
    for path in flat:
        if path.startswith("vision/") and path.endswith("attention/key/bias"):
            flat[path][:] = 0
    return trees.unflatten(flat)


def _linear(name: str, dense: dict) -> dict:
    """Return the tensors of a Linear, whose weight is [out, in]."""
    out = {f"{name}.weight": dense["kernel"].T}
    return out | ({f"{name}.bias": dense["bias"]} if "bias" in dense else {})


def _norm(name: str, norm: dict) -> dict:
    out = {f"{name}.weight": norm["scale"]}
    return out | ({f"{name}.bias": norm["bias"]} if "bias" in norm else {})


def _to_heads(name: str, dense: dict) -> dict:
    """Kernel [width, H, h] -> weight [H * h, width], head by head."""
    width, heads, size = dense["kernel"].shape
    out = {f"{name}.weight": dense["kernel"].reshape(width, heads * size).T}
    return out | ({f"{name}.bias": dense["bias"].reshape(-1)} if "bias" in dense else {})


def _from_heads(name: str, dense: dict) -> dict:
    """Kernel [H, h, width] -> weight [width, H * h]."""
    heads, size, width = dense["kernel"].shape
    out = {f"{name}.weight": dense["kernel"].reshape(heads * size, width).T}
    return out | ({f"{name}.bias": dense["bias"]} if "bias" in dense else {})


def _patches(name: str, dense: dict) -> dict:
    """Kernel [row * column * channel, width] -> convolution [width, channel, row, column]."""
    inputs, width = dense["kernel"].shape
    side = int((inputs / 3) ** 0.5)
    out = {f"{name}.weight": dense["kernel"].reshape(side, side, 3, width).transpose(3, 2, 0, 1)}
    return out | ({f"{name}.bias": dense["bias"]} if "bias" in dense else {})


def _layer(blocks: dict, index: int) -> dict:
    flat = trees.flatten(blocks)
    return trees.unflatten({path: leaf[index] for path, leaf in flat.items()})


def _depth(blocks: dict) -> int:
    return len(next(iter(trees.flatten(blocks).values())))


# --- Vision -------------------------------------------------------------------------------------------


def _fused(attention: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [3 * H * h, width] and biases [3 * H * h]: query, key and value concatenated."""
    parts = [_to_heads("x", attention[name]) for name in ("query", "key", "value")]
    return tuple(np.concatenate([part[f"x.{kind}"] for part in parts]) for kind in ("weight", "bias"))


def eva_lavis(vision: dict, spare: int = 1, prefix: str = "") -> dict:
    """Return the tensors of `eva_vit_g.pth`, with EVA-CLIP's output norm and `spare` additional blocks."""
    out = {"cls_token": vision["cls"][None, None], "pos_embed": vision["position"][None]}
    out |= _patches("patch_embed.proj", vision["patch_embedding"])
    depth = _depth(vision["blocks"])
    for index in range(depth + spare):
        block, name = _layer(vision["blocks"], min(index, depth - 1)), f"blocks.{index}"
        weight, bias = _fused(block["attention"])
        query, _, value = np.split(bias, 3)
        out |= {f"{name}.attn.qkv.weight": weight, f"{name}.attn.q_bias": query, f"{name}.attn.v_bias": value}
        out |= _norm(f"{name}.norm1", block["attention_norm"]) | _norm(f"{name}.norm2", block["mlp_norm"])
        out |= _from_heads(f"{name}.attn.proj", block["attention"]["out"])
        out |= _linear(f"{name}.mlp.fc1", block["mlp"]["up"]) | _linear(
            f"{name}.mlp.fc2", block["mlp"]["down"]
        )
    width = len(vision["cls"])
    out |= {"norm.weight": np.ones(width, np.float32), "norm.bias": np.zeros(width, np.float32)}
    return {prefix + name: value for name, value in out.items()}


def instruct_blip_vision(vision: dict) -> dict:
    """Return the tensors `vision_model.*` of InstructBLIP, without `post_layernorm`."""
    top = "vision_model.embeddings"
    out = {
        f"{top}.class_embedding": vision["cls"][None, None],
        f"{top}.position_embedding": vision["position"][None],
        **_patches(f"{top}.patch_embedding", vision["patch_embedding"]),
    }
    for index in range(_depth(vision["blocks"])):
        block, name = _layer(vision["blocks"], index), f"vision_model.encoder.layers.{index}"
        weight, bias = _fused(block["attention"])
        out |= {f"{name}.self_attn.qkv.weight": weight, f"{name}.self_attn.qkv.bias": bias}
        out |= _from_heads(f"{name}.self_attn.projection", block["attention"]["out"])
        out |= _norm(f"{name}.layer_norm1", block["attention_norm"])
        out |= _norm(f"{name}.layer_norm2", block["mlp_norm"])
        out |= _linear(f"{name}.mlp.fc1", block["mlp"]["up"]) | _linear(
            f"{name}.mlp.fc2", block["mlp"]["down"]
        )
    return out


def contrastive(vision: dict, later: int = 0) -> dict:
    """Return a whole CLIP or SigLIP checkpoint, with `later` layers after ours and part of the text model."""
    top = "vision_model"
    out = {f"{top}.embeddings.position_embedding.weight": vision["position"]}
    out |= _patches(f"{top}.embeddings.patch_embedding", vision["patch_embedding"])
    depth, width = _depth(vision["blocks"]), vision["position"].shape[1]
    for index in range(depth + later):
        block, name = _layer(vision["blocks"], min(index, depth - 1)), f"{top}.encoder.layers.{index}"
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            out |= _to_heads(f"{name}.self_attn.{theirs}_proj", block["attention"][ours])
        out |= _from_heads(f"{name}.self_attn.out_proj", block["attention"]["out"])
        out |= _norm(f"{name}.layer_norm1", block["attention_norm"])
        out |= _norm(f"{name}.layer_norm2", block["mlp_norm"])
        out |= _linear(f"{name}.mlp.fc1", block["mlp"]["up"]) | _linear(
            f"{name}.mlp.fc2", block["mlp"]["down"]
        )
    last = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
    out |= _norm(f"{top}.post_layernorm", vision.get("final_norm", last))
    if "cls" in vision:
        out |= {f"{top}.embeddings.class_embedding": vision["cls"], "visual_projection.weight": np.eye(3)}
        out |= _norm(f"{top}.pre_layrnorm", vision["pre_norm"])
        out |= {f"{top}.embeddings.position_ids": np.arange(len(vision["position"]))[None]}
    else:
        out |= {f"{top}.head.probe": np.ones((1, 1, 4)), f"{top}.head.mlp.fc1.weight": np.ones((3, 4))}
    text = {
        "text_model.encoder.layers.0.self_attn.q_proj.weight": np.ones((4, 4)),
        "logit_scale": np.ones(()),
    }
    return out | text


# --- Text encoder -------------------------------------------------------------------------------------


def _qformer(text: dict, bert: str, attention: str, norm: str) -> dict:
    embeddings = f"{bert}.embeddings"
    out = {
        f"{embeddings}.word_embeddings.weight": text["word_embedding"]["embedding"],
        f"{embeddings}.position_embeddings.weight": text["position_embedding"]["embedding"],
        f"{embeddings}.position_ids": np.arange(len(text["position_embedding"]["embedding"]))[None],
        **_norm(f"{embeddings}.{norm}", text["embedding_norm"]),
    }
    for index in range(sum(key.startswith("blocks_") for key in text)):
        block, name = text[f"blocks_{index}"], f"{bert}.encoder.layer.{index}"
        for ours, theirs in (("attention", "attention"), ("cross_attention", "crossattention")):
            if ours not in block:
                continue
            for part in ("query", "key", "value"):
                out |= _to_heads(f"{name}.{theirs}.{attention}.{part}", block[ours][part])
            out |= _from_heads(f"{name}.{theirs}.output.dense", block[ours]["out"])
            out |= _norm(f"{name}.{theirs}.output.LayerNorm", block[f"{ours}_norm"])
        for ours, suffix in (("text_mlp", ""), ("query_mlp", "_query")):
            out |= _linear(f"{name}.intermediate{suffix}.dense", block[ours]["up"])
            out |= _linear(f"{name}.output{suffix}.dense", block[ours]["down"])
            out |= _norm(f"{name}.output{suffix}.LayerNorm", block[f"{ours}_norm"])
    return out


def qformer_lavis(text: dict) -> dict:
    """Return the tensors of `instruct_blip_vicuna7b_trimmed.pth`."""
    out = _qformer(text, "Qformer.bert", "self", "LayerNorm") | _norm("ln_vision", text["vision_norm"])
    return out | {
        "query_tokens": text["queries"][None],
        "llm_proj.weight": np.ones((3, 4), np.float32),
        "llm_proj.bias": np.ones(3, np.float32),
    }


def instruct_blip(params: dict) -> dict:
    """Return the combined Hugging Face checkpoint: vision tower, Q-Former and language model."""
    text = params["text_encoder"]
    out = instruct_blip_vision(params["vision"]) | _qformer(text, "qformer", "attention", "layernorm")
    out |= {"query_tokens": text["queries"][None]} | _norm("vision_model.post_layernorm", text["vision_norm"])
    out |= {f"language_model.{name}": value for name, value in decoder(params["language"]).items()}
    return out | {"language_projection.weight": np.ones((3, 4)), "language_projection.bias": np.ones(3)}


# --- Language model and connector ---------------------------------------------------------------------


def decoder(language: dict) -> dict:
    """Return the tensors of a Hugging Face Llama, Qwen2 or Qwen3."""
    out = {"model.embed_tokens.weight": language["embedding"]["embedding"]}
    for index in range(_depth(language["blocks"])):
        block, name = _layer(language["blocks"], index), f"model.layers.{index}"
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            out |= _to_heads(f"{name}.self_attn.{theirs}_proj", block[ours])
            if f"{ours}_norm" in block:
                out |= _norm(f"{name}.self_attn.{theirs}_norm", block[f"{ours}_norm"])
        out |= _from_heads(f"{name}.self_attn.o_proj", block["out"])
        for part in ("gate", "up", "down"):
            out |= _linear(f"{name}.mlp.{part}_proj", block[part])
        out |= _norm(f"{name}.input_layernorm", block["attention_norm"])
        out |= _norm(f"{name}.post_attention_layernorm", block["mlp_norm"])
    out |= _norm("model.norm", language["final_norm"])
    return out | (_linear("lm_head", language["head"]) if "head" in language else {})


def llama_vid_connector(params: dict) -> dict:
    """Return the tensors of LLaMA-VID's first stage (`mm_projector.bin`)."""
    connector = params["connector"]
    out = {}
    for name, dense in (
        ("mm_projector.0", connector["projector"]["up"]),
        ("mm_projector.2", connector["projector"]["down"]),
        ("vlm_att_key_projector", connector["cce"]["context"]["key"]),
        ("vlm_att_val_projector", connector["cce"]["context"]["value"]),
        ("vlm_att_projector", params["text_encoder"]["query_projection"]),
    ):
        out |= _linear(f"model.{name}", dense)
    return out


def llama_vid(params: dict) -> dict:
    """Return a whole LLaMA-VID checkpoint with its vision tower."""
    text = params["text_encoder"]
    out = decoder(params["language"]) | llama_vid_connector(params)
    out |= eva_lavis(params["vision"], spare=0, prefix="model.vision_tower.vision_tower.")
    out |= _qformer(text, "model.vlm_att_encoder.bert", "self", "LayerNorm")
    out |= {"model.vlm_att_query": text["queries"][None]} | _norm("model.vlm_att_ln", text["vision_norm"])
    return out
