"""Our backbones compared with Hugging Face's in PyTorch, small and with the same random weights.

Outputs, hidden states after every block, and gradients of the input and of all weights are compared. Weights
and gradients are converted from their published names by the tables of `dynfocus_jax.weights`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dynfocus_jax.connectors.dynfocus.cooperative import TextContext
from dynfocus_jax.models.llama import Llama, rope_frequencies
from dynfocus_jax.models.qformer import QFormer
from dynfocus_jax.models.vit import VisionTransformer
from tests.parity.comparison import (
    assert_close,
    assert_gradients_close,
    cut,
    perturb,
    published,
    read,
    shapes_of,
    value_and_gradients,
)

DEPTH = 5
# The norms' epsilons are large, so that a wrong one exceeds the tolerance.
VISION = {
    "image_size": 15,
    "patch_size": 5,
    "width": 30,
    "depth": DEPTH,
    "heads": 5,
    "mlp_dim": 44,
    "eps": 0.02,
}
PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
TEXT = {
    "vocab_size": 53,
    "max_text": 13,
    "num_queries": 3,
    "width": 42,
    "depth": DEPTH,
    "heads": 7,
    "mlp_dim": 50,
    "cross_every": 2,
    "output_width": VISION["width"],
    "eps": 0.01,
    "vision_eps": 0.05,
}
LANGUAGE = {
    "vocab_size": 47,
    "width": 36,
    "depth": DEPTH,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 6,
    "mlp_dim": 52,
    "rope_theta": 500.0,
    "eps": 0.02,
}
LENGTHS = np.array([11, 4, 1])  # texts of one batch


# --- Vision -------------------------------------------------------------------------------------------

VISION_CASES = {
    "eva": ("InstructBlipVision", {}, {}),
    "clip": ("CLIPVision", {}, {"pre_norm": True, "patch_bias": False, "activation": "quick_gelu"}),
    "siglip": (
        "SiglipVision",
        {"vision_use_head": False},
        {"cls_token": False, "final_norm": True, "activation": "gelu_tanh"},
    ),
}
VISION_CASES["clip_before_last"] = (
    "CLIPVision",
    {},
    VISION_CASES["clip"][2] | {"select_layer": -2},
)


def torch_vision(kind: str = "InstructBlipVision", seed: int = 0, **options) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=VISION["width"],
        intermediate_size=VISION["mlp_dim"],
        num_hidden_layers=DEPTH,
        num_attention_heads=VISION["heads"],
        image_size=VISION["image_size"],
        patch_size=VISION["patch_size"],
        layer_norm_eps=VISION["eps"],
        attn_implementation="eager",
        **options,
    )
    return perturb(getattr(transformers, f"{kind}Model")(config), seed)


def pixels(frames: torch.Tensor) -> torch.Tensor:
    """Normalise frames `[..., H, W, 3]` in [0, 255] to `[F, 3, H, W]`."""
    normalised = (frames / 255 - torch.tensor(PIXELS["mean"])) / torch.tensor(PIXELS["std"])
    return normalised.flatten(0, -4).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", VISION_CASES)
def test_vision(case):
    kind, options, fields = VISION_CASES[case]
    reference = torch_vision(kind, **options)
    rng = np.random.default_rng(0)
    frames = torch.tensor(rng.integers(0, 256, (2, 1, 15, 15, 3)), dtype=torch.float32, requires_grad=True)
    output = reference(pixel_values=pixels(frames), output_hidden_states=True)
    select = fields.get("select_layer", -1)
    expected = output.last_hidden_state if "final_norm" in fields else output.hidden_states[select]
    cotangent = rng.standard_normal(expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()

    tower = VisionTransformer(**VISION, **PIXELS, **fields)
    inputs = frames.detach().numpy()
    target = shapes_of(tower, inputs)
    params = read(published(reference, prefix="vision_model."), target, depth=DEPTH)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, target)

    @jax.jit
    def after_blocks(params, frames):
        return [
            tower.clone(select_layer=count - DEPTH - 1, final_norm=False).apply(
                {"params": cut(params, count)}, frames, keep_cls=True
            )
            for count in range(1, DEPTH + 2 + select)
        ]

    for index, hidden in enumerate(jax.device_get(after_blocks(params, inputs)), 1):
        assert_close(hidden[:, 0], output.hidden_states[index], f"block {index}")

    value, of_params, of_frames = value_and_gradients(
        lambda params, frames: tower.apply({"params": params}, frames, keep_cls=True),
        cotangent[:, None],
        params,
        inputs,
    )
    assert_close(value[:, 0], expected, "output")
    assert_close(of_frames, frames.grad, "gradient of the pixels", tolerance=5e-5)
    gradients = read(published(reference, gradients=True, prefix="vision_model."), target, depth=DEPTH)
    assert_gradients_close(of_params, gradients)


# --- Text encoder -------------------------------------------------------------------------------------


class InstructBlip(torch.nn.Module):
    """The parts of InstructBLIP that LLaMA-VID uses, under their published names."""

    def __init__(self):
        super().__init__()
        self.vision_model = torch_vision()
        self.vision_model.post_layernorm.eps = TEXT["vision_eps"]
        self.query_tokens = torch.nn.Parameter(torch.zeros(1, TEXT["num_queries"], TEXT["width"]))
        config = transformers.InstructBlipQFormerConfig(
            vocab_size=TEXT["vocab_size"],
            hidden_size=TEXT["width"],
            num_hidden_layers=DEPTH,
            num_attention_heads=TEXT["heads"],
            intermediate_size=TEXT["mlp_dim"],
            max_position_embeddings=TEXT["max_text"],
            layer_norm_eps=TEXT["eps"],
            cross_attention_frequency=TEXT["cross_every"],
            encoder_hidden_size=VISION["width"],
            attn_implementation="eager",
        )
        self.qformer = transformers.InstructBlipQFormerModel(config)
        perturb(self)

    def queries(self, tokens: torch.Tensor, lengths: torch.Tensor, features: torch.Tensor) -> list:
        """Return the queries `[F, Q, width]` after every layer; `tokens [F, L]` hold a question per frame."""
        count = TEXT["num_queries"]
        valid = torch.arange(count + tokens.shape[1]) < (count + lengths)[:, None]
        output = self.qformer(
            input_ids=tokens,
            attention_mask=valid.long(),
            query_embeds=self.query_tokens.expand(len(tokens), -1, -1),
            encoder_hidden_states=self.vision_model.post_layernorm(features),
            output_hidden_states=True,
        )
        return [hidden[:, :count] for hidden in output.hidden_states[1:]]


class LlamaVid(torch.nn.Module):
    """LLaMA-VID's context attention, under the names of its checkpoints."""

    def __init__(self, width: int):
        super().__init__()
        channels = VISION["width"]
        self.model = torch.nn.ModuleDict(
            {
                "vlm_att_projector": torch.nn.Linear(TEXT["width"], channels),
                "vlm_att_key_projector": torch.nn.Linear(channels, channels),
                "vlm_att_val_projector": torch.nn.Linear(channels, width),
            }
        )
        perturb(self, seed=1)

    def context(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return context tokens `[F, D]` of the Q-Former's queries `[F, Q, *]` and patches `[F, N, C]`."""
        keys = self.model["vlm_att_key_projector"](patches)
        logits = self.model["vlm_att_projector"](queries) @ keys.mT / patches.shape[-1] ** 0.5
        return self.model["vlm_att_val_projector"]((logits.softmax(-1) @ patches).mean(1))


def read_text_encoder(blip: dict, vid: dict, target: dict) -> dict:
    """Read the Q-Former from InstructBLIP's weights and W_q from those of LLaMA-VID's connector."""
    projection = read(vid, target["query_projection"], family="query_projection")
    return read(blip, target) | {"query_projection": projection}


def questions() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(2).integers(1, TEXT["vocab_size"], (2, 6)), np.array([6, 2])


def per_frame(array: np.ndarray, frames: int) -> torch.Tensor:
    return torch.tensor(array).repeat_interleave(frames, 0)


NO_TEXT_AFTER_THE_LAST = f"(text/)?blocks_{DEPTH - 1}/text_mlp.*"


def test_qformer():
    """Two videos of three frames, with questions of six and two words."""
    blip, vid = InstructBlip(), LlamaVid(8)
    project = vid.model["vlm_att_projector"]
    tokens, lengths = questions()
    rng = np.random.default_rng(3)
    features = torch.tensor(
        rng.standard_normal((2, 3, 7, 30)) * 2 + 1, dtype=torch.float32, requires_grad=True
    )
    layers = blip.queries(per_frame(tokens, 3), per_frame(lengths, 3), features.flatten(0, 1))
    layers = [project(queries).unflatten(0, (2, 3)) for queries in layers]
    cotangent = rng.standard_normal(layers[-1].shape).astype(np.float32)
    (layers[-1] * torch.tensor(cotangent)).sum().backward()

    model = QFormer(**TEXT)
    inputs = features.detach().numpy()
    target = shapes_of(model, tokens, lengths, inputs)
    params = read_text_encoder(published(blip), published(vid), target)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, target)

    def run(params, features, depth=DEPTH):
        return model.clone(depth=depth).apply({"params": params}, tokens, lengths, features)

    after_layers = jax.jit(lambda *arguments: [run(*arguments, depth) for depth in range(1, DEPTH)])
    for index, queries in enumerate(jax.device_get(after_layers(params, inputs)), 1):
        assert_close(queries, layers[index - 1], f"layer {index}")
    value, of_params, of_features = value_and_gradients(run, cotangent, params, inputs)
    assert_close(value, layers[-1], "output")
    assert_close(of_features, features.grad, "gradient of the features", tolerance=5e-5)
    gradients = read_text_encoder(published(blip, gradients=True), published(vid, gradients=True), target)
    assert_gradients_close(of_params, gradients, unused=NO_TEXT_AFTER_THE_LAST)


def test_text_guided_context():
    """LLaMA-VID from pixels and question to the context token of every frame."""
    blip, vid = InstructBlip(), LlamaVid(width=26)
    tokens, lengths = questions()
    rng = np.random.default_rng(4)
    frames = torch.tensor(rng.integers(0, 256, (2, 2, 15, 15, 3)), dtype=torch.float32, requires_grad=True)
    features = blip.vision_model(pixel_values=pixels(frames), output_hidden_states=True).hidden_states[-1]
    queries = blip.queries(per_frame(tokens, 2), per_frame(lengths, 2), features)[-1]
    expected = vid.context(queries, features[:, 1:]).unflatten(0, (2, 2))
    cotangent = rng.standard_normal(expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()

    vision, text, context = VisionTransformer(**VISION, **PIXELS), QFormer(**TEXT), TextContext(width=26)

    def run(params, frames):
        features = vision.apply({"params": params["vision"]}, frames, keep_cls=True)
        queries = text.apply({"params": params["text"]}, tokens, lengths, features)
        return context.apply({"params": params["context"]}, features[:, :, 1:], queries)

    inputs = frames.detach().numpy()
    seen = jnp.zeros((2, 2, 10, VISION["width"]))
    asked = jnp.zeros((2, 2, TEXT["num_queries"], VISION["width"]))
    targets = {
        "vision": shapes_of(vision, inputs),
        "text": shapes_of(text, tokens, lengths, seen),
        "context": shapes_of(context, seen, asked),
    }

    def ours(gradients: bool) -> dict:
        blip_file, vid_file = published(blip, gradients), published(vid, gradients)
        connector = read(vid_file, {"cce": {"context": targets["context"]}})
        return {
            "vision": read(blip_file, targets["vision"]),
            "text": read_text_encoder(blip_file, vid_file, targets["text"]),
            "context": connector["cce"]["context"],
        }

    value, of_params, of_frames = value_and_gradients(run, cotangent, ours(gradients=False), inputs)
    assert_close(value, expected, "context tokens")
    assert_close(of_frames, frames.grad, "gradient of the pixels", tolerance=5e-5)
    assert_gradients_close(of_params, ours(gradients=True), unused=NO_TEXT_AFTER_THE_LAST)


# --- Language -----------------------------------------------------------------------------------------

LINEAR = {"rope_scaling": "linear", "rope_factor": 3.0}
# The frequencies of the three channel pairs of a head: kept, interpolated, divided.
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 7.0,
    "rope_low_freq": 1.0,
    "rope_high_freq": 4.0,
    "rope_original_length": 100,
}
LANGUAGE_CASES = {
    "llama": ("Llama", {"kv_heads": 6}),
    "llama_linear": ("Llama", LINEAR),
    "llama3": ("Llama", LLAMA3),
    "smollm2": ("Llama", {"tied_embeddings": True, "heads": 9, "head_dim": 4}),
    "qwen2": ("Qwen2", {"qkv_bias": True}),
    "qwen3": ("Qwen3", {"qk_norm": True, "head_dim": 10}),
}


def rope_parameters(fields: dict) -> dict:
    """Return the RoPE settings in the form of Hugging Face's config.json."""
    names = {
        "rope_theta": "rope_theta",
        "rope_factor": "factor",
        "rope_low_freq": "low_freq_factor",
        "rope_high_freq": "high_freq_factor",
        "rope_original_length": "original_max_position_embeddings",
    }
    kind = {"rope_type": fields.get("rope_scaling", "default")}
    return kind | {theirs: fields[ours] for ours, theirs in names.items() if ours in fields}


def torch_language(kind: str, fields: dict) -> torch.nn.Module:
    options = {} if kind == "Qwen2" else {"head_dim": fields["head_dim"]}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["width"],
        intermediate_size=fields["mlp_dim"],
        num_hidden_layers=fields["depth"],
        num_attention_heads=fields["heads"],
        num_key_value_heads=fields["kv_heads"],
        rms_norm_eps=fields["eps"],
        tie_word_embeddings=fields.get("tied_embeddings", False),
        rope_parameters=rope_parameters(fields),
        max_position_embeddings=512,
        attn_implementation="eager",
        **options,
    )
    return perturb(getattr(transformers, f"{kind}ForCausalLM")(config))


def run_text(module: Llama, tokens, lengths, shift=0.0, cache=None):
    """Return logits, hidden states and cache; `shift` is added to the embeddings."""
    embeddings = module.embed(tokens) + shift
    if cache is None:
        hidden = module(embeddings, lengths)
    else:
        hidden, cache = module.extend(embeddings, lengths, cache)
    return module.logits(hidden), hidden, cache


@functools.cache
def language(case: str):
    """Return the PyTorch model, ours, our parameters and their shapes, tokens `[B, L]` and their mask."""
    kind, changes = LANGUAGE_CASES[case]
    reference, model = torch_language(kind, LANGUAGE | changes), Llama(**(LANGUAGE | changes))
    tokens = np.random.default_rng(5).integers(0, LANGUAGE["vocab_size"], (len(LENGTHS), LENGTHS.max()))
    valid = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    target = shapes_of(model, tokens, LENGTHS, method=run_text)
    params = read(published(reference), target)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, target)
    return reference, model, params, target, tokens, valid


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_language(case):
    """Logits, hidden states, gradients of embeddings and weights for three texts of different lengths."""
    reference, model, params, target, tokens, valid = language(case)
    reference.zero_grad()
    embeddings = reference.get_input_embeddings()(torch.tensor(tokens))
    embeddings.retain_grad()
    output = reference(
        inputs_embeds=embeddings,
        attention_mask=torch.tensor(valid).long(),
        output_hidden_states=True,
        use_cache=False,
    )
    cotangent = np.random.default_rng(6).standard_normal(output.logits.shape) * valid[..., None]
    (output.logits * torch.tensor(cotangent, dtype=torch.float32)).sum().backward()

    def hidden(params, depth):
        variables = {"params": cut(params, depth)}
        return model.clone(depth=depth).apply(variables, tokens, LENGTHS, method=run_text)[1]

    after_blocks = jax.jit(lambda params: [hidden(params, depth) for depth in range(1, DEPTH + 1)])
    normed = [reference.model.norm(each) for each in output.hidden_states[1:-1]]
    for index, ours in enumerate(jax.device_get(after_blocks(params)), 1):
        expected = [*normed, output.hidden_states[-1]][index - 1]
        assert_close(ours[valid], expected[torch.tensor(valid)], f"block {index}")

    def logits(params, shift):
        return model.apply({"params": params}, tokens, LENGTHS, shift, method=run_text)[0]

    shift = np.zeros(embeddings.shape, np.float32)
    value, of_params, of_shift = value_and_gradients(logits, cotangent, params, shift)
    assert_close(value[valid], output.logits[torch.tensor(valid)], "logits")
    assert_close(of_shift, embeddings.grad, "gradient of the embeddings", tolerance=5e-5)
    assert_gradients_close(of_params, read(published(reference, gradients=True), target))


@pytest.mark.parametrize("case", ["llama3", "qwen3"])
def test_cache_in_chunks(case):
    """Texts are read in chunks with a KV cache; the logits equal PyTorch's for whole texts."""
    reference, model, params, _, tokens, valid = language(case)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), attention_mask=torch.tensor(valid).long()).logits

    @jax.jit
    def step(tokens, lengths, cache):
        return model.apply({"params": params}, tokens, lengths, cache=cache, method=run_text)

    cache, start = model.empty_cache(len(LENGTHS), LENGTHS.max()), 0
    for size in (4, 1, 4, 2):
        chunk = slice(start, start + size)
        counts = np.clip(LENGTHS - start, 0, size)
        logits, _, cache = step(tokens[:, chunk], counts, cache)
        inside = valid[:, chunk]
        assert_close(np.asarray(logits)[inside], expected[:, chunk][torch.tensor(inside)], f"from {start} on")
        start += size
    assert cache.lengths.tolist() == LENGTHS.tolist()


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3"])
@pytest.mark.parametrize("head_dim", [128, 80, 18])
def test_rope_frequencies(head_dim, scaling):
    """Settings of Llama 3.1; equal up to the last place of the power."""
    fields = LLAMA3 | {"rope_theta": 5e5, "rope_scaling": scaling, "rope_factor": 8.0}
    fields["rope_original_length"] = 8192
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters=rope_parameters(fields),
    )
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = rope_frequencies(head_dim, 5e5, scaling.replace("default", "none"), 8.0, 1.0, 4.0, 8192)
    assert ours.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=3e-7)
