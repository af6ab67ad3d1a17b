"""What is counted of FLUX.2 klein at full size, against figures that are known otherwise."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from measurements import klein

from mimicbrush.assembly.prerequisites import compose_training
from mimicbrush.models.flux2_klein.full_size import PARAMETERS, TRANSFORMER
from mimicbrush.models.flux2_klein.prompt import MAX_TOKENS

CONFIGS = Path(__file__).parents[2] / "configs"
WIDTH = 3072


# An adapter of rank r between a and b channels has r (a + b) parameters. Of five blocks the four projections of the
# images have one. Of the other twenty, both layers: queries, keys, values and the MLP's halves come from the first.
PER_RANK = 5 * 4 * 2 * WIDTH + 20 * ((WIDTH + 9 * WIDTH) + (4 * WIDTH + WIDTH))


def test_bytes_of_weights_and_adapters() -> None:
    frozen = 2 * (PARAMETERS["transformer"] + PARAMETERS["vae"]) + 4 * MAX_TOKENS * TRANSFORMER["joint_attention_dim"]
    found = klein.count_weights(klein.KleinSetting(rank=16))
    assert found["frozen_gib"] == pytest.approx(frozen / 2**30, rel=1e-9)
    assert found["adapter_millions"] == pytest.approx(16 * PER_RANK / 1e6, rel=1e-9)
    assert found["trained_gib"] == pytest.approx(16 * PER_RANK * 20 / 2**30, rel=1e-9)


def test_the_counted_adapters_are_those_of_the_experiment() -> None:
    train = compose_training(["+experiment=klein"], CONFIGS).train
    assert tuple(train.lora_target_modules) == klein.ADAPTED and train.mixed_precision == "bf16"
    assert train.lora_rank == klein.KleinSetting().rank and train.transformer == "lora"


def test_the_documents_agree_with_each_other() -> None:
    """Samples that fit follow from the memory of one and of the weights; adapters from their rank."""
    text = (
        (CONFIGS.parent / "docs" / "speed.md").read_text().partition("### FLUX.2 klein")[2].partition("## Options")[0]
    )
    rows = [
        [float(cell) for cell in re.findall(r"[\d.]+", line)] for line in re.findall(r"^\| \d.*", text, re.MULTILINE)
    ]
    memory, adapters, fits = ([row for row in rows if len(row) == length] for length in (6, 3, 8))
    assert [row[0] for row in adapters] == list(klein.RANKS)
    for rank, millions, gib in adapters:
        assert millions == round(rank * PER_RANK / 1e6, 1) and gib == round(rank * PER_RANK * 20 / 2**30, 2)
    assert [row[:2] for row in memory] == [row[:2] for row in fits] and len(memory) == 6
    rest = klein.RESERVED_GIB + 7.39 + 0.62
    for (*_, kept, again, with_loss), (_, _, *counts) in zip(memory, fits, strict=True):
        sizes = [kept, again, with_loss] * 2
        cards = [card for card in klein.CARDS_GIB.values() for _ in range(3)]
        for count, gib, card in zip(counts, sizes, cards, strict=True):
            # The sizes are rounded to a tenth.
            assert int((card - rest) / (gib + 0.06)) <= count <= int((card - rest) / (gib - 0.06)), (count, gib, card)


@pytest.mark.slow
def test_flop_and_memory_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    double_blocks, single_blocks = 1, 6  # of full width; all of them would take a minute
    monkeypatch.setitem(TRANSFORMER, "num_layers", double_blocks)
    monkeypatch.setitem(TRANSFORMER, "num_single_layers", single_blocks)
    setting = klein.KleinSetting(checkpointing=True)
    found, without = klein.count_sample(setting), klein.count_flop(replace(setting, checkpointing=False))
    blocks, tokens = double_blocks + single_blocks, MAX_TOKENS + 3 * 32 * 32  # text; target, source and reference
    # Two FLOP a weight and token forward, two backward for the tokens alone; attention 4 forward, 10 backward.
    weights = (double_blocks * (4 + 6 + 3) + single_blocks * (9 + 4)) * WIDTH**2 * tokens
    attention = blocks * tokens**2 * WIDTH
    forward = 2 * weights + 4 * attention
    step = 2 * 2 * weights + (4 + 10) * attention
    assert without["tflop"] - without["encode_tflop"] == pytest.approx(step / 1e12, rel=0.04)
    assert found["tflop"] - without["tflop"] == pytest.approx(forward / 1e12, rel=0.04)
    # What each block gets, in bfloat16, is the least that can be kept.
    handed_on = tokens * WIDTH * 2 / 2**30
    assert blocks * handed_on < found["kept_gib"] < blocks * handed_on * 1.3
    # A block that is computed again has all its tensors: of these are 9 widths and 4 widths for its layers alone.
    assert found["kept_gib"] + 13 * handed_on < found["peak_gib"] < found["kept_gib"] + 4 * 13 * handed_on
    held = klein.count_weights(setting)
    room = 24 - klein.RESERVED_GIB - held["frozen_gib"] - held["trained_gib"]
    assert found["fits_24_GB"] == int(room / max(found["peak_gib"], found["encode_gib"])) > 0
