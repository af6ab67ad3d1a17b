from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mimicbrush.data.manifest import split_pairs
from mimicbrush.data.pair import Pair
from mimicbrush.data.training_data import TrainingData, read_training_data
from mimicbrush.errors import DataError
from mimicbrush.evaluation.heldout.selection import select_heldout_pairs, spread_pairs


def _trained_on(pairs: list[Pair], ratio: float = 0.1) -> TrainingData:
    return TrainingData(ratio, frozenset(pair.source_hash[:16] for pair in pairs))


def test_a_folder_that_was_trained_on_gives_its_held_out_sources_only(rendered: list[Pair]) -> None:
    training = _trained_on(split_pairs(rendered, "train"))
    selection = select_heldout_pairs(rendered, "heldout", training)
    assert selection.pairs == split_pairs(rendered, "heldout")
    assert 0 < len(selection.pairs) < len(rendered)
    assert not any(training.has_seen(pair) for pair in selection.pairs)


def test_a_folder_never_trained_on_gives_all(rendered: list[Pair]) -> None:
    training = TrainingData(0.1, frozenset({"0123456789abcdef"}))
    assert select_heldout_pairs(rendered, "heldout", training).pairs == rendered


def test_unknown_training_uses_the_held_out_sources_and_says_so(rendered: list[Pair]) -> None:
    selection = select_heldout_pairs(rendered, "heldout", None)
    assert selection.pairs == split_pairs(rendered, "heldout")
    assert "not known" in selection.messages[0]


def test_split_all_uses_all_and_warns_of_sources_that_were_trained_on(rendered: list[Pair]) -> None:
    selection = select_heldout_pairs(rendered, "all", _trained_on(rendered))
    assert selection.pairs == rendered
    assert "4 of these sources were trained on" in selection.messages[0]


def test_held_out_sources_that_were_trained_on_are_left_out(rendered: list[Pair]) -> None:
    with pytest.raises(DataError, match=r"were trained on earlier .* No source is left"):
        select_heldout_pairs(rendered, "heldout", _trained_on(rendered))
    heldout = split_pairs(rendered, "heldout")
    seen = heldout[0].source_hash
    training = _trained_on([pair for pair in rendered if pair not in heldout or pair.source_hash == seen])
    selection = select_heldout_pairs(rendered, "heldout", training)
    assert selection.pairs == [pair for pair in heldout if pair.source_hash != seen] != []
    (message,) = selection.messages
    assert f"1 of the held-out sources were trained on earlier ({heldout[0].source_path})" in message


def test_nothing_held_out_is_an_error_that_says_what_to_do(rendered: list[Pair]) -> None:
    with pytest.raises(DataError, match="split=all"):
        select_heldout_pairs(rendered, "heldout", _trained_on(rendered, ratio=0.0))


def test_video_pairs_come_first_and_image_pairs_are_used_with_a_message(rendered: list[Pair]) -> None:
    image_pairs = [replace(pair, kind="image") for pair in rendered[:2]]
    assert select_heldout_pairs([*image_pairs, *rendered[2:]], "all", None).pairs == rendered[2:]
    selection = select_heldout_pairs(image_pairs, "all", None)
    assert selection.pairs == image_pairs
    assert "single images" in selection.messages[0]
    with pytest.raises(DataError, match="no pairs"):
        select_heldout_pairs([], "all", None)


def test_pairs_are_spread_evenly_over_sources(rendered: list[Pair]) -> None:
    uneven = rendered + [replace(rendered[0], pair_id=f"more-{i}") for i in range(10)]
    for max_pairs, expected in ((4, [1, 1, 1, 1]), (6, [1, 1, 2, 2]), (9, [2, 2, 2, 3]), (None, [2, 2, 2, 12])):
        chosen = spread_pairs(uneven, max_pairs)
        assert sorted(Counter(pair.source_hash for pair in chosen).values()) == expected
        assert len({pair.pair_id for pair in chosen}) == len(chosen)
        assert chosen == spread_pairs(uneven, max_pairs)


def test_training_data_of_a_pipeline_folder(tmp_path: Path) -> None:
    assert read_training_data(tmp_path) is None
    path = tmp_path / "training_data.json"
    path.write_text(json.dumps({"heldout_ratio": 0.2, "source_hashes": ["00ff"]}))
    assert read_training_data(tmp_path) == TrainingData(0.2, frozenset({"00ff"}))
    path.write_text('{"heldout_ratio": 0.2}')
    with pytest.raises(DataError, match="source_hashes"):
        read_training_data(tmp_path)
