# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Reading rows of a prompt set, each once."""

from tiny_edits import edit_set

from trl_marble.data import read_rows


def test_rows_are_in_the_given_order():
    dataset = edit_set()
    columns = read_rows(dataset, [4, 0, 4, 2])
    assert list(columns) == ["prompt", "image", "tag"]
    assert columns["tag"] == ["e", "a", "e", "c"]
    assert columns["prompt"] == [dataset[row]["prompt"] for row in (4, 0, 4, 2)]
    assert columns["image"] == [dataset[row]["image"] for row in (4, 0, 4, 2)]


def test_a_row_is_read_once():
    reads = []

    def note(batch):
        reads.extend(batch["tag"])
        return batch

    columns = read_rows(edit_set().with_transform(note), [1, 1, 0, 1])
    assert reads == ["b", "a"]
    assert columns["image"][0] is columns["image"][3]
