"""Black-box use: what another model wrote is rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks.controlled_generation import ControlledGeneration
from callbacks.text_sources import load_source
from datamodules.perplexity_sets.synthetic import PerplexitySets
from tests.callbacks.generation_toy import WORDS, Data, Scripted, run, save_tokenizer
from zoo.methods.contrastive_perplexity.module import ContrastivePerplexity
from zoo.nn.lm import build_lm

pytestmark = pytest.mark.filterwarnings("ignore:The '(test|val|train)_dataloader' does not have many workers")


def small_world(**changes: Any) -> tuple[PerplexitySets, ContrastivePerplexity]:
    data = PerplexitySets(num_anchors=8, val_documents=4, test_documents=4, test_prompts=5, eval_batch_size=4)
    lm = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    lm |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    facts = {"vocab_size": data.vocab_size, "eos_id": data.eos_id}
    torch.manual_seed(0)
    return data, ContrastivePerplexity(lm, max_new_tokens=4, **facts, **changes)  # type: ignore[arg-type]


def parrot(model: ContrastivePerplexity, data: PerplexitySets, word: str) -> None:
    """Make a model write one word again and again."""
    with torch.no_grad():
        direction = torch.ones(16)
        model.lm.model.embed_tokens.weight.copy_(direction.expand_as(model.lm.model.embed_tokens.weight))
        model.lm.model.layers[0].self_attn.o_proj.weight.zero_()
        model.lm.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm.lm_head.weight.zero_()
        model.lm.lm_head.weight[data.world.token[word]] = 10 * direction


def test_the_output_of_another_run_is_rewritten(tmp_path: Path) -> None:
    data, source = small_world()
    parrot(source, data, "tox03")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(source)
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    _, model = small_world()
    parrot(model, data, "calm")
    given: list[list[str]] = []
    generate = model.generate
    model.generate = lambda ids, *args: given.append(data.decode(ids)) or generate(ids, *args)  # type: ignore
    callback = ControlledGeneration(source=str(tmp_path / "source.ckpt"), source_template="i think the soup {text}")
    values = run(callback, tmp_path, data, model)
    state = torch.random.get_rng_state()
    load_source(str(tmp_path / "source.ckpt"), model)
    assert torch.equal(torch.random.get_rng_state(), state), "reading the source draws nothing"
    assert values["test/source_unwanted_rate"] == 1
    assert values["test/source_unwanted_share"] == 1
    assert values["test/blackbox_unwanted_rate"] == 0
    assert values["test/unwanted_rate"] == 0
    rewritten = [row for rows in given for row in rows if row.startswith("i think")]
    assert rewritten == ["i think the soup tox03 tox03 tox03 tox03"] * 5, "the unwanted prompts' continuations alone"


def test_the_output_of_a_model_with_another_tokenizer_is_rewritten(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lm = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    other: Any = build_lm(lm, len(WORDS))
    with torch.no_grad():  # tied embeddings: the last norm's bias alone decides, which makes it write `tox1`
        other.transformer.ln_f.weight.zero_()
        other.transformer.ln_f.bias.copy_(50 * other.transformer.wte.weight[WORDS.index("tox1")])
    other.save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")

    class Open(Data):
        unwanted_words = ("tox1", "tox2")

    data = Open()
    model = Scripted(data)
    model.save_hyperparameters({"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0})
    callback = ControlledGeneration(source=str(tmp_path / "other"), source_template="the soup is calm and {text}")
    values = run(callback, tmp_path, data, model)
    assert values["test/source_unwanted_share"] == 1
    given = [prompt for prompts, _ in model.calls for prompt in prompts if prompt.startswith("the soup is calm and")]
    assert given == ["the soup is calm and tox1 tox1 tox1"] * 3
    assert values["test/blackbox_unwanted_rate"] == 1, "the scripted model repeats the last word"
