"""An edit of hnet_trainable.py takes effect in training and generation, or is announced before step 1."""

import pytest
import torch
import torch.nn.functional as F
from small_models import TWO_STAGES

import hnet_trainable
from hnet_runtime import agreement
from hnet_trainable import HNetConfig

CONFIG = HNetConfig.load(TWO_STAGES)


def scaled_branch(self, residual_TD, packing):
    residual_TD = residual_TD + 0.5 * self.mixer(self.norm1(residual_TD), packing)
    if self.has_mlp:
        residual_TD = residual_TD + self.mlp(self.norm2(residual_TD))
    return residual_TD


def geglu(self, x_TD):
    value, gate = self.fc1(x_TD).chunk(2, dim=-1)
    return self.fc2(F.gelu(gate) * value)


def dropout(self, residual_TD, packing):
    return F.dropout(plain_block(self, residual_TD, packing), 0.1)


def counting(self, residual_TD, packing):
    self.calls = getattr(self, "calls", 0) + 1
    return plain_block(self, residual_TD, packing) * (1 + 0.01 * self.calls)


def softcap(self, iids, labels=None):
    x_BjD, stages = self.backbone(self.embeddings(iids))
    logits = hnet_trainable.nested_like(5 * (self.lm_head(x_BjD).values() / 5).tanh(), iids)
    ce = None if labels is None else F.cross_entropy(logits.values(), labels.values())
    losses = [hnet_trainable.ratio_loss(stage, N) for stage, N in zip(stages, self.config.target_ratios)]
    return hnet_trainable.HNetOutput(logits, ce, torch.stack(losses), stages)


plain_block = hnet_trainable.Block.forward
EDITS = {
    "a factor in Block": ("Block.forward", scaled_branch),
    "GeGLU for SwiGLU": ("SwiGLU.forward", geglu),
    "dropout": ("Block.forward", dropout),
    "a number that grows with each call": ("Block.forward", counting),
    "a softcap of the logits": ("HNetLM.forward", softcap),
    "an error": ("Mamba2.forward", lambda self, x_TD, packing: x_TD @ x_TD),
}


def make(monkeypatch, edit: str) -> None:
    place, value = EDITS[edit]
    owner, _, name = place.rpartition(".")
    monkeypatch.setattr(getattr(hnet_trainable, owner), name, value)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_graphs_do_not_follow_is_announced(edit, monkeypatch):
    assert agreement.steps_as_graphs(CONFIG) is None
    make(monkeypatch, edit)
    said = agreement.steps_as_graphs(CONFIG)
    expected = {"dropout": "random numbers", "a number that grows with each call": "when a batch comes again"}
    assert said and expected.get(edit, "RuntimeError" if edit == "an error" else "by hnet_trainable.py") in said


@pytest.mark.parametrize("edit", ["a factor in Block", "a softcap of the logits"])
def test_an_edit_that_generation_does_not_follow_is_announced(edit, monkeypatch):
    assert agreement.generation(CONFIG) is None
    make(monkeypatch, edit)
    layer = {"a factor in Block": "backbone.encoder.layers.0"}.get(edit, "logits")
    assert layer in agreement.generation(CONFIG)


def test_a_toy_keeps_stages_letters_and_options():
    config = HNetConfig.load(
        TWO_STAGES | {"arch_layout": ["m4", ["T1m4", ["t3M2"], "m4T1"], "t1"], "d_model": [512, 512, 1024],
                      "tie_embeddings": True}
    )  # fmt: skip
    toy = agreement.toy_config(config)
    assert toy.arch_layout == ["m2", ["T1m2", ["t2M2"], "m2T1"], "t1"] and toy.d_model == (64, 64, 128)
    assert toy.tie_embeddings and toy.attn_cfg.window_size == (7, 3, -1) and toy.N_compress == config.N_compress
