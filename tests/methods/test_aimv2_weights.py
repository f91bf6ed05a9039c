"""Weights of AIMv2: stages on one another's, LiT and zero-shot classification, transformers' form and back."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.methods.aimv2_toy import EOS, PAD, VOCAB, begin, gradient_of, make_batch, make_model, save, step
from zoo.methods.aimv2.export import export, export_lit
from zoo.methods.aimv2.module import AIMv2
from zoo.methods.aimv2.towers import Towers

# ---------------------------------------------------------------- stages on one another's weights


def test_high_resolution_goes_on_from_a_checkpoint(tmp_path: Path):
    small = make_model()
    source = save(small, tmp_path / "small.ckpt")
    large = begin(make_model(image_size=18, init_from=source, init_parts="network"))
    assert large.trunk.positions.shape == (36, 16)
    for name, value in small.state_dict().items():
        if name != "trunk.positions":
            assert torch.equal(large.state_dict()[name], value), name
    corner = large.trunk.positions.view(6, 6, 16)[0, 0] - small.trunk.positions[0]
    assert corner.abs().max() < small.trunk.positions[0].abs().max()
    assert torch.isfinite(step(large, make_batch(size=18))["total"])
    trunk_alone = begin(make_model(image_size=18, init_from=source))
    assert torch.equal(trunk_alone.trunk.positions, large.trunk.positions)
    assert torch.equal(trunk_alone.decoder.start, make_model(image_size=18).decoder.start)


def test_the_trunk_resizes_its_positions_for_other_images():
    model = make_model().eval()
    assert model(torch.randn(2, 1, 18, 15)).shape == (2, 30, 16)
    step(model, make_batch(size=18))["total"].backward()
    assert gradient_of(model, "trunk.positions") > 0


def test_weights_of_another_size_are_refused(tmp_path: Path):
    source = save(make_model(), tmp_path / "a.ckpt")
    wide = {"patch_size": 3, "width": 32, "depth": 2, "heads": 2, "multiple_of": 16}
    with pytest.raises(ValueError, match=r"weights do not fit the trunk; .*of another shape: .* is \[.*expected"):
        begin(make_model(trunk=wide, init_from=source))
    deep = {"patch_size": 3, "width": 16, "depth": 3, "heads": 2, "multiple_of": 16}
    with pytest.raises(ValueError, match=r"weights do not fit the trunk; .* missing: blocks.2"):
        begin(make_model(trunk=deep, init_from=source))
    with pytest.raises(ValueError, match="weights do not fit the decoder"):
        begin(make_model(vocab_size=VOCAB + 1, init_from=source, init_parts="network"))
    with pytest.raises(FileNotFoundError, match="init_from: no file of weights at"):
        begin(make_model(init_from=str(tmp_path / "none.ckpt")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"init_from: no \*.safetensors in"):
        begin(make_model(init_from=str(tmp_path / "empty")))


def test_a_resumed_run_does_not_read_its_first_weights_again():
    model = make_model(init_from="none.ckpt")
    model._trainer = SimpleNamespace(ckpt_path="here.ckpt")  # type: ignore[assignment]
    model.setup("fit")


# ---------------------------------------------------------------- LiT, zero-shot, export


def trained(model: AIMv2, batch: dict[str, Tensor], steps: int = 40) -> AIMv2:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        step(model, batch)["total"].backward()
        optimizer.step()
    return model.eval()


def test_lit_learns_to_classify_by_captions_on_a_frozen_trunk():
    """Three kinds of images, each with its caption; captions of the classes tell them apart."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(3, 1, 12, 12, generator=generator)
    prompts = [[4 + c, 9, EOS] for c in range(3)]
    images = kinds + 0.1 * torch.randn(3, 1, 12, 12, generator=generator)
    model = make_model(objective="lit", class_prompts=prompts)
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    trained(model, {"image": images, "text": torch.tensor(prompts)})
    assert all(torch.equal(before[name], value) for name, value in model.trunk.state_dict().items())
    test = kinds.repeat(4, 1, 1, 1) + 0.1 * torch.randn(12, 1, 12, 12, generator=generator)
    cosines = model.classify(test)
    assert cosines.abs().max() <= 1 + 1e-5
    assert torch.equal(cosines.argmax(1), torch.arange(12) % 3)
    assert isinstance(model.towers, Towers)
    assert 1 <= float(model.towers.scale.detach()) <= 100


def test_zero_shot_accuracy_counts_labelled_images_alone():
    prompts = [[4, EOS], [5, EOS], [6, EOS]]
    model, batch = make_model(objective="clip", class_prompts=prompts).eval(), make_batch(9)
    said = model.classify(batch["image"]).argmax(1)
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    model.test_step({**batch, "target": torch.where(torch.arange(9) < 6, said, -1)}, 0)
    assert float(model.accuracy.compute()) == 1
    assert int(model.accuracy.tp) == 6
    model.test_step({**batch, "target": torch.full((9,), -1)}, 1)  # none of them is labelled
    assert int(model.accuracy.tp) == 6
    model.test_step({**batch, "target": (said + 1) % 3}, 2)
    assert float(model.accuracy.compute()) == pytest.approx(6 / 15)


def test_lit_goes_to_transformers_and_back(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = make_model(objective="lit", in_channels=3).eval()
    assert model.towers is not None
    export_lit(model.trunk, model.towers, tmp_path / "lit")
    theirs = transformers.Aimv2Model.from_pretrained(tmp_path / "lit").eval()
    images, text = torch.randn(3, 3, 12, 12), torch.tensor([[5, 6, 7, 1], [8, 1, 0, 0], [3, 4, 1, 0]])
    said = theirs(input_ids=text, pixel_values=images, attention_mask=(text != PAD).long()).logits_per_image
    ours = model.towers.scale * model.embed_images(images) @ model.towers.embed_text(text).T
    torch.testing.assert_close(ours, said, atol=1e-4, rtol=1e-4)
    again = make_model(objective="lit", in_channels=3, init_from=str(tmp_path / "lit"), init_parts="network")
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    begin(again)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    trunk_alone = begin(make_model(in_channels=3, init_from=str(tmp_path / "lit")))
    torch.testing.assert_close(trunk_alone(images), model(images))


def test_a_checkpoint_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    transformers = pytest.importorskip("transformers")
    from zoo.methods.aimv2.export import main

    for objective, name in (("aimv2", "Aimv2VisionModel"), ("lit", "Aimv2Model")):
        model = make_model(objective=objective)
        content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        torch.save({**content, "pytorch-lightning_version": "2.6.6"}, tmp_path / f"{objective}.ckpt")
        main([str(tmp_path / f"{objective}.ckpt"), str(tmp_path / objective)])
        assert re.search(rf"transformers\.{name}\.from_pretrained", capsys.readouterr().out)
        theirs = getattr(transformers, name).from_pretrained(tmp_path / objective).eval()
        vision = theirs if objective == "aimv2" else theirs.vision_model
        images = torch.randn(2, 1, 12, 12)
        torch.testing.assert_close(vision(images).last_hidden_state, model(images), atol=1e-5, rtol=1e-4)
    clip = make_model(objective="clip")
    with pytest.raises(ValueError, match="objective: 'clip' pools by a mean"):
        export_lit(clip.trunk, clip.towers, tmp_path / "clip")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        export(tmp_path / "none.ckpt", tmp_path / "x")
