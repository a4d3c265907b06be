"""hnet_runtime/estimate.py: memory and time of steps, compared with what the ledger has of an H200."""

import json
from pathlib import Path

import pytest
import torch

import train
from hnet_kernels.cards import CARDS
from hnet_runtime import estimate
from hnet_runtime.runs.flags import TrainConfig
from hnet_runtime.runs.run import in_words
from hnet_trainable import HNetConfig

ROOT = Path(__file__).resolve().parent.parent
# config, bytes, --ac, forced shares of chunks, the ledger's entry
MEASURED = [
    ("hnet_1stage_small", 32768, "none", [0.18], "train/hnet_1stage_small/graph/one-model/h200/2026-11-29"),
    ("hnet_1stage_small", 8192, "none", [0.18], "train/hnet_1stage_small/graph/8192-bytes/h200/2026-11-29"),
    ("hnet_1stage_small", 32768, "selective", [0.18], "train/hnet_1stage_small/graph/selective/h200/2026-11-29"),
    ("hnet_1stage_small", 32768, "block", [0.18], "train/hnet_1stage_small/graph/block/h200/2026-11-29"),
    ("hnet_2stage_small", 32768, "none", [0.34, 0.3], "train/hnet_2stage_small/graph/one-model/h200/2026-11-29"),
    ("hnet_2stage_XL", 32768, "none", [0.36, 0.31], "train/hnet_2stage_XL/graph/one-model/h200/2026-11-29"),
    ("hnet_2stage_XL", 32768, "selective", [0.36, 0.31], "train/hnet_2stage_XL/graph/selective/h200/2026-11-29"),
    ("hnet_2stage_XL", 32768, "block", [0.36, 0.31], "train/hnet_2stage_XL/graph/block/h200/2026-11-29"),
]


@pytest.fixture(scope="module")
def ledger():
    lines = map(json.loads, (ROOT / "benchmarks" / "ledger.jsonl").read_text().splitlines())
    return {line["key"]: line for line in lines}


@pytest.mark.parametrize("name, mbs, ac, shares, entry", MEASURED, ids=lambda x: x if isinstance(x, str) else None)
def test_memory_is_close_to_what_was_measured(ledger, name, mbs, ac, shares, entry):
    """To a tenth: two runs of one config differ by 5%."""
    found = estimate.memory(HNetConfig.load(name), mbs, ac, shares).total
    assert found == pytest.approx(ledger[entry]["reserved_gib"], rel=0.1)


@pytest.mark.parametrize("name, mbs, ac, shares, entry", MEASURED, ids=lambda x: x if isinstance(x, str) else None)
def test_time_on_an_h200_is_close_to_what_was_measured(ledger, name, mbs, ac, shares, entry):
    """To a fifth, as the report says."""
    least, most = estimate.step_ms(HNetConfig.load(name), mbs, 1, ac)
    assert least == most == pytest.approx(ledger[entry]["step_ms"], rel=0.2)


def test_recomputation_is_chosen_only_where_it_is_needed():
    small, XL = HNetConfig.load("hnet_1stage_small"), HNetConfig.load("hnet_2stage_XL")
    assert estimate.choose_ac(small, 32768, CARDS["rtx4090"]) == "none"
    assert estimate.choose_ac(small, 49152, CARDS["rtx4090"]) == "selective"
    assert estimate.choose_ac(small, 131072, CARDS["rtx4090"]) == "block"
    assert estimate.choose_ac(XL, 32768, CARDS["h200"]) == "none"
    assert estimate.choose_ac(XL, 24576, CARDS["l40s"], shards=8) == "none"


def test_chunks_of_fewer_tokens_have_more_states_to_save():
    small = HNetConfig.load("hnet_1stage_small")
    on_hopper, on_ampere = (estimate.memory(small, 32768, "none", card=CARDS[name]) for name in ("h200", "a100"))
    assert on_ampere.saved - on_hopper.saved == 8 * 32768 * 2 * 1024 * 128 / 64 / 2**30  # eight Mamba-2 layers


def test_a_dry_run_prints_all_cards_without_a_gpu(capsys):
    config = TrainConfig(config="hnet_1stage_tiny", mbs=2048, dry_run=True, device="cpu")
    assert train.main(config) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{HNetConfig.load('hnet_1stage_tiny').count_parameters():,} parameters")
    assert [line.split("  ")[0] for line in lines[2:-1]] == [card.name for card in CARDS.values()]


def test_a_dry_run_says_what_does_not_fit():
    said = estimate.report(HNetConfig.load("hnet_2stage_XL"), 8192, 1, "auto", [CARDS["rtx3090"], CARDS["h200"]])
    assert "does not fit: take a smaller --mbs" in said.splitlines()[2] and "ms" in said.splitlines()[3]


@pytest.mark.parametrize("ac, words", [("none", "--ac selective or block, a"), ("selective", "--ac block, a")])
def test_running_out_of_memory_names_the_flag_that_helps(ac, words):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 76.00 MiB.")
    assert words in in_words(error, ac)
    assert "--ac" not in in_words(error, "block") and "a smaller --mbs" in in_words(error, "block")
