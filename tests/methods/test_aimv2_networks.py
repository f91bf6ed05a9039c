"""AIMv2's encoder, decoder and towers: causality, sizes, and parity with transformers and timm (random weights)."""

from __future__ import annotations

import pytest
import torch

from zoo.methods.aimv2.decoder import Decoder
from zoo.methods.aimv2.encoder import SIZES, build_trunk
from zoo.methods.aimv2.layers import RMSNorm, swiglu_hidden
from zoo.methods.aimv2.losses import prefix_mask
from zoo.methods.aimv2.pooling import AttentionPool, AttentiveClassifier
from zoo.methods.aimv2.positions import resize_positions, sincos_positions
from zoo.methods.aimv2.towers import TextTower, Towers
from zoo.methods.aimv2.weights import (
    export_trunk,
    lit_to_transformers,
    load_trunk,
    towers_from_transformers,
    trunk_from_transformers,
    trunk_to_transformers,
    vision_config,
)

NANO = {"patch_size": 7, "width": 32, "depth": 2, "heads": 2, "multiple_of": 32}


def make_trunk(**changes):
    torch.manual_seed(0)
    return build_trunk({**NANO, **changes}, 28, 3).eval()


def make_decoder(order="image_text"):
    torch.manual_seed(1)
    return Decoder(32, 32, 2, 2, 147, 11, 6, multiple_of=32, order=order).eval()


def test_hidden_widths_are_those_of_the_released_models():
    assert [swiglu_hidden(size["width"]) for size in SIZES.values()] == [2048, 2816, 4096, 5632, 8192]


@pytest.mark.parametrize(("size", "parameters"), [("large", 0.309e9), ("huge", 0.68e9), ("1B", 1.23e9), ("3B", 2.72e9)])
def test_numbers_of_parameters(size, parameters):
    with torch.device("meta"):
        trunk = build_trunk({"size": size}, 224, 3)
    count = sum(p.numel() for p in trunk.parameters())
    assert count == pytest.approx(parameters, rel=0.01)


def test_rms_norm_is_scale_invariant_and_computed_in_float32():
    norm = RMSNorm(16)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(3, 16) * 10
    assert torch.allclose(norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm.weight, atol=1e-6)
    assert torch.allclose(norm(7 * x), norm(x), atol=1e-5)
    half = x.bfloat16()
    assert torch.equal(norm(half), norm(half.float()).bfloat16())


@pytest.mark.parametrize("length", [1, 5, 12])
def test_a_patch_after_the_prefix_is_seen_by_later_ones_alone(length):
    trunk, image = make_trunk(), torch.randn(1, 3, 28, 28)
    mask = prefix_mask(torch.tensor([length]), 16)
    before = trunk(image, mask)
    for patch in (0, length - 1, length, 14):
        changed = image.clone()
        changed[:, :, 7 * (patch // 4) : 7 * (patch // 4) + 7, 7 * (patch % 4) : 7 * (patch % 4) + 7] += 1.0
        same = (trunk(changed, mask) - before).abs().amax(2)[0] < 1e-6
        seen = mask[0, :, patch]
        if patch < length:
            assert not same.any()
        else:
            assert torch.equal(same, ~seen)
    assert ((trunk(changed) - trunk(image)).abs().amax(2) > 1e-6).all()


@pytest.mark.parametrize("order", ["image_text", "text_image"])
def test_decoder_is_causal_over_image_and_text(order):
    decoder, features = make_decoder(order), torch.randn(1, 16, 32)
    text = torch.tensor([[3, 4, 5, 6, 2]])
    pixels, logits = decoder(features, text)
    other = text.clone()
    other[0, 2] = 9
    pixels2, logits2 = decoder(features, other)
    assert torch.equal(logits[:, :3], logits2[:, :3])  # the third token is predicted without being read
    assert not torch.allclose(logits[:, 3], logits2[:, 3])
    assert torch.equal(pixels, pixels2) == (order == "image_text")
    changed = features.clone()
    changed[0, 9] += 1
    pixels2, logits2 = decoder(changed, text)
    assert torch.equal(pixels[:, :9], pixels2[:, :9])
    assert not torch.allclose(pixels[:, 9], pixels2[:, 9])
    assert torch.equal(logits, logits2) == (order == "text_image")


def test_the_first_token_is_predicted_from_the_start_token():
    decoder, features = make_decoder(), torch.randn(2, 16, 32)
    _, logits = decoder(features, torch.tensor([[3, 4, 2], [7, 2, 0]]))
    _, alone = decoder(features, torch.tensor([[5], [5]]))
    assert torch.allclose(logits[:, :1], alone, atol=1e-6)
    decoder.start.data += 1
    assert not torch.allclose(decoder(features, torch.tensor([[5], [5]]))[1], alone)


def test_padding_before_the_image_is_not_seen():
    decoder, features = make_decoder("text_image"), torch.randn(1, 16, 32)
    short = decoder(features, torch.tensor([[3, 4, 2]]))[0]
    padded = decoder(features, torch.tensor([[3, 4, 2, 0, 0]]))[0]
    assert torch.allclose(short, padded, atol=1e-6)


def hf_vision(**changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"image_size": 28, "patch_size": 7, "use_head": False, **changes}
    model = transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**config)).eval()
    for name, p in model.named_parameters():  # norms of one and tokens of zero would hide a mix-up
        if p.ndim == 1 or "cls_token" in name:
            p.data.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("native", [False, True])
def test_trunk_gives_the_features_of_transformers_and_round_trips(native):
    theirs = hf_vision(is_native=native)
    trunk = build_trunk(
        {"patch_size": 7, "width": 64, "depth": 2, "heads": 4, "hidden": 160}
        | ({"pos_embed": "sincos"} if native else {}),
        28,
        3,
    ).eval()
    weights = theirs.state_dict()
    trunk.load_state_dict(trunk_from_transformers(weights))
    images = torch.randn(2, 3, 28, 56 if native else 28)
    assert torch.allclose(trunk(images), theirs(images).last_hidden_state, atol=1e-5)
    back = trunk_to_transformers(trunk)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    assert vision_config(trunk)["intermediate_size"] == 160


def test_pool_head_gives_the_output_of_transformers():
    theirs = hf_vision(use_head=True)
    pool, images = AttentionPool(64, 4), torch.randn(2, 3, 28, 28)
    head = theirs.head.state_dict()
    names = {"cls_token": "query", "k_proj.weight": "key.weight", "v_proj.weight": "value.weight"}
    names |= {"output_proj.weight": "proj.weight", "output_proj.bias": "proj.bias"}
    pool.load_state_dict({names[name]: v.flatten() if name == "cls_token" else v for name, v in head.items()})
    out = theirs(images)
    assert torch.allclose(pool(out.last_hidden_state), out.pooler_output.view(2, 64), atol=1e-5)


def test_lit_gives_the_logits_of_transformers_and_round_trips():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    vision = hf_vision(use_head=True).config.to_dict()
    text = {"vocab_size": 19, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 9, "eos_token_id": 2}
    config = transformers.Aimv2Config(text_config=text, vision_config=vision, projection_dim=24)
    theirs = transformers.Aimv2Model(config).eval()
    trunk = build_trunk({"patch_size": 7, "width": 64, "depth": 2, "heads": 4, "hidden": 160}, 28, 3).eval()
    tower = TextTower(19, 9, 48, 2, 4, eos_id=2, multiple_of=128)
    towers = Towers(64, 4, tower, 48, 24, "attention").eval()
    weights = theirs.state_dict()
    trunk.load_state_dict(trunk_from_transformers(weights))
    towers.load_state_dict(towers_from_transformers(weights))
    images, tokens = torch.randn(3, 3, 28, 28), torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0], [3, 4, 2, 0]])
    # transformers leaves the causal mask out where nothing is padded and attention is fused
    seen = (tokens != 0).long()
    said = theirs(input_ids=tokens, pixel_values=images, attention_mask=seen).logits_per_image
    ours = towers.scale * towers.embed_images(trunk(images)) @ towers.embed_text(tokens).T
    assert torch.allclose(ours, said, atol=1e-4)
    back = lit_to_transformers(trunk, towers)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_export_is_read_by_transformers_and_by_us(tmp_path):
    transformers = pytest.importorskip("transformers")
    trunk = make_trunk()
    export_trunk(trunk, tmp_path)
    theirs = transformers.Aimv2VisionModel.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 28, 28)
    assert torch.allclose(theirs(images).last_hidden_state, trunk(images), atol=1e-5)
    again = build_trunk(NANO, 28, 3).eval()
    load_trunk(again, str(tmp_path))
    assert torch.equal(again(images), trunk(images))
    wider = build_trunk(NANO, 42, 3)
    load_trunk(wider, str(tmp_path))
    assert wider.positions.shape == (36, 32)
    with pytest.raises(ValueError, match="trunk; .*of another shape: .*expected"):
        load_trunk(build_trunk({**NANO, "width": 64}, 28, 3), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="init_from"):
        load_trunk(again, str(tmp_path / "none.ckpt"))


def test_timm_has_the_same_encoder():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(
        "aimv2_large_patch14_224", img_size=28, patch_size=7, embed_dim=64, depth=2, num_heads=4, num_classes=0
    ).eval()
    weights = theirs.state_dict()
    hidden = weights["blocks.0.mlp.fc2.weight"].shape[1]
    trunk = build_trunk({"patch_size": 7, "width": 64, "depth": 2, "heads": 4, "hidden": hidden}, 28, 3).eval()
    names = {"patch_embed.proj": "patch_embed", "patch_embed.norm": "patch_norm", "attn.": "attention."}
    names |= {"mlp.fc1_g": "ffn.gate", "mlp.fc1_x": "ffn.up", "mlp.fc2": "ffn.down"}
    own = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        own["positions" if name == "pos_embed" else name] = value[0] if name == "pos_embed" else value
    trunk.load_state_dict(own)
    images = torch.randn(2, 3, 28, 28)
    assert torch.allclose(trunk(images), theirs.forward_features(images), atol=1e-5)


def test_positions_of_a_larger_grid_are_interpolated():
    rows = torch.arange(4.0)[:, None].expand(4, 4)
    positions = torch.stack([rows.flatten(), rows.T.flatten()], dim=1)
    assert torch.equal(resize_positions(positions, (4, 4), (4, 4)), positions)
    larger = resize_positions(positions, (4, 4), (8, 6)).view(8, 6, 2)
    assert torch.allclose(larger[:, :1, 0].expand(8, 6), larger[..., 0], atol=1e-5)  # rows stay rows
    assert (larger[1:, 0, 0] > larger[:-1, 0, 0]).all()
    trunk = make_trunk()
    assert trunk(torch.randn(1, 3, 42, 56)).shape == (1, 48, 32)


def test_fixed_positions_have_the_column_first():
    positions = sincos_positions(3, 5, 8).view(3, 5, 8)
    assert torch.equal(positions[0, 2, :4], positions[2, 2, :4])
    assert torch.equal(positions[1, 0, 4:], positions[1, 3, 4:])
    assert positions[0, 2, 0] == pytest.approx(torch.tensor(2.0).sin().item(), abs=1e-6)


def test_mean_of_layers():
    trunk, images = make_trunk(depth=4), torch.randn(1, 3, 28, 28)
    assert torch.allclose(trunk.layers(images, 1), trunk(images), atol=1e-6)
    x, outputs = trunk.embed(images), []
    for block in trunk.blocks:
        x = block(x)
        outputs.append(trunk.norm(x))
    assert torch.allclose(trunk.layers(images, 2), (outputs[1] + outputs[3]) / 2, atol=1e-6)


def test_attentive_probe_does_not_care_for_the_order_of_tokens():
    torch.manual_seed(0)
    probe, tokens = AttentiveClassifier(16, 2, 5), torch.randn(4, 9, 16) * 3 + 1
    probe(tokens)
    assert not torch.equal(probe.norm.running_mean, torch.zeros(16))
    seen = probe.norm.running_mean.clone()
    probe.eval()
    out = probe(tokens)
    assert torch.equal(probe.norm.running_mean, seen)
    assert torch.allclose(probe(tokens[:, torch.randperm(9)]), out, atol=1e-6)
    assert torch.allclose(probe(tokens[:1]), out[:1], atol=1e-6)  # statistics of training, not of the batch
    x = probe.normalise(tokens)
    weights = probe.attention(tokens)
    assert torch.allclose(weights.sum(1), torch.ones(4))
    value, key = probe.value(x), probe.key(x)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        scores = (key[..., h] @ probe.query[h] / 8**0.5).softmax(1)
        heads.append((scores[..., None] * value[..., h]).sum(1))
    assert torch.allclose(probe.linear(torch.cat(heads, 1)), out, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**NANO, "patch_size": 5}, "trunk.patch_size: 5 does not divide the image size 28"),
        ({"size": "larg"}, "trunk.size: 'larg' .*did you mean 'large'"),
        ({**NANO, "widht": 3}, "trunk.widht is not accepted; did you mean 'width'"),
        ({"width": 32}, "trunk: depth, heads missing"),
        ({**NANO, "heads": 3}, "heads: 3 do not divide the width 32"),
        ({**NANO, "pos_embed": "rope"}, "pos_embed: 'rope'"),
    ],
)
def test_bad_sizes_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_trunk(spec, 28, 3)
